"""MemVR and DeCo are their formulas, on logits, at the prompt and at every later step.

The reference is float64, one sample at a time and without a cache: the hand-written decoder of
reference.py, with the formulas of the methods' docstrings once more, row by row.
"""

import math
from dataclasses import replace

import nnsight
import pytest
import queries
import reference
import torch
from tiny_models import QUESTIONS, blip_of, double_of, exact_blip, lens_of, picture
from torch import Tensor

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError
from clva_lens.methods.target import Target

STEPS, ERROR = 4, 2e-4
FED = 8.0  # FFNs that matter
FAMILIES = ("llava", "instructblip")
MEMVR = {"llava": cl.MemVR(ratio=0.3, gamma=0.87), "instructblip": cl.MemVR(ratio=0.3, gamma=0.93)}


def lens_for(family, kernel="sdpa"):
    return lens_of("full", kernel, FED) if family == "llava" else blip_of(kernel, "llama", FED)


def inputs_of(lens):
    inputs = lens.prompt([picture(i) for i in range(3)], QUESTIONS).inputs
    assert not inputs["attention_mask"].bool().all()  # there is padding
    return inputs


def decode(lens, inputs, *methods, **options):
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(lens, *methods):
        out = lens.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


class Retracing:
    """MemVR, from the formulas: one entropy, one decision and one scale for a group of rows."""

    def __init__(self, family, ratio, gamma, prompt, asked, silu=False):
        self.ratio, self.gamma, self.prompt, self.asked = ratio, gamma, prompt, asked
        self.silu, self.fired, self.nearest = silu, {}, 1e9
        model = double_of("full", FED) if family == "llava" else exact_blip(FED).language_model
        self.norm = (model.model if family != "llava" else model.model.language_model).norm
        self.head = model.lm_head
        self.norm.requires_grad_(False)
        self.head.requires_grad_(False)

    def read(self, row: Tensor) -> list[float]:
        x = row / math.sqrt(float((row * row).mean()) + self.norm.variance_epsilon)
        return sorted((self.head.weight @ (x * self.norm.weight)).tolist())

    def entropy(self, row: Tensor) -> float:
        top = self.read(row)[-10:]
        whole = sum(math.exp(z - top[-1]) for z in top)
        p = [math.exp(z - top[-1]) / whole for z in top]
        return -sum(q * math.log(q) for q in p) / math.log(10)

    def feed(self, layer, x, out, result):
        if layer - 1 not in self.asked:
            return out
        features, out = result.streams[0][result.image], out.clone()
        groups = [list(range(self.prompt))] + [[i] for i in range(self.prompt, len(x))]
        for group in groups:
            last = group[-1]
            if last in self.fired:
                continue
            u = self.entropy(result.streams[layer][last])
            self.nearest = min(self.nearest, abs(u - self.gamma))
            if u <= self.gamma:
                continue
            self.fired[last] = layer
            weights = torch.stack([features @ x[i] for i in group])
            if self.silu:
                weights = weights / (1 + torch.exp(-weights))
            found = weights @ features
            scale = out[group].abs().mean() / found.abs().mean()
            out[group] = (1 - self.ratio) * out[group] + self.ratio * scale * found
        return out


@torch.no_grad()
def reference_rows(family, inputs, item, answer, edits=(), feed=None):
    """The reference's result, and the logits of the last prompt row and of the answer's rows."""
    ids, pixels, _ = reference.rows_of(inputs, item)
    if family == "llava":
        whole = torch.cat([ids, answer])
        found = reference.run(double_of("full", FED), whole, pixels, edits, len(ids), feed=feed)
    else:
        found = queries.run(exact_blip(FED), inputs, item, (), edits, answer, feed).decoder
    return found, len(ids) - 1


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memvr(family, variant, kernel):
    lens, method = lens_for(family, kernel), replace(MEMVR[family], variant=variant)
    inputs = inputs_of(lens)
    ids, found = decode(lens, inputs, method)
    plain = decode(lens, inputs, max_new_tokens=1)[1][:, 0]
    asked = method.asked_layers(12)
    assert tuple(asked) == (2, 3, 4, 5)
    error, nearest, effects, layers = 0.0, 1e9, [], set()
    for item in range(3):
        length = int(inputs["attention_mask"][item].sum())
        its = Retracing(family, 0.3, method.gamma, length, asked, variant == "paper")
        seen, last = reference_rows(family, inputs, item, ids[item, :-1], feed=its.feed)
        error = max(error, float((found[item] - seen.logits[last:]).abs().max()))
        nearest = min(nearest, its.nearest)
        rows = [its.fired.get(row) for row in range(last, last + STEPS)]
        layers |= set(rows)
        if rows[0] is not None:
            effects.append(float((found[item, 0] - plain[item]).abs().max()))
        else:
            assert float((found[item, 0] - plain[item]).abs().max()) < ERROR
    print(f"{family} {variant}: error {error:.1e}, effects {effects}, {layers}, near {nearest:.1e}")
    assert error < ERROR
    assert effects and min(effects) > max(0.05, 100 * error)
    assert nearest > 1e-4
    assert len(layers) >= 2


def test_memvr_decides_for_each_sample():
    """A threshold between the samples' uncertainties: one fires, another is left bit-identical."""
    lens = lens_for("llava")
    inputs = inputs_of(lens)
    most = []
    for item in range(3):
        length = int(inputs["attention_mask"][item].sum())
        its = Retracing("llava", 0.0, 1.0, length, range(0))
        seen, last = reference_rows("llava", inputs, item, torch.empty(0, dtype=torch.long))
        most.append(max(its.entropy(seen.streams[layer + 1][last]) for layer in (2, 3, 4, 5)))
    low, high = sorted(most)[0], sorted(most)[-1]
    assert high - low > 1e-3
    method = cl.MemVR(ratio=0.3, gamma=(low + high) / 2)
    with torch.inference_mode():
        plain = lens.hf_model(**inputs).logits[:, -1]
        with cl.intervening(lens, method):
            found = lens.hf_model(**inputs).logits[:, -1]
    moved = (found - plain).abs().amax(dim=1)
    for item, u in enumerate(most):
        assert float(moved[item]) > 0.05 if u > method.gamma else moved[item] == 0
    assert 0 < int((moved > 0).sum()) < 3


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_clva", [False, True])
def test_deco(family, kernel, with_clva):
    lens = lens_for(family, kernel)
    inputs = inputs_of(lens)
    methods = [cl.CLVA(tau=1.0, site="decoder")] * with_clva + [cl.DeCo(alpha=0.6, top_p=0.8)]
    edits = [reference.Clva(tau=1.0)] * with_clva
    ids, found = decode(lens, inputs, *methods)
    error, effect, cut = 0.0, 0.0, 0
    for item in range(3):
        seen, last = reference_rows(family, inputs, item, ids[item, :-1], edits)
        its = Retracing(family, 0, 1, 0, ())
        for step, own in enumerate(seen.logits[last:]):
            p = own.softmax(0).tolist()
            ranked, total, kept = sorted(range(64), key=lambda v: -p[v])[:20], 0.0, []
            for v in ranked:
                kept.append(v)
                total += p[v]
                if total >= 0.8:
                    break
            best, chosen = -1.0, None
            for layer in (7, 8, 9, 10):  # 19 * 12 / 32 to 27 * 12 / 32
                row = seen.streams[layer + 1][last + step]
                x = row / torch.sqrt((row * row).mean() + its.norm.variance_epsilon)
                z = its.head.weight @ (x * its.norm.weight)
                q = z.softmax(0)
                for v in kept:
                    if float(q[v]) > best:
                        best, chosen = float(q[v]), z
            row = found[item, step]
            assert row.isfinite().nonzero()[:, 0].tolist() == sorted(kept)
            wanted = own + 0.6 * best * chosen
            error = max(error, float((row - wanted)[kept].abs().max()))
            effect = max(effect, float((row - own)[kept].abs().max()))
            cut += 64 - len(kept)
    print(f"{family}: error {error:.1e}, effect {effect:.3f}, {cut} cut")
    assert error < ERROR
    assert effect > max(0.05, 100 * error)
    assert cut > 0


@pytest.mark.parametrize("method", [cl.MemVR(ratio=0.3, gamma=0.6), cl.DeCo()])
def test_beams(method):
    """A beam alone in its batch is what it is in a batch, and with a cache as without."""
    lens = lens_for("llava")
    inputs = inputs_of(lens)
    options = {"num_beams": 3, "max_new_tokens": 4}
    ids = decode(lens, inputs, method, **options)[0]
    assert torch.equal(ids, decode(lens, inputs, method, use_cache=False, **options)[0])
    prompt = lens.prompt(picture(1), QUESTIONS[1]).inputs
    assert torch.equal(ids[1], decode(lens, prompt, method, **options)[0][0])


@pytest.mark.parametrize("method", [cl.MemVR(ratio=0.3, gamma=0.6), cl.DeCo()])
def test_with_clva_in_one_trace(ask, method):
    one = lens_for("llava")
    prompt, clva = ask(one, 3), cl.CLVA(tau=1.0)
    with torch.inference_mode():
        with cl.intervening(one.hf_model, clva, method):
            expected = one.hf_model(**prompt.inputs).logits
        with cl.intervening(one.hf_model, clva):
            alone = one.hf_model(**prompt.inputs).logits
    handle = nnsight.NNsight(one.hf_model)
    with handle.trace(**prompt):
        cl.intervene(clva, method)
        final = handle.model.language_model.norm.output.save()
        found = handle.output.logits.save()
    assert torch.equal(found, expected)
    assert final.shape[:2] == prompt["input_ids"].shape
    change = (expected - alone).abs()
    assert float(change[change.isfinite()].max()) > 0.05


def test_uncut_is_kept_for_margins(one, ask):
    session = cl.DeCo().sessions(Target(one.hf_model))[0]
    with torch.inference_mode(), running(one.hf_model, [session]):
        found = one.hf_model(**ask(one, 3).inputs).logits[:, -1]
    assert session.uncut is not None and session.uncut.isfinite().all()
    kept = found.isfinite()
    assert not kept.all()
    assert torch.equal(found[kept], session.uncut[kept])


def test_one_owner_of_the_cut_off(one):
    with (
        pytest.raises(InterventionError, match=r"cut implausible tokens off"),
        cl.intervening(one, cl.DeCo(), cl.VCD()),
    ):
        pass


@pytest.mark.parametrize("method", [cl.MemVR(), cl.DeCo()])
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_other_language_models(ask, method, language):
    lens = blip_of("sdpa", language)
    if language == "t5":
        with pytest.raises(ModelLoadError, match=r"'t5'"):
            method.sessions(Target(lens.hf_model))
        return
    method = cl.MemVR(ratio=0.5, gamma=0.1) if method.name == "memvr" else method
    inputs = ask(lens, 2).inputs
    found = decode(lens, inputs, method, max_new_tokens=3)[1]
    again = decode(lens, inputs, method, max_new_tokens=3, use_cache=False)[1]
    torch.testing.assert_close(found, again, rtol=0, atol=1e-4)
    change = (found - decode(lens, inputs, max_new_tokens=3)[1])[:, 0].abs()
    assert float(change[change.isfinite()].max()) > 0.05


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (cl.MemVR, {"ratio": 1.5}),
        (cl.MemVR, {"gamma": -0.1}),
        (cl.MemVR, {"variant": "mine"}),
        (cl.MemVR, {"start": 5, "end": 6}),
        (cl.MemVR, {"end": 12}),
        (cl.DeCo, {"alpha": -1.0}),
        (cl.DeCo, {"top_p": 0.0}),
        (cl.DeCo, {"top_k": 0}),
        (cl.DeCo, {"layers": ()}),
        (cl.DeCo, {"layers": (12,)}),
    ],
)
def test_refused(one, untyped, kind, parameters):
    with pytest.raises(ParameterError, match=next(iter(parameters))):
        kind(**parameters).sessions(Target(one.hf_model))
