"""M3ID, VDD, AGLA, ASCD, SID, ED, DLC and the heads-guided intervention are their formulas.

On logits, at the prompt and at later steps, against float64 loops without a cache (reference.py,
rewrites.py). Errors are printed beside the size of the effect.
"""

import math
from dataclasses import replace

import contrasting
import numpy as np
import pytest
import reference
import rewrites
import torch
from test_contrast_reference import decode, lens_inputs
from tiny_models import QUESTIONS, blip_of, double_of, lens_of, picture
from torch.nn import functional

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.lens.prefix import read
from clva_lens.lens.sharing import why_unshared
from clva_lens.methods.agla import brightest
from clva_lens.methods.matching import ToyMatcher
from clva_lens.toy.matching import kind_maps
from clva_lens.toy.scenes import KINDS, render, sample_scenes

STEPS, ITEMS = 3, 2
ERROR = 3e-4
HEADS = {3: (0, 2), 8: (1,)}


@pytest.fixture(scope="module")
def asked():
    """The tiny LLaVA, three prompts of two lengths, and the plain logits of their first step."""
    lens = lens_of("full", "sdpa")
    inputs = lens_inputs(lens)
    return lens, inputs, decode(lens, inputs, max_new_tokens=1)[1][:, 0]


def rows(inputs, item, answer, edits=(), whole=False):
    """Return the reference's logits of the last prompt row and the answer's, or its result."""
    seen = "pixel_values" in inputs
    ids, pixels, _ = reference.rows_of({"pixel_values": torch.zeros(99, 1), **inputs}, item)
    features = None if seen else torch.empty(0, 32, dtype=torch.float64)
    sequence = torch.cat([ids, answer])
    found = reference.run(double_of("full"), sequence, pixels, edits, len(ids), features)
    return found if whole else found.logits[len(ids) - 1 :]


def compare(asked, method, wanted_of, beta=0.0, floor_of=None, items=ITEMS):
    """Check every step; ``wanted_of(item, answer)`` returns (own, wanted) of the reference."""
    lens, inputs, plain = asked
    ids, found = decode(lens, inputs, method, max_new_tokens=STEPS)
    error, effect, nearest = 0.0, [], math.inf
    for item in range(items):
        own, wanted = wanted_of(item, ids[item, :-1])
        kept = torch.ones_like(wanted, dtype=torch.bool)
        if beta:
            judged = own if floor_of is None else floor_of()
            room = judged - judged.amax(dim=1, keepdim=True) - math.log(beta)
            kept, nearest = room >= 0, min(nearest, float(room.abs().min()))
        assert torch.equal(found[item].isfinite(), kept)
        error = max(error, float((found[item] - wanted)[kept].abs().max()))
        effect.append(float((found[item, 0] - plain[item])[kept[0]].abs().max()))
    print(f"{method.name}: error {error:.1e}, effect {min(effect):.3f}, nearest {nearest:.1e}")
    assert error < ERROR
    assert min(effect) > max(0.05, 100 * error)


# ── second inputs without a picture ──


@pytest.mark.parametrize("variant", ["paper", "avisc"])
def test_m3id(asked, variant):
    """Its strength grows with every token; the gate leaves some alone."""
    method = cl.M3ID(decay=0.4, threshold=0.5, variant=variant)
    inputs, gated = asked[1], []

    def wanted(item, answer):
        own = rows(inputs, item, answer)
        other = rows(contrasting.without_picture(inputs), item, answer)
        found = []
        for t, (x, y) in enumerate(zip(own, other, strict=True), start=1):
            sure = float(x.exp().max() / x.exp().sum())
            gated.append(sure >= 0.5)
            alone = variant == "paper" and sure >= 0.5
            found.append(x if alone else x + (math.exp(0.4 * t) - 1) * (x - y))
        return own, torch.stack(found)

    compare(asked, method, wanted, beta=0.1 if variant == "avisc" else 0.0)
    assert not all(gated)


def test_m3id_leaves_a_sure_first_token_alone(asked):
    lens, inputs, plain = asked
    found = decode(lens, inputs, cl.M3ID(threshold=0.0), max_new_tokens=1)[1][:, 0]
    assert torch.equal(found, plain)


@pytest.mark.parametrize("without", ["nothing", "unknown", "both"])
def test_vdd(asked, without):
    lens, inputs, _ = asked
    unknown = lens.processor.tokenizer.unk_token_id
    none = contrasting.without_picture(inputs)
    count = 1 + int((none["attention_mask"]).sum(dim=1).max())
    one = {"input_ids": torch.zeros(3, count, dtype=torch.long)}
    one["attention_mask"] = torch.zeros(3, count, dtype=torch.long)
    for item in range(3):
        ids = reference.rows_of(inputs, item)[0].tolist()
        row = [*ids[: ids.index(5)], unknown, *ids[len(ids) - ids[::-1].index(5) :]]
        one["input_ids"][item, count - len(row) :] = torch.tensor(row)
        one["attention_mask"][item, count - len(row) :] = 1
    seconds = {"nothing": [none], "unknown": [one], "both": [none, one]}[without]

    def wanted(item, answer):
        own = rows(inputs, item, answer)
        other = sum(rows(second, item, answer) for second in seconds) / len(seconds)
        return own, contrasting.contrast(own, other, 0.7, "difference")

    compare(asked, cl.VDD(alpha=0.7, without=without), wanted, beta=0.1)


# ── second inputs with another picture ──


def test_agla(asked):
    """The mask by a sort, of the map that the toy's matcher makes."""
    lens, inputs, _ = asked
    means, deviations = (
        torch.tensor(one).reshape(3, 1, 1)
        for one in (
            lens.processor.image_processor.image_mean,
            lens.processor.image_processor.image_std,
        )
    )
    pictures = (inputs["pixel_values"] * deviations + means).clamp(0, 1)
    masked = []
    for item, image in enumerate(pictures):
        text = [f"{QUESTIONS[item % 3]}"]
        relevance = ToyMatcher().relevance(image[None], text)[0].flatten().tolist()
        alike = float(ToyMatcher().similarity(image[None], text))
        count = round(min(1 - alike / 2, 1 - 1e-5) * len(relevance))
        best = sorted(range(len(relevance)), key=lambda i: -relevance[i])[:count]
        kept = torch.zeros(len(relevance))
        kept[best] = 1
        masked.append((image * kept.reshape(image.shape[1:]) - means) / deviations)
    second = {**inputs, "pixel_values": torch.stack(masked)}

    def wanted(item, answer):
        own, other = rows(inputs, item, answer), rows(second, item, answer)
        return own, own + 2.0 * other

    compare(asked, cl.AGLA(), wanted, beta=0.5)


@pytest.mark.parametrize("fast", [False, True])
def test_ed(asked, fast):
    inputs, together = asked[1], []
    side = inputs["pixel_values"].shape[-1]
    cut = round(side * 0.75)
    corners = []
    for top in (0, side - cut):
        for left in (0, side - cut):
            part = inputs["pixel_values"][:, :, top : top + cut, left : left + cut]
            grown = functional.interpolate(part, size=(side, side), mode="bilinear")
            corners.append({**inputs, "pixel_values": grown})

    def shares(result, row):
        looked = torch.stack([one[:, row, result.image] for one in result.patterns])
        looked = looked.sort(dim=0, descending=True).values[:3].mean(dim=0)
        looked = looked.sort(dim=0, descending=True).values[:3].mean(dim=0).reshape(4, 4)
        return [
            float(looked[r : r + 2, c : c + 2].sum()) for r, c in ((0, 0), (0, 2), (2, 0), (2, 2))
        ]

    def wanted(item, answer):
        result = rows(inputs, item, answer, whole=True)
        first = result.text[-1]
        own, found = result.logits[first:], []
        others = [rows(one, item, answer) for one in corners]
        best = int(np.argmax(shares(result, first)))
        for step in range(len(own)):
            q = torch.tensor(shares(result, first + step), dtype=torch.float64)
            weights = (q * 100).exp() / (q * 100).exp().sum()
            if fast:
                weights = torch.eye(4, dtype=torch.float64)[best]
            found.append(sum(w * one[step] for w, one in zip(weights, others, strict=True)))
        together.append(torch.stack(found))
        return own, 0.5 * own + 0.5 * together[-1]

    compare(asked, cl.ED(fast=fast), wanted, beta=0.5, floor_of=lambda: together[-1])


# ── steered attention ──


def test_head_guided(asked):
    """Layers 5 to 18 of 32 are 2 to 6 of 12."""
    inputs = asked[1]

    def wanted(item, answer):
        found = rows(inputs, item, answer, [rewrites.HeadGuided(alpha=0.8)])
        return found, found

    compare(asked, cl.HeadGuided(alpha=0.8), wanted)


def test_ascd(asked):
    """Both passes are steered, each its way."""
    inputs = asked[1]

    def wanted(item, answer):
        own = rows(inputs, item, answer, [rewrites.Raised(HEADS)])
        other = rows(inputs, item, answer, [rewrites.Lowered()])
        return own, contrasting.contrast(own, other, 1.0, "difference")

    compare(asked, cl.ASCD(heads=HEADS), wanted, beta=0.1)


def test_ascds_own_heads(asked):
    """In each layer the one whose text rows look most at text for what they look at the image."""
    lens, inputs, _ = asked
    result = rows(inputs, 0, torch.empty(0, dtype=torch.long), whole=True)
    heads = {}
    for layer, pattern in enumerate(result.patterns):
        seen = pattern[:, result.text]
        ratio = seen[:, :, result.text].sum(dim=(1, 2)) / seen[:, :, result.image].sum(dim=(1, 2))
        heads[layer] = (int(ratio.argmax()),)
    # The steering moves later layers' patterns, so only the first layer's choice is the plain one.
    first = cl.ASCD(alpha=0)
    with torch.inference_mode(), cl.intervening(lens, first) as run:
        prompt = lens.prompt(picture(0), QUESTIONS[0])
        lens.hf_model(**prompt)
        found = run.sessions[0]._found
        assert found[0][0].nonzero().flatten().tolist() == list(heads[0])
        assert all(int(one.sum()) == 1 for one in found.values())


def test_sid(asked):
    inputs = asked[1]

    def wanted(item, answer):
        own = rows(inputs, item, answer)
        other = rows(inputs, item, answer, [rewrites.LeastSeen(kept=5)])
        return own, contrasting.contrast(own, other, 0.5, "difference")

    compare(asked, cl.SID(kept=5), wanted, beta=0.1)


# ── the likeliest tokens, weighed by a second model ──


@pytest.mark.parametrize("task", ["question", "caption"])
def test_dlc(asked, task):
    """By loops; a caption's first eight tokens are left alone."""
    lens, inputs, plain = asked
    steps = 11 if task == "caption" else STEPS
    method = cl.DLC(task=task, strength=2.0)
    ids, found = decode(lens, inputs, method, max_new_tokens=steps)
    words, matcher = lens.processor.tokenizer, ToyMatcher()
    processor = lens.processor.image_processor
    scale = [torch.tensor(x).reshape(3, 1, 1) for x in (processor.image_std, processor.image_mean)]
    error, effect = 0.0, 0.0
    for item in range(1):
        image = (inputs["pixel_values"][item] * scale[0] + scale[1]).clamp(0, 1)[None]
        answer = ids[item].tolist()
        question = QUESTIONS[item] if task == "question" else ""
        own = rows(inputs, item, ids[item, :-1])

        def cosines(texts, image=image):
            found = matcher.similarity(image, texts)[0].tolist()
            return dict(zip(texts, found, strict=True))

        kept = []
        for step, logits in enumerate(own):
            wanted = logits.clone()
            if task == "question" or step >= 8:
                said = words.decode(answer[max(0, step - 8) : step], skip_special_tokens=True)
                recent = f"{question} {said}".strip()
                best = sorted(range(len(logits)), key=lambda v: -logits[v])[:50]
                read_as = {v: words.decode([v], skip_special_tokens=True).strip() for v in best}
                after = {v: f"{recent} {word}".strip() for v, word in read_as.items()}
                fits = cosines([recent, *after.values(), *read_as.values()])
                kept.append(fits[recent])
                base = kept[-1] if len(kept) <= 3 else sum(kept[-8:]) / len(kept[-8:])
                for token in (v for v in best if read_as[v]):
                    fit = (fits[after[token]] + fits[read_as[token]]) / 2
                    rel = (fit - base) / (1 - base)
                    size = 2.0 * (1 - base) ** 2 / (1 + math.exp(-rel))
                    wanted[token] = logits[token] * math.exp(size)
                effect = max(effect, float((wanted - logits).abs().max()))
            error = max(error, float((found[item, step] - wanted).abs().max()))
    print(f"dlc {task}: error {error:.1e}, effect {effect:.2f}")
    assert error < ERROR
    assert effect > 0.5
    if task == "caption":
        assert torch.equal(found[:, 0], plain)


def test_the_toys_matcher_knows_what_is_there():
    """Kinds that are there fit better than those that are not, and lie where they fit."""
    scenes = sample_scenes(24, seed=5)
    pictures = torch.stack([torch.from_numpy(render(one)) for one in scenes]).permute(0, 3, 1, 2)
    maps = kind_maps(pictures.float() / 255)
    best = maps.flatten(2).amax(dim=2)
    there = torch.tensor([[kind in scene.kinds for kind in KINDS] for scene in scenes])
    higher = (best[there][:, None] > best[~there][None]).float().mean()
    inside = []
    for scene, found in zip(scenes, maps, strict=True):
        for thing in scene.things:
            if not thing.faint and len(scene.of_kind(thing.kind)) == 1:
                fits = found[KINDS.index(thing.kind)]
                middle = (fits == fits.max()).nonzero().float().mean(dim=0)
                corner = torch.tensor([thing.y, thing.x])
                inside.append(bool(((middle > corner) & (middle < corner + thing.size)).all()))
    print(f"there above absent: {float(higher):.3f} (chance .5); within: {np.mean(inside):.2f}")
    assert higher > 0.75
    assert np.mean(inside) > 0.75


def test_the_brightest_pixels():
    relevance = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    kept = brightest(relevance, torch.tensor([0.5, 0.75]))
    assert kept.tolist() == [[[True, False], [True, False]], [[True, True], [True, False]]]


# ── pictures that were read before, other models, refusals ──

SHARING = {
    "M3ID": cl.M3ID(decay=0.5, variant="avisc"),
    "VDD": cl.VDD(without="both"),
    "ED": cl.ED(),
    "ASCD": cl.ASCD(),
    "DLC": cl.DLC(),
    "head-guided": cl.HeadGuided(),
}


@pytest.mark.parametrize("name", SHARING)
def test_questions_share_a_picture(asked, name):
    lens, method = asked[0], SHARING[name]
    assert why_unshared(lens, method) is None
    prefix = read(lens, picture(0))
    whole = lens.prompt([picture(0)] * 2, QUESTIONS[:2])
    wanted_ids, wanted = decode(lens, whole.inputs, method, max_new_tokens=2)
    ids, found = decode(lens, dict(prefix.ask(QUESTIONS[:2])), method, max_new_tokens=2)
    assert torch.equal(ids, wanted_ids)
    known = wanted.isfinite()
    assert torch.equal(found.isfinite(), known)
    assert float((found - wanted)[known].abs().max()) < 1e-4


@pytest.mark.parametrize("method", [cl.SID(), cl.AGLA(), cl.ED(fast=True)])
def test_what_depends_on_the_question_is_not_shared(asked, method):
    assert "reads or edits rows before the question" in why_unshared(asked[0], method)


@pytest.mark.parametrize("name", ["ASCD", "ED", "AGLA"])
def test_other_methods_act_on_all_passes(asked, name):
    """CLVA beside them moves both inputs, and order does not count."""
    lens, inputs, _ = asked
    method = {"AGLA": cl.AGLA(beta=0), "ED": cl.ED(beta=0), "ASCD": cl.ASCD(beta=0)}[name]
    clva = cl.CLVA(tau=1.0)
    one, other = (
        decode(lens, inputs, *both, max_new_tokens=2)[1]
        for both in ((clva, method), (method, clva))
    )
    alone = decode(lens, inputs, method, max_new_tokens=2)[1]
    assert float((one - alone)[:, 0].abs().max()) > 0.05
    assert float((one - other).abs().max()) < (1e-6 if name != "ASCD" else 10)


def test_refusals(asked):
    lens = asked[0]
    with (
        pytest.raises(InterventionError, match=r"Q-Former's queries lie on no part"),
        cl.intervening(blip_of("sdpa"), cl.ED()),
    ):
        pass
    for method in (cl.AGLA(), cl.DLC(), cl.VDD(without="unknown")):
        with (
            pytest.raises(InterventionError, match=r"without a processor|has no processor"),
            cl.intervening(lens.hf_model, method),
        ):
            pass
    large = {**asked[1], "pixel_values": torch.zeros(3, 3, 96, 96)}
    with pytest.raises(InterventionError, match=r"matcher='toy' knows the glyphs"):
        cl.AGLA().sessions(_target(lens))[0].seconds[0](large)
    with pytest.raises(ParameterError, match=r"there is no matcher 'clip'"):
        cl.AGLA(matcher="clip")
    with pytest.raises(InterventionError, match=r"cut implausible tokens off.*Use one of them"):
        cl.generate(lens, (picture(0), QUESTIONS[0]), cl.compose(cl.VDD(), cl.ED()))
    for wrong, said in (
        (lambda: cl.M3ID(decay=-1), "decay must be a finite number >= 0"),
        (lambda: cl.M3ID(threshold=2), r"threshold must be in \[0, 1\]"),
        (lambda: cl.SID(kept=0), "kept must be at least 1"),
        (lambda: cl.SID(layer=0), "layer must be at least 1"),
        (lambda: cl.ED(alpha=2), r"alpha must be in \[0, 1\]"),
        (lambda: cl.ASCD(positive=-1), "positive must be a finite number >= 0"),
        (lambda: cl.DLC(strength=-1), "strength must be a finite number >= 0"),
        (lambda: cl.HeadGuided(alpha=math.nan), "alpha must be finite"),
    ):
        with pytest.raises(ParameterError, match=said):
            wrong()
    with pytest.raises(ParameterError, match=r"layer=12 needs a layer before it"):
        replace(cl.SID(), layer=12).sessions(_target(lens))


def _target(lens):
    from clva_lens.methods.target import Target

    return Target(lens.hf_model, lens.processor)
