"""nnsight traces: the same numbers as around plain code, wherever one reads."""

import nnsight
import pytest
import reference
import torch
from nnsight.modeling.transformers import TransformersModel
from tiny_models import make_processor, tiny_model

import clva_lens as cl

STEPS = 4
METHOD = cl.CLVA(tau=1.0)
ATOL = 1e-6


def around(model, inputs, *methods):
    """Return the logits of plain transformers code inside intervening()."""
    with torch.inference_mode(), cl.intervening(model, *methods) as run:
        logits = model(**inputs).logits
    return logits, run


@pytest.fixture
def expected(lens, ask):
    """(plain, edited) logits; they differ, so that agreement means something."""
    inputs = ask(lens).inputs
    plain, _ = around(lens.hf_model, inputs)
    edited, _ = around(lens.hf_model, inputs, METHOD)
    moved = gap(edited, plain)
    print(f"effect {moved:.3f}")
    assert moved > 0.05
    return plain, edited


def gap(one, other):
    return float((one - other).detach().abs().max())


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


def test_trace(lens, ask, expected):
    prompt = ask(lens)
    with lens.trace(prompt):
        run = cl.intervene(METHOD)
        logits = lens.output.logits.save()
    same(logits, expected[1])
    _, plain_run = around(lens.hf_model, prompt.inputs, METHOD)
    assert torch.equal(run.anchors.positive, plain_run.anchors.positive)
    assert torch.equal(run.anchors.negative, plain_run.anchors.negative)
    with lens.trace(prompt):
        logits = lens.output.logits.save()
    assert torch.equal(logits, expected[0])


def test_keyword_inputs(lens, ask, expected):
    with lens.trace(**ask(lens).inputs):
        cl.intervene(METHOD)
        logits = lens.output.logits.save()
    same(logits, expected[1])


def test_bare_nnsight(lens, ask, expected):
    handle = nnsight.NNsight(lens.hf_model)
    with handle.trace(**ask(lens).inputs):
        cl.intervene(METHOD)
        logits = handle.output.logits.save()
    same(logits, expected[1])


def test_transformers_model(lens, ask, expected):
    handle = TransformersModel(
        lens.hf_model,
        task="image-text-to-text",
        processor=lens.processor,
        tokenizer=lens.processor.tokenizer,
    )
    with handle.trace(**ask(lens).inputs):
        cl.intervene(METHOD)
        logits = handle.output.logits.save()
    same(logits, expected[1])


def test_reads_at_early_and_late_layers(lens, ask, expected):
    """Layers up to the anchors are as without the method, later ones are not."""
    decoder = lens.model.language_model
    with lens.trace(ask(lens)):
        early = decoder.layers[1].output.save()
        late = decoder.layers[8].output.save()
    with lens.trace(ask(lens)):
        cl.intervene(METHOD)
        edited_early = decoder.layers[1].output.save()
        edited_late = decoder.layers[8].output.save()
        logits = lens.output.logits.save()
    same(logits, expected[1])
    assert torch.equal(early, edited_early)
    assert gap(late, edited_late) > 1e-3


def test_writes_after_intervene(lens, ask, expected):
    """A layer that the user overwrites is overwritten under the method, too."""
    decoder = lens.model.language_model
    with lens.trace(ask(lens)):
        cl.intervene(METHOD)
        decoder.layers[3].output[:, :, :16] = 0
        zeroed = lens.output.logits.save()
    with lens.trace(ask(lens)):
        decoder.layers[3].output[:, :, :16] = 0
        zeroed_plain = lens.output.logits.save()
    assert gap(zeroed, expected[1]) > 0.05
    assert gap(zeroed, zeroed_plain) > 0.05


def test_attention_module_output_is_the_references(lens, exact, ask):
    """The text rows' output of an edited attention module is that of the rewritten pattern."""
    prompt = ask(lens)
    attention = lens.model.language_model.layers[11].self_attn
    with lens.trace(prompt):
        cl.intervene(METHOD)
        value = attention.v_proj.output.save()
        mixed = attention.o_proj.input.save()
    ids, pixels, _ = reference.rows_of(prompt.inputs, 0)
    pattern = reference.run(exact, ids, pixels, [reference.Clva(tau=1.0)]).patterns[11].float()
    value = value[0].reshape(len(ids), -1, 8).repeat_interleave(4 // (value.shape[-1] // 8), dim=1)
    wanted = torch.einsum("hqk,khd->qhd", pattern, value).reshape(len(ids), 32)
    torch.testing.assert_close(mixed[0], wanted, rtol=0, atol=1e-4)


def test_observe_before_and_after(lens, ask):
    """observe() shows attention under the methods that were opened before it, not after."""
    prompt = ask(lens)
    with lens.trace(prompt):
        before = cl.observe(layers=(4, 8))
        cl.intervene(cl.KnockOut(layers=(8,)))
        after = cl.observe(layers=(4, 8))
        lens.output.logits.save()
    assert before.trace.layers == after.trace.layers == (4, 8)
    same(before.trace.intensity[0], after.trace.intensity[0])
    assert not before.trace.intensity.requires_grad  # it does not keep the model's graph alive
    assert "AttentionTrace(decoder: 2 layers" in repr(before.trace)
    assert float(before.trace.intensity[1].min()) > 0.01
    assert float(after.trace.intensity[1].max()) == 0.0
    # What is behind the edited layer is seen under the edit by both.
    with lens.trace(prompt):
        before = cl.observe(layers=(9,))
        cl.intervene(cl.KnockOut(layers=(8,)))
        after = cl.observe(layers=(9,))
        lens.output.logits.save()
    same(before.trace.intensity, after.trace.intensity)


def test_two_interventions_in_one_trace(lens, ask):
    first, second = cl.CLVA(tau=1.0, layers=(5, 6)), cl.KnockOut(layers=(9,))
    inputs = ask(lens).inputs
    wanted, _ = around(lens.hf_model, inputs, first, second)
    for only in (first, second):
        assert gap(around(lens.hf_model, inputs, only)[0], wanted) > 0.01
    with lens.trace(ask(lens)):
        run = cl.intervene(first)
        other = cl.intervene(second)
        logits = lens.output.logits.save()
    same(logits, wanted)
    assert run.anchors.positive_layer == 4
    with pytest.raises(cl.ClvaLensError, match=r"none of its methods is CLVA"):
        _ = other.anchors
    with lens.trace(ask(lens)):
        cl.intervene(first, second)
        together = lens.output.logits.save()
    same(together, wanted)


def test_trace_inside_intervening(lens, ask, expected):
    """A trace within the block of intervening() joins its run, and leaves it open."""
    with cl.intervening(lens.hf_model, METHOD):
        with lens.trace(ask(lens)):
            seen = cl.observe(layers=(5,))
            logits = lens.output.logits.save()
        with torch.inference_mode():
            again = lens.hf_model(**ask(lens).inputs).logits
    same(logits, expected[1])
    same(again, expected[1])
    assert seen.trace.intensity.shape == (1, 4)


def test_handles_around_plain_code(lens, ask, expected):
    """intervening(), observing() and trace_attention() take handles as well as the model."""
    inputs = ask(lens).inputs
    for handle in (lens, nnsight.NNsight(lens.hf_model)):
        same(around(lens.hf_model, inputs)[0], expected[0])
        with torch.inference_mode(), cl.intervening(handle, METHOD):
            same(lens.hf_model(**inputs).logits, expected[1])
        with torch.inference_mode(), cl.observing(handle, layers=(3,)) as seen:
            lens.hf_model(**inputs)
        trace = cl.trace_attention(handle, ask(lens), METHOD)
        same(trace.intensity[3], seen.trace.intensity[0])
        same(trace.logits, expected[1][0, -1])


def test_generate(lens, ask):
    inputs = ask(lens).inputs
    with torch.inference_mode(), cl.intervening(lens.hf_model, METHOD):
        wanted = lens.hf_model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    with torch.inference_mode():
        plain = lens.hf_model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    with lens.generate(ask(lens), max_new_tokens=STEPS, do_sample=False) as tracer:
        cl.intervene(METHOD)
        ids = tracer.result.save()
    assert torch.equal(ids, wanted)
    with lens.generate(ask(lens), max_new_tokens=STEPS, do_sample=False) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, plain)


def test_logits_of_every_step_of_a_generation(lens, ask):
    """Reads of each step inside ``model.generate`` are those of plain generate()."""
    inputs = ask(lens).inputs
    options = {"max_new_tokens": STEPS, "do_sample": False}
    with torch.inference_mode(), cl.intervening(lens.hf_model, METHOD):
        out = lens.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    steps = []
    with lens.generate(ask(lens), **options) as tracer:
        cl.intervene(METHOD)
        seen = cl.observe(layers=(5, 6))
        steps = nnsight.save([])
        for _ in tracer.iter[0:STEPS]:
            steps.append(lens.lm_head.output[:, -1])
    assert len(steps) == STEPS
    for found, wanted in zip(steps, out.logits, strict=True):
        same(found, wanted)
    assert [tuple(step.shape) for step in seen.steps] == [(2, 1, 4, 1, 16)] * (STEPS - 1)


def test_nnsight_generate_on_a_bare_handle(lens, ask):
    inputs = ask(lens).inputs
    with torch.inference_mode(), cl.intervening(lens.hf_model, METHOD):
        wanted = lens.hf_model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    handle = nnsight.NNsight(lens.hf_model)
    with handle.trace(**inputs, max_new_tokens=STEPS, do_sample=False, fn="generate") as tracer:
        cl.intervene(METHOD)
        ids = tracer.result.save()
    assert torch.equal(ids, wanted)


def test_separate_invoke(lens, ask, expected):
    """The method may be opened in one invoke and the values be read in another."""
    with lens.trace() as tracer:
        with tracer.invoke(**ask(lens).inputs):
            cl.intervene(METHOD)
            early = lens.model.language_model.layers[0].output.save()
        with tracer.invoke():
            logits = lens.output.logits.save()
    same(logits, expected[1])
    assert early.shape[-1] == 32


def test_edit(lens, ask, expected):
    """An edited model applies the method in every trace; the one it was made from does not."""
    with lens.edit() as (_, edited):
        cl.intervene(METHOD)
    for _ in range(2):
        with edited.trace(ask(lens)):
            logits = edited.output.logits.save()
        same(logits, expected[1])
    with lens.trace(ask(lens)):
        logits = lens.output.logits.save()
    assert torch.equal(logits, expected[0])


def test_stop(lens, ask, expected):
    """After tracer.stop() nothing of the method is left."""
    with lens.trace(ask(lens)) as tracer:
        cl.intervene(METHOD)
        hidden = lens.model.language_model.layers[6].output.save()
        tracer.stop()
    assert hidden.shape[-1] == 32
    with torch.inference_mode():
        assert torch.equal(lens.hf_model(**ask(lens).inputs).logits, expected[0])


def test_gradients_flow_under_a_method(ask):
    """The bias is a constant: the rest of the model can still be differentiated."""
    lens = cl.load((tiny_model(), make_processor()))
    weight = lens.hf_model.model.language_model.layers[2].self_attn.v_proj.weight
    with cl.intervening(lens.hf_model, METHOD):
        lens.hf_model(**ask(lens).inputs).logits[:, -1].sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0
