"""Steering is its formula, on logits: added or turned, row by row, at the decoder and the tower.

The reference is float64, one sample at a time and without a cache: transformers' own model with
plain hooks, which write each row anew.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_state import state
from tiny_models import QUESTIONS, blip_of, double_of, exact_blip, lens_of, picture, tiny_model

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError
from clva_lens.lens.prefix import read
from clva_lens.lens.provenance import describe
from clva_lens.lens.sharing import Prefixes, shared, why_unshared
from clva_lens.lens.towers import pictures_read_once

STEPS, ERROR, LAYERS = 4, 2e-4, (2, 7)
SPANS = ("text", "last", "image", "system", "all", "generated")
PARTS = ("resid_post", "mlp_out", "resid_pre", "attn_out")
PLACES = [("decoder", part, keep) for part in PARTS for keep in (False, True)]
PLACES += [("vision", "resid_post", True), ("vision", "mlp_out", False)]


def direction(width, scale=1.0):
    return scale * torch.randn(2, width, generator=torch.Generator().manual_seed(3))


def steer(stack, part, keep, span=None, strength=0.7):
    layers, width = (LAYERS, 32) if stack == "decoder" else ((0, 1), 24)
    return cl.Steer(
        vector=direction(width, 5.0),
        layers=layers,
        span=span,
        strength=strength,
        keep_norm=keep,
        part=part,
        stack=stack,
    )


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


def modules(model, stack, part, layer):
    """The module of a part and whether it is its input, from transformers' names."""
    if stack == "vision":
        tower = getattr(model, "vision_model", None) or model.model.vision_tower
        block = getattr(tower, "vision_model", tower).encoder.layers[layer]
        return (block, False) if part == "resid_post" else (block.mlp, False)
    inner = getattr(model.model, "language_model", None) if hasattr(model, "model") else None
    inner = model.language_model.model if inner is None else inner
    block = inner.layers[layer]
    return {
        "resid_post": (block, False),
        "resid_pre": (block, True),
        "mlp_out": (block.mlp, False),
        "attn_out": (block.self_attn.o_proj, False),
    }[part]


def written(row, way, strength, keep):
    """The formula, for one row, in Python's own numbers."""
    h, v = row.tolist(), way.tolist()
    if not keep:
        return [a + strength * b for a, b in zip(h, v, strict=True)]
    long, far = sum(a * a for a in h) ** 0.5, sum(b * b for b in v) ** 0.5
    u = [a / long + strength * b / far for a, b in zip(h, v, strict=True)]
    size = sum(a * a for a in u) ** 0.5
    return [long * a / size for a in u]


def reference_logits(model, inputs, item, answer, method, rows):
    """Logits of the last prompt row and the answer's, under hooks in these rows."""
    mask = inputs["attention_mask"][item].bool()
    one = {k: v[item : item + 1] for k, v in inputs.items()}
    one = {k: v[:, mask] if v.shape[1:] == mask.shape else v for k, v in one.items()}
    one = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
    start = int(mask.sum())
    one["input_ids"] = torch.cat([one["input_ids"], answer[None]], dim=1)
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    handles = []

    def edit(value, place):
        value, way = value.clone(), method.vector.values[place].double()
        chosen = range(value.shape[1]) if rows is None else rows(start, value.shape[1])
        for row in chosen:
            new = written(value[0, row], way, method.strength, method.keep_norm)
            value[0, row] = torch.tensor(new, dtype=torch.float64)
        return value

    for place, layer in enumerate(method.vector.layers):
        module, before = modules(model, method.stack, method.part, layer)

        def pre(_, args, kwargs, place=place):
            return (edit(args[0], place), *args[1:]), kwargs

        def post(_, args, out, place=place):
            found = edit(out[0] if isinstance(out, tuple) else out, place)
            return (found, *out[1:]) if isinstance(out, tuple) else found

        handles.append(module.register_forward_pre_hook(pre, with_kwargs=True) if before
                       else module.register_forward_hook(post, prepend=True))  # fmt: skip
    try:
        with torch.no_grad():
            return model(**one, use_cache=False).logits[0, start - 1 :]
    finally:
        for handle in handles:
            handle.remove()


def rows_of(lens, prompt, item, span):
    """Prompt rows of a span and generated ones, from the token ids."""
    ids = prompt["input_ids"][item][prompt["attention_mask"][item].bool()]
    image = (ids == 5).nonzero()[:, 0].tolist()
    first, last = image[0], image[-1]

    def chosen(start, count):
        spans = {
            "image": image,
            "system": range(first),
            "text": range(last + 1, count),
            "last": range(start - 1, count),
            "all": range(count),
            "generated": range(start, count),
        }
        return spans[span]

    return chosen


def compare(lens, exact, method, span):
    inputs = inputs_of(lens)
    ids, found = decode(lens, inputs, method)
    _, plain = decode(lens, inputs, max_new_tokens=2)
    error = effect = 0.0
    for item in range(3):
        rows = None if method.stack == "vision" else rows_of(lens, inputs, item, span)
        wanted = reference_logits(exact, inputs, item, ids[item, :-1], method, rows)
        error = max(error, float((found[item] - wanted).abs().max()))
        step = int(span == "generated")  # the first token is written before it
        effect = max(effect, float((wanted[step] - plain[item, step]).abs().max()))
    print(f"{method.stack} {method.part} {span} keep_norm={method.keep_norm}: "
          f"error {error:.1e}, effect {effect:.2f}")  # fmt: skip
    assert error < ERROR
    return effect


@pytest.mark.parametrize(("stack", "part", "keep"), PLACES)
def test_steering_is_its_formula(stack, part, keep):
    """Greedy, in a batch with padding and a cache, against one sample and one pass at a time."""
    span = "text" if stack == "decoder" else None
    lens, method = lens_of("full", "sdpa", 8.0), steer(stack, part, keep, span)
    assert compare(lens, double_of("full", 8.0), method, "text") > 0.05


@pytest.mark.parametrize("span", SPANS)
def test_each_span_is_its_rows(span):
    lens = lens_of("grouped", "sdpa", 8.0)
    effect = compare(
        lens, double_of("grouped", 8.0), steer("decoder", "resid_post", True, span), span
    )
    assert effect > 0.05


@pytest.mark.parametrize("stack", ["decoder", "vision"])
def test_behind_a_q_former(stack):
    lens = blip_of("sdpa", "llama", 8.0)
    method = steer(stack, "resid_post", stack == "vision", strength=3.0)
    inputs = inputs_of(lens)
    _, found = decode(lens, inputs, method, max_new_tokens=1)
    _, plain = decode(lens, inputs, max_new_tokens=1)
    exact, error = exact_blip(8.0), 0.0
    for item in range(3):
        rows = None if stack == "vision" else rows_of(lens, inputs, item, "text")
        one = {k: v for k, v in inputs.items() if not k.startswith("qformer")}
        one |= {k: v[item : item + 1] for k, v in inputs.items() if k.startswith("qformer")}
        wanted = blip_logits(exact, inputs, item, method, rows)
        error = max(error, float((found[item, 0] - wanted).abs().max()))
    effect = float((found - plain).abs().max())
    print(f"{stack}: error {error:.1e}, effect {effect:.2f}")
    assert error < 1e-3 < 0.05 < effect


def blip_logits(exact, inputs, item, method, rows):
    """As reference_logits, but the Q-Former's own text keeps its padding and its mask."""
    words = {k: v[item : item + 1] for k, v in inputs.items() if k.startswith("qformer")}
    others = {k: v for k, v in inputs.items() if not k.startswith("qformer")}
    empty = torch.zeros(0, dtype=torch.long)

    class Asked:
        """The model, given the Q-Former's text as it is."""

        def __call__(self, **given):
            return exact(**given, **words)

        def __getattr__(self, name):
            return getattr(exact, name)

    return reference_logits(Asked(), others, item, empty, method, rows)[-1]


@pytest.mark.parametrize("decoding", [cl.Beam(num_beams=3), cl.Sampling(seed=1)])
def test_beams_and_samples_are_those_of_a_steered_model(decoding):
    """A model whose layer adds the vector by itself gives the same tokens."""
    lens, method = lens_of("full", "sdpa"), steer("decoder", "resid_post", False, "all")
    decoding = replace(decoding, max_new_tokens=STEPS)
    pairs = [(picture(i), QUESTIONS[i]) for i in range(3)]
    found = cl.generate(lens, pairs, method, decoding, progress=False)
    plain = cl.generate(lens, pairs, None, decoding, progress=False)
    own = copy.deepcopy(lens.hf_model)
    for place, layer in enumerate(LAYERS):
        way = 0.7 * method.vector.values[place]
        own.model.language_model.layers[layer].register_forward_hook(
            lambda module, args, out, way=way: out + way
        )
    wanted = cl.generate(cl.load((own, lens.processor)), pairs, None, decoding, progress=False)
    rows = [[ids.tolist() for ids in one.ids] for one in (found, wanted, plain)]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("stack", ["decoder", "vision"])
def test_everything_is_undone(stack):
    lens, prompt = lens_of("full", "sdpa"), None
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    before, plain = state(lens.hf_model), lens.hf_model(**prompt).logits
    method = steer(stack, "resid_post", False)
    with pytest.raises(ZeroDivisionError), cl.intervening(lens, method):
        assert float((lens.hf_model(**prompt).logits - plain).abs().max().detach()) > 0.05
        1 / 0  # noqa: B018
    assert state(lens.hf_model) == before
    assert torch.equal(lens.hf_model(**prompt).logits, plain)
    with lens.trace(prompt):
        cl.intervene(method)
        traced = lens.output.logits.save()
    with cl.intervening(lens, method):
        assert torch.equal(lens.hf_model(**prompt).logits, traced)
    assert state(lens.hf_model) == before


def test_who_edits_image_rows_shares_no_picture():
    lens = lens_of("full", "sdpa")
    mine = {span: steer("decoder", "resid_post", False, span) for span in SPANS}
    free = {span for span, method in mine.items() if why_unshared(lens, method) is None}
    assert free == {"text", "last", "generated"}
    kind, reason = shared(lens, steer("vision", "resid_post", False), "picture")
    assert kind is None and "vision tower" in reason
    asked = read(lens, [picture(0)]).ask(QUESTIONS[:2], [0, 0])
    whole = lens.prompt([picture(0)] * 2, QUESTIONS[:2])
    text = steer("decoder", "resid_post", True, "text")
    with torch.no_grad(), cl.intervening(lens, text):
        cut, own = (lens.hf_model(**one).logits[:, -1] for one in (dict(asked), whole.inputs))
    torch.testing.assert_close(cut, own, rtol=0, atol=1e-4)
    refused = pytest.raises(InterventionError, match="Read the whole prompt")
    for method in (mine["all"], steer("vision", "resid_post", False)):
        with torch.no_grad(), refused, cl.intervening(lens, method):
            lens.hf_model(**dict(asked))


def test_a_tower_that_is_edited_is_read_for_each_method():
    """What was read of a picture without the method is no use under it, nor the other way round."""
    lens, once = blip_of("sdpa"), Prefixes()
    prompt = once.ask(lens, [picture(0)] * 2, QUESTIONS[:2], None, "tower")
    whole = lens.prompt([picture(0)] * 2, QUESTIONS[:2])
    found = {}
    for name in ("none", "steered", "none again"):
        given = [steer("vision", "resid_post", True, strength=3.0)] if name == "steered" else []
        with torch.no_grad(), cl.intervening(lens, *given):
            with pictures_read_once(lens.hf_model, prompt):
                found[name] = lens.hf_model(**prompt).logits[:, -1]
            wanted = lens.hf_model(**whole).logits[:, -1]
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-4)
    assert float((found["steered"] - found["none"]).abs().max()) > 0.05


def test_nothing_is_added_by_nothing():
    lens, prompt = lens_of("full", "sdpa"), None
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    plain = lens.hf_model(**prompt).logits
    nothing = (cl.Steer(strength=0), cl.Steer(vector=torch.zeros(12, 32)), cl.Steer(layers=()))
    for method in nothing:
        with cl.intervening(lens, method):
            assert torch.equal(lens.hf_model(**prompt).logits, plain)
    with cl.intervening(lens, cl.Steer(vector=torch.zeros(12, 32), keep_norm=True)):
        torch.testing.assert_close(lens.hf_model(**prompt).logits, plain, rtol=0, atol=1e-3)


def test_a_vector_is_kept_and_known(tmp_path):
    lens = lens_of("full", "sdpa")
    vector = cl.steering_vector(lens, [(ask(lens, 0), ask(lens, 1)), (ask(lens, 2), ask(lens, 0))])
    path = vector.save(tmp_path / "deep" / "toward.safetensors")
    assert [one.name for one in path.parent.iterdir()] == ["toward.safetensors"]
    again = cl.SteeringVector.load(path, lens)
    assert torch.equal(again.values, vector.values) and again.layers == vector.layers
    assert again.record == json.loads(json.dumps(vector.record))
    assert again.record["pairs"] == 2 and again.record["how"] == "mean"
    one, other = (describe(cl.Steer(vector=v)) for v in (vector, str(path)))
    assert one == other and one["vector"]["values"]["sha256"]
    stranger = cl.load((tiny_model(seed=1), lens.processor))
    with pytest.raises(ModelLoadError, match="steering vector was made on"):
        cl.SteeringVector.load(path, stranger)
    with pytest.raises(ModelLoadError, match="steering vector was made on"):
        cl.generate(stranger, ask(lens, 0), cl.Steer(vector=str(path)))
    half = cl.load((tiny_model().half(), lens.processor))
    assert cl.SteeringVector.load(path, half).values.shape == vector.values.shape
    save_file({"values": torch.ones(1, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text", "missing"):
        with pytest.raises(ParameterError, match=r"SteeringVector\.save\(\) wrote"):
            cl.Steer(vector=str(tmp_path / f"{name}.safetensors"))


def ask(lens, item):
    return lens.prompt(picture(item), QUESTIONS[0])


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"strength": float("nan")}, "finite"),
        ({"span": "words"}, "span must be one of"),
        ({"span": (-1,)}, "positions are one or more"),
        ({"vector": torch.ones(32)}, "unclear which layers"),
        ({"vector": torch.ones(2, 32), "layers": [1]}, "a row for each layer"),
        ({"vector": torch.full((1, 32), float("inf"))}, "not finite"),
        ({"vector": torch.ones(1, 3, 32)}, "for a vision tower"),
        ({"part": "pattern"}, "part"),
    ],
)
def test_what_does_not_fit_is_refused(untyped, parameters, match):
    with pytest.raises(ParameterError, match=match):
        cl.Steer(**parameters)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"layers": [12]}, "names layer 12"),
        ({"vector": torch.ones(2, 32), "layers": None, "span": (99,)}, "names position 99"),
        ({"vector": torch.ones(2, 16)}, "Make it on this model"),
        ({"vector": torch.ones(12, 32), "stack": "vision"}, "names layer"),
        ({"stack": "vision", "span": "image"}, "its own tokens"),
        ({"stack": "vision", "span": (99,)}, "names position 99"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(parameters, match):
    lens = lens_of("full", "sdpa")
    with pytest.raises(ParameterError, match=match), cl.intervening(lens, cl.Steer(**parameters)):
        lens.hf_model(**lens.prompt(picture(0), QUESTIONS[0]))
