"""What is refused, and in which words; and what is a counted no-op instead of an error."""

import nnsight
import pytest
import torch
from tiny_models import picture, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError, SpanError
from clva_lens.models.kv_cache import CACHE, cache_of

METHOD = cl.CLVA(tau=1.0)


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


# ── at the wrong place or time ──


@pytest.mark.parametrize("call", [lambda: cl.intervene(METHOD), cl.observe])
def test_outside_a_trace(call):
    with pytest.raises(
        InterventionError, match=r"called outside a trace.*cl\.(intervening|observing)\(model"
    ):
        call()


@pytest.mark.parametrize("what", ["intervene", "observe"])
def test_after_the_model_started(one, ask, what):
    with (
        pytest.raises(InterventionError, match=f"cl.{what}.*after the model started"),
        one.trace(ask(one)),
    ):
        one.model.language_model.layers[0].output.save()
        cl.intervene(METHOD) if what == "intervene" else cl.observe()


def test_inside_a_loop_over_steps(one, ask):
    with (
        pytest.raises(InterventionError, match=r"after the model started"),
        one.generate(ask(one), max_new_tokens=3) as tracer,
    ):
        for _ in tracer.iter[0:2]:
            one.lm_head.output.save()
            cl.intervene(METHOD)


def test_started_after_the_prompt_was_read(one, ask):
    """A filled cache, whose image tokens nobody saw."""
    inputs = ask(one).inputs
    with torch.inference_mode():
        cache = cache_of(one.hf_model(**inputs, use_cache=True))
        with (
            cl.intervening(one.hf_model, METHOD),
            pytest.raises(InterventionError, match=r"already had a filled key-value cache"),
        ):
            one.hf_model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_another_batch_on_the_same_cache(one, ask):
    with torch.inference_mode(), cl.intervening(one.hf_model, METHOD):
        cache = cache_of(one.hf_model(**ask(one).inputs, use_cache=True))
        cache.batch_repeat_interleave(2)
        with pytest.raises(InterventionError, match=r"another batch"):
            one.hf_model(input_ids=torch.tensor([[7], [8]]), **{CACHE: cache})


def test_results_before_the_run(one):
    with (
        cl.intervening(one.hf_model, METHOD) as run,
        pytest.raises(InterventionError, match=r"anchors are not known yet"),
    ):
        _ = run.anchors
    with cl.observing(one.hf_model) as seen:
        with pytest.raises(InterventionError, match=r"attention is not known yet"):
            _ = seen.trace
        assert seen.steps == []


def test_anchors_of_a_run_without_clva(one, ask):
    with torch.inference_mode(), cl.intervening(one.hf_model, cl.KnockOut()) as run:
        one.hf_model(**ask(one).inputs)
    with pytest.raises(InterventionError, match=r"none of its methods is CLVA"):
        _ = run.anchors
    assert "KnockOutSession" in repr(run)


# ── on the wrong inputs ──


def test_no_image_tokens(one):
    ids = torch.tensor([[1, 8, 9, 10]])
    with (
        cl.intervening(one.hf_model, METHOD),
        pytest.raises(InterventionError, match=r"no image tokens.*model.prompt"),
    ):
        one.hf_model(input_ids=ids)


def test_one_of_a_batch_without_image_tokens(one, ask):
    inputs = dict(ask(one, 2).inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1][inputs["input_ids"][1] == 5] = 8
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with (
        cl.intervening(one.hf_model, METHOD),
        pytest.raises(SpanError, match=r"item 1 of the batch has 0 image tokens"),
    ):
        one.hf_model(**inputs)


def test_no_text_after_the_image(one, ask):
    inputs = dict(ask(one).inputs)
    stop = int((inputs["input_ids"][0] == 5).nonzero()[-1]) + 1
    inputs |= {name: inputs[name][:, :stop] for name in ("input_ids", "attention_mask")}
    with (
        cl.intervening(one.hf_model, METHOD),
        pytest.raises(InterventionError, match=r"ends with its image"),
    ):
        one.hf_model(**inputs)


def test_embeddings_only(one, ask):
    embeddings = one.hf_model.get_input_embeddings()(ask(one).inputs["input_ids"])
    with (
        cl.intervening(one.hf_model, METHOD),
        pytest.raises(InterventionError, match=r"inputs_embeds only.*Pass input_ids"),
    ):
        one.hf_model(inputs_embeds=embeddings)


# ── on the wrong model ──


@pytest.mark.parametrize("name", ["flash_attention_4", "somebody_elses"])
def test_kernel_that_cannot_be_intercepted(name):
    model = tiny_model()
    model.model.language_model.config._attn_implementation_internal = name
    with (
        pytest.raises(InterventionError, match=f"kernel '{name}'.*attn_implementation='sdpa'"),
        cl.intervening(model, METHOD),
    ):
        pass
    assert model.model.language_model.config._attn_implementation == name


def test_unknown_model(llama):
    with (
        pytest.raises(ModelLoadError, match=r"LlamaForCausalLM belongs to no model family.*llava"),
        cl.intervening(llama, METHOD),
    ):
        pass
    with pytest.raises(ModelLoadError, match=r"LlamaForCausalLM belongs to no model family"):
        cl.load((llama, None))
    handle = nnsight.NNsight(llama)
    with (
        pytest.raises(ModelLoadError, match=r"belongs to no model family"),
        handle.trace(torch.tensor([[1, 2]])),
    ):
        cl.intervene(METHOD)


def test_not_a_transformers_model():
    with pytest.raises(ModelLoadError, match=r"Linear belongs to no model family"):
        cl.intervening(nn.Linear(1, 1), METHOD).__enter__()


def test_not_a_model_at_all(untyped):
    with pytest.raises(ModelLoadError, match=r"expected a transformers model.*got str"):
        cl.intervening("llava", METHOD).__enter__()


# ── parameters ──


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1.5}, r"1 \+ α = -0.5 with α = -1.5"),
        ({"beta": 1.1}, r"1 − β = -0.1.*beta <= 1"),
        ({"alpha": -0.8, "beta": 0.9}, r"1 \+ α − β = -0.7"),
        ({"alpha": float("nan")}, "must be finite"),
        ({"beta": float("inf")}, "must be finite"),
        ({"tau": float("nan")}, "tau must be a finite number >= 0, but is nan"),
        ({"tau": -1.0}, "tau must be a finite number >= 0, but is -1.0"),
        ({"head_threshold": -1.0}, "threshold must be a finite number.*-1"),
    ],
)
def test_clva_out_of_range(parameters, message):
    with pytest.raises(ParameterError, match=message):
        cl.CLVA(**parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cl.CLVA(rows="image"), "rows must be 'text' or 'last', but is 'image'"),
        (lambda: cl.CLVA(refresh="never"), "refresh must be 'step' or 'prompt'.*'never'"),
        (lambda: cl.CLVA(empty="all"), "empty must be 'tail' or 'skip', but is 'all'"),
        (lambda: cl.KnockOut(rows="all"), "rows must be 'text' or 'last', but is 'all'"),
    ],
)
def test_unknown_choice(untyped, make, message):
    with pytest.raises(ParameterError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (cl.CLVA(positive_layer=12), "positive_layer names layer 12.*layers 0 to 11"),
        (cl.CLVA(negative_layer=-1), "negative_layer names layer -1"),
        (cl.CLVA(layers=(5, 12)), "layers names layer 12"),
        (
            cl.CLVA(layers=(4, 5)),
            r"layers names layer 4.*anchors are read at layers 0 and 4.*from 5",
        ),
        (cl.CLVA(negative_layer=8, layers=(7,)), "only later layers can be edited.*from 9 on"),
        (cl.KnockOut(layers=(12,)), "layers names layer 12"),
        (
            cl.CLVA(heads=cl.HeadClasses.from_indices({0: [1]}, {0: [0]}, layers=2, heads=4)),
            r"heads is for \(2, 4\).*has \(12, 4\).*layers=12, heads=4",
        ),
    ],
)
def test_does_not_fit_the_model(one, ask, method, message):
    with pytest.raises(ParameterError, match=message), cl.intervening(one.hf_model, method):
        pass
    with pytest.raises(ParameterError, match=message):
        cl.generate(one, ask(one), method)
    with pytest.raises(ParameterError, match=message), one.trace(ask(one)):
        cl.intervene(method)


def test_head_that_does_not_exist():
    with pytest.raises(ParameterError, match=r"names head 4 of layer 0.*heads are 0 to 3"):
        cl.HeadClasses.from_indices({0: [4]}, {}, layers=12, heads=4)


def test_a_method_that_joins_after_the_prompt(lens, ask):
    """The run knows the prompt, but CLVA did not see its rows: it says so, and the run goes on."""
    model, inputs = lens.hf_model, ask(lens).inputs
    with torch.inference_mode(), cl.intervening(model, cl.KnockOut(layers=[9])):
        cache = cache_of(model(**inputs, use_cache=True))
        token = inputs["input_ids"][:, -1:]
        with (
            cl.intervening(model, METHOD),
            pytest.raises(cl.ClvaLensError, match=r"read already.* Start it before the prompt"),
        ):
            model(input_ids=token, **{CACHE: cache})


# ── counted no-ops ──


def test_empty_masks_are_a_counted_no_op(lens, ask):
    """Hardly any map has a token 3.86 σ out among 16: nothing is edited, and it is said so."""
    inputs = ask(lens, 3).inputs
    with torch.inference_mode():
        plain = lens.hf_model(**inputs).logits
        with cl.intervening(lens.hf_model, cl.CLVA(tau=3.86)) as run:
            found = lens.hf_model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], plain[real], rtol=0, atol=1e-4)
    assert run.anchors.empty_positive == 3
    assert run.anchors.empty_negative == 3
    assert "empty masks: 3 positive, 3 negative" in repr(run.anchors)


def test_a_threshold_that_nothing_can_exceed_is_refused(lens, ask):
    """One of 16 values is at most √15 = 3.873 population standard deviations above their mean."""
    for tau in (3.8730, 50.0):
        with (
            torch.inference_mode(),
            cl.intervening(lens.hf_model, cl.CLVA(tau=tau)),
            pytest.raises(
                cl.ClvaLensError, match=r"at most 3\.87, so both anchors .* Pass tau below"
            ),
        ):
            lens.hf_model(**ask(lens, 3).inputs)


def test_skipped_head_sets_are_counted(lens, ask):
    """With λ = 10 no head is selected: "skip" leaves the anchors empty, "tail" fills them."""
    inputs = ask(lens, 3).inputs
    anchors = {}
    for empty in ("skip", "tail"):
        method = cl.CLVA(tau=1.0, head_threshold=10.0, empty=empty)
        with torch.inference_mode(), cl.intervening(lens.hf_model, method) as run:
            lens.hf_model(**inputs)
        anchors[empty] = run.anchors
        assert run.anchors.heads.sensitive_fallback[:, 4].all()
        assert run.anchors.heads.insensitive_fallback[:, 0].all()
        assert not run.anchors.heads.sensitive_fallback[:, 1:4].any()
    assert anchors["skip"].empty_positive == anchors["skip"].empty_negative == 3
    assert not anchors["skip"].heads.sensitive.any()
    assert anchors["tail"].empty_positive == anchors["tail"].empty_negative == 0
    assert int(anchors["tail"].heads.sensitive[:, 4].sum()) == 3


def test_anchors_of_one_prompt_have_no_batch_axis(one, ask):
    with torch.inference_mode(), cl.intervening(one.hf_model, METHOD) as run:
        one.hf_model(**ask(one).inputs)
    assert run.anchors.positive.shape == run.anchors.positive_map.shape == (16,)
    assert run.anchors.heads.sensitive.shape == (12, 4)
    assert (run.anchors.positive_layer, run.anchors.negative_layer) == (4, 0)
    assert run.anchors.heads.sensitive[4].any()
    assert run.anchors.heads.insensitive[0].any()


def test_scan_is_left_alone(one, ask):
    """nnsight's scan runs on fake tensors: no attention to read, and no error."""
    with one.scan(**ask(one).inputs):
        cl.intervene(METHOD)
        shape = nnsight.save(one.output.logits.shape)
    assert tuple(shape)[-1] == 64


def test_picture_is_not_empty():
    """The fixtures' pictures differ, so that "another image" means something."""
    assert picture(0).std() > 10
    assert (picture(0) != picture(1)).mean() > 0.5
