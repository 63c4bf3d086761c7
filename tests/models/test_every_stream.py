"""The logit lens, the cache and the attribution in every family: against plain hooks and logits.

Norms are drawn at random, since those of a new model multiply by 1; so are caps, factors and gates
of the stream that are off by default.
"""

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import tiny_families as tiny
import torch
import transformers
from survey_table import PROVEN

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError, UnknownName
from clva_lens.lens.cache import run_with_cache
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Prompt, VisualTokens

KINDS = (*PROVEN, "llava (pixtral)")
UNSUMMED = {
    "gemma4": "embeddings of its own",
    "glm5_next": "several copies",
    "hy_v4_vl": "several copies",
}
WHOLE = "every name"


@cache
def drawn(kind):
    """A model whose norms, factors and final cap are not those of a new one; and its logits."""
    model = copy.deepcopy(tiny.tiny_model(kind))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in model.parameters():
            if one.ndim == 1:
                one.add_(torch.rand(one.shape, generator=noise), alpha=0.5)
        for name, one in model.named_buffers():
            if name.endswith("layer_scalar"):
                one.fill_(0.9)
    text = model.config.get_text_config()
    if kind.startswith("gemma4"):
        text.final_logit_softcapping = 5.0
    if hasattr(text, "logits_scaling"):
        text.logits_scaling = 1.7
    inputs = tiny.sample(kind, 0)
    with torch.no_grad():
        return model, inputs, model(**inputs).logits[0, -1]


def decoder_of(model):
    """The module with the layers."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else found.model


def seen_by_hooks(model, inputs):
    """What plain hooks see of each layer, and of the projection of its heads."""
    seen, hooks = {}, []
    attending = find_family(model).sites(model)[0].layers

    def first(one):
        return one[0] if isinstance(one, tuple) else one

    def watch(module, name, side):
        def before(_, args, kwargs):
            seen[name] = (*args, *kwargs.values())[0]

        def after(_, args, output):
            seen[name] = first(output)

        if side == "in":
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(after))

    for i, layer in enumerate(decoder_of(model).layers):
        watch(layer, f"blocks.{i}.hook_resid_pre", "in")
        watch(layer, f"blocks.{i}.hook_resid_post", "out")
        for path, part in layer.named_modules():
            if i in attending and re.fullmatch(r"self_attn\.(o_proj|out_proj|dense)", path):
                watch(part, f"blocks.{i}.attn.hook_z", "in")
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_last_layers_lens_is_the_logits(kind):
    model, inputs, logits = drawn(kind)
    read = cl.logit_lens(model, inputs, tokens=list(range(len(logits))))
    depth = len(decoder_of(model).layers)
    assert read.layers == tuple(range(depth)) and read.logits.shape[:2] == (depth, 1)
    error = float((read.logits[-1, 0] - logits).abs().max())
    effect = float((read.logits[-2, 0] - logits).abs().max())
    print(f"{kind}: error {error:.1e}, the layer before {effect:.2f}")
    assert error < 2e-6 * float(logits.abs().max().clamp_min(1)) * 5
    assert effect > 0.05


def test_entries_are_what_hooks_see(kind):
    """And sums: the stream after a block is that before it and what the block puts out."""
    model, inputs, logits = drawn(kind)
    out, cache_ = run_with_cache(model, inputs)
    assert torch.equal(out[0, -1], logits)
    seen = seen_by_hooks(model, inputs)
    for name, value in seen.items():
        if name.startswith("blocks"):
            found = cache_[name]
            found = found.flatten(2) if name.endswith("hook_z") else found
            torch.testing.assert_close(found, value, rtol=0, atol=0, msg=name)
    scalars = [float(getattr(one, "layer_scalar", 1.0)) for one in decoder_of(model).layers]
    summed = 0
    for i, scalar in enumerate(scalars):
        pre, mid, post, attn, mlp = (
            cache_.cache_dict.get(f"blocks.{i}.hook_{one}")
            for one in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        )
        if attn is not None and mid is not None:
            assert float((pre + attn - mid).abs().max()) < 1e-5
            assert float(attn.abs().max()) > 1e-3
        if attn is not None and mlp is not None and kind not in UNSUMMED:
            assert float((scalar * (pre + attn + mlp) - post).abs().max()) < 1e-5
            assert float(mlp.abs().max()) > 1e-3
            summed += 1
    assert summed == (0 if kind in UNSUMMED else len(scalars))


def test_parts_sum_to_the_logits(kind):
    model, inputs, logits = drawn(kind)
    if kind in UNSUMMED:
        with pytest.raises(ModelLoadError, match=UNSUMMED[kind]):
            cl.direct_logit_attribution(model, inputs, (11, 12))
        return
    read = cl.direct_logit_attribution(model, inputs, (11, 12))
    own = float(logits[11] - logits[12])
    errors = [
        float(read.difference) - own,
        float(read.total) - own,
        float(read.edits.abs().max()),
        float((read.image.sum(dim=-1) + read.elsewhere - read.heads).abs().max()),
    ]
    heads, image = float(read.heads.abs().max()), float(read.image.abs().max())
    print(f"{kind}: errors {max(map(abs, errors)):.1e}, heads {heads:.3f}, image {image:.4f}")
    assert max(map(abs, errors)) < 2e-5
    assert heads > 0.01 and image > 1e-3
    others = [i for i in range(len(read.mlps)) if i not in read.layers]
    assert bool((read.mixers[others].abs() > 1e-4).all())
    assert not read.mixers[list(read.layers)].any()


def all_but():
    """Return which families have an attribution, in words."""
    sums = [f"`{kind}` ({words})" for kind, words in UNSUMMED.items() if kind in PROVEN]
    return f"works in {len(PROVEN) - len(sums)} of {len(PROVEN)}: all but {', '.join(sums)}"


def table():
    """Return the table of docs/activations.md."""
    rows = {WHOLE: []}
    for kind in sorted(PROVEN):
        found = find_family(tiny.tiny_model(kind)).activations(tiny.tiny_model(kind)).missing
        for one in found:
            some = "" if one.layers is None else "in some layers, "
            words = f"no `{'`, `'.join(one.names)}`: {some}{one.reason}"
            rows.setdefault(words, []).append(kind)
        if not found:
            rows[WHOLE].append(kind)
    lines = [
        f"| {words} | {', '.join(f'`{one}`' for one in kinds)} |" for words, kinds in rows.items()
    ]
    return "\n".join(["| | model types |", "|---|---|", *lines])


def test_what_is_missing_is_said(kind):
    model, inputs, _ = drawn(kind)
    activations = find_family(model).activations(model)
    names = {place.name for place in activations.places}
    for one in activations.missing:
        for layer in one.layers or range(len(decoder_of(model).layers)):
            for stem in one.names:
                start = f"blocks.{layer}.{stem}"
                assert not any(name == start or name.startswith(f"{start}.") for name in names)
    if activations.missing:
        one = activations.missing[0]
        asked = f"blocks.{(one.layers or (0,))[0]}.{one.names[0]}"
        with pytest.raises(UnknownName, match=re.escape(one.reason)):
            run_with_cache(model, inputs, asked)


def test_docs_show_what_is_missing():
    """The table is that of one version, which it names."""
    docs = (Path(__file__).parents[2] / "docs" / "activations.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"transformers (\d+\.\d+)", docs)
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"un-skip with transformers {version}")
    assert table() in docs
    assert all_but() in " ".join(docs.split())


@pytest.mark.parametrize("kind", sorted({"gemma3", "granite_docling", "qwen3_5"} & set(PROVEN)))
def test_a_patch_with_itself_changes_nothing(kind):
    """Also where what is added to the stream is not what a module puts out."""
    model, inputs, logits = drawn(kind)
    other = tiny.sample(kind, 1)
    names = ("hook_attn_out", "hook_mlp_out", "hook_resid_post", "hook_z")
    caches = [
        run_with_cache(model, one, lambda name: name.endswith(names)).cache
        for one in (inputs, other)
    ]
    for part in ("attn_out", "mlp_out", "resid_post", "z"):
        moved = []
        for source, cache_ in zip((inputs, other), caches, strict=True):
            source = Prompt(source, {"decoder": spans_of(model, source)}, False, (), (), None)
            patch = cl.PatchActivations(source=source, cache=cache_, part=part, span="text")
            if part == "z" and kind == "qwen3_5":
                with pytest.raises(ParameterError, match=r"by gates.*part='attn_out'"):
                    cl.intervening(model, patch).__enter__()
                continue
            with torch.inference_mode(), cl.intervening(model, patch):
                moved.append(float((model(**inputs).logits[0, -1] - logits).abs().max()))
        if moved:
            print(f"{kind}, {part}: {moved[0]:.1e}, another prompt's {moved[1]:.3f}")
            assert moved[0] < 1e-5 and moved[1] > 1e-2


def spans_of(model, inputs):
    return VisualTokens(find_family(model).spans(model, "decoder", inputs), "none is looked at")


def test_what_stands_between_is_found():
    """Here a hook of somebody's; the lens would be of other logits than the model's."""
    model, inputs, _ = drawn("internvl")
    hook = model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    try:
        with pytest.raises(ModelLoadError, match=r"differs by .* so something else stands between"):
            cl.logit_lens(model, inputs)
    finally:
        hook.remove()


class Editing(Session):
    """Keeps the logits, and puts others in their place."""

    site = "decoder"
    edits_logits = True

    def __init__(self, edit):
        self.edit, self.seen = edit, None

    def logits(self, step, logits):
        self.seen = logits
        return self.edit(logits)


@pytest.mark.parametrize(
    "kind", sorted({"gemma4", "granite_docling", "hyperclovax_vision_v2", "internvl"} & set(PROVEN))
)
def test_methods_edit_the_logits_that_the_model_has(kind):
    """Not what its unembedding puts out, where a factor or a cap comes after it."""
    model, inputs, logits = drawn(kind)
    halving = Editing(lambda one: 0.5 * one)
    with torch.no_grad(), running(model, [halving]):
        halved = model(**inputs).logits[0, -1]
    torch.testing.assert_close(halving.seen[0], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(halved, 0.5 * logits, rtol=0, atol=2e-5)
    assert float(logits.abs().max()) > 0.5
    cutting = Editing(lambda one: one.masked_fill(one < one.max(), -torch.inf))
    with torch.no_grad(), running(model, [cutting]):
        if kind == "gemma4":
            with pytest.raises(InterventionError, match=r"caps its logits at ±5\.0"):
                model(**inputs)
        else:
            assert int(model(**inputs).logits[0, -1].isfinite().sum()) == 1
