"""What heads look at, and what they put out, read in passes of its own: no trace is needed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.parameters import check_several
from clva_lens.lens.attention_trace import AttentionTrace, HeadChoice
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.observers import Observer, QueryObserver
from clva_lens.methods.ablation import HeadMeans, MeanSession, ZRows
from clva_lens.methods.base import MethodLike
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt, readable
from clva_lens.science.heads import SomeHeads


@undisturbed()
def trace_attention(
    model: Any,
    prompt: Asked,
    method: MethodLike | None = None,
    *,
    layers: Sequence[int] | str = "all",
    site: str | None = None,
    each_row: bool = False,
) -> AttentionTrace:
    """Return what each head's text rows look at, from one forward pass under ``method``.

    Rows of the pattern are formed for the text rows only, one layer at a time, and reduced at
    once. The trace has a batch axis if the prompt was made from lists; its ``logits`` are those of
    the last position.

    Args:
        model: what ``cl.load`` returned, or a transformers model.
        prompt: what is asked.
        method: what acts meanwhile.
        layers: 0-based, or "all".
        site: "decoder" or, in a model with a Q-Former, "qformer"; None is the family's own.
        each_row: keep the map of each text row too, in ``trace.rows``, for
            ``trace.draw_image(prompt, tokens=...)``. With 32 × 32 heads and 576 image tokens that
            is 2.25 MiB a row.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if the site or a layer does not exist, the method does not fit, or each row
            is wanted of a site whose rows are no words.
        InterventionError: inside a trace; use ``observe`` there.

    >>> attn = cl.trace_attention(model, prompt)
    >>> attn.intensity.shape, attn.saliency("sensitive").shape
    (torch.Size([12, 8]), torch.Size([12, 64]))
    """
    refuse_in_trace("trace_attention", ", or cl.observe() in it")
    found, prompt = transformers_model(model), as_prompt(model, prompt, continued=True)
    observer = Observer(layers, shape_of(found, site), each_row=each_row)
    with intervening(model, method), running(found, [observer]):
        logits = last_logits(found, prompt)
    trace = observer.trace(prompt.batched, logits)
    words = getattr(model, "words", None)
    if trace.rows is None or words is None:
        return trace
    ids = prompt["input_ids"][:, -trace.rows.shape[-2] :].tolist()
    return replace(trace, words=tuple(tuple(words.decode([one]) for one in row) for row in ids))


@undisturbed()
def composed_saliency(
    model: Any,
    prompt: Asked,
    method: MethodLike | None = None,
    *,
    heads: HeadChoice | SomeHeads = "all",
    layers: Sequence[int] | str = "all",
    qformer_layers: Sequence[int] | str = "all",
) -> Float[Tensor, "*batch layer visual"]:
    """Return where on the picture the language model looks, for each layer of the decoder.

    Where a Q-Former reads the picture, the decoder's image tokens lie nowhere. Its attention to
    each of them (Eq. 4 of arXiv:2603.25088v1, over ``heads``) is passed on to the patches that
    their queries look at, averaged over the heads and over ``qformer_layers``. What mixes the
    queries otherwise (self-attention, residual stream) is left out. In other models it is the
    decoder's saliency map itself. Fractions of attention mass, in [0, 1].

    ``model``: what ``cl.load`` returned, or a transformers model; ``prompt``: what is asked;
    ``method``: what acts meanwhile; ``layers``: of the decoder, 0-based, or "all".

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if a layer does not exist, or the method does not fit the model.
        InterventionError: inside a trace; use ``observe`` of each site there.

    >>> blip = cl.load("toy-instructblip")
    >>> asked = blip.prompt(image, "is there a cup in the image?")
    >>> asked.on_grid(cl.composed_saliency(blip, asked)).shape
    torch.Size([6, 8, 8])
    """
    refuse_in_trace("composed_saliency", ", or cl.observe() in it")
    found, prompt = transformers_model(model), as_prompt(model, prompt)
    target = Target(found)
    decoder = Observer(layers, target.at("decoder"))
    queries = None
    if target.at().site != "decoder":
        queries = QueryObserver(qformer_layers, target.at())
    observers: list[Session] = [decoder] if queries is None else [decoder, queries]
    with intervening(model, method), running(found, observers):
        last_logits(found, prompt)
    saliency = decoder.trace(prompt.batched).saliency(heads)
    if queries is None:
        return saliency
    looks = queries.maps().mean(dim=1)
    return saliency @ (looks if prompt.batched else looks[0])


@undisturbed()
def head_means(
    model: Any,
    prompts: Sequence[Asked],
    method: MethodLike | None = None,
    *,
    rows: ZRows = "text",
    site: str | None = None,
) -> HeadMeans:
    """Return the mean output z of each head over rows of prompts, for ``AblateHeads``.

    Each prompt (which may be a batch) is read once, under ``method``; only sums are kept. ``rows``
    are those of the prompt: all text after the image, the "last", or "all". In the units of the
    values, before the output projection.

    ``model``: what ``cl.load`` returned, or a transformers model; ``prompts``: what is read;
    ``site``: where; None is the family's own.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if the site does not exist, the method does not fit, or there is no prompt.
        InterventionError: inside a trace: it reads prompts of its own, so make the means before,
            and open ``AblateHeads(mode="mean", reference=means)`` there.

    >>> usual = cl.head_means(model, [prompt])
    >>> cl.generate(model, prompt, cl.AblateHeads(mode="mean", reference=usual)).texts
    ['no']
    """
    refuse_in_trace("head_means", "")
    check_several("prompts", prompts, "prompts")
    found = transformers_model(model)
    session = MeanSession(shape_of(found, site), rows)
    for prompt in prompts:
        with intervening(model, method), running(found, [session]):
            last_logits(found, as_prompt(model, prompt))
    return session.means()


def last_logits(model: PreTrainedModel, prompt: Prompt) -> Float[Tensor, "batch vocabulary"]:
    """Return the logits of a prompt's last position, from one pass."""
    # An encoder-decoder's decoder has read one token only.
    keep: dict[str, Any] = {} if "decoder_input_ids" in prompt else {"logits_to_keep": 1}
    keep["use_cache"] = prompt.reader is not None
    with readable(prompt):
        return model(**prompt, **keep).logits[:, -1]
