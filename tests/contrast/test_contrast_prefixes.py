"""Second inputs whose picture was read before the questions: whole = read once, as for the first.

A second input goes on from a beginning of its own, which is read once for all questions and runs
that want the same one, and never stands in for another. So does what VisFlow asks of the picture.
"""

import copy
import gc
import threading
import weakref
from dataclasses import replace

import contrasting
import pytest
import torch
from test_contrast_reference import TextGuidance
from tiny_models import QUESTIONS, lens_of, make_processor, picture, tiny_model
from torch.nn import functional

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, PromptError
from clva_lens.lens import patch_sweep
from clva_lens.lens.prefix import read
from clva_lens.lens.sharing import why_unshared
from clva_lens.models.beginning import KEPT
from clva_lens.models.kv_cache import CACHE

STEPS = 3
DISTURB = cl.ICD(instruction=contrasting.DISTURBING)
METHODS = {
    "VCD": cl.VCD(noise_step=400),
    "ICD": DISTURB,
    "IMCCD": cl.IMCCD(alpha=1.0),
    "IMCCD, gated": cl.IMCCD(alpha=1.0, gate="first"),
    "CDAR alone": cl.IMCCD(alpha=0.0),
    "guidance": TextGuidance(),
    "PAI": cl.PAI(alpha=0.5, guidance=1.7),
    "VisFlow": cl.VisFlow(),
    "VisFlow, shuffled": cl.Shuffled(cl.VisFlow()),
    "CLVA and VCD": cl.compose(cl.CLVA(tau=1.0), cl.VCD(noise_step=400)),
    "VisFlow and ICD": cl.compose(cl.VisFlow(), DISTURB),
}
DECODINGS = {
    "greedy": cl.Greedy(max_new_tokens=STEPS),
    "beam": cl.Beam(num_beams=3, max_new_tokens=STEPS),
    "sampling": cl.Sampling(seed=3, max_new_tokens=STEPS),
}
every_method = pytest.mark.parametrize("name", METHODS)
OWNERS = [0, 1, 1, 0]
ASKED = [*QUESTIONS[:2], *reversed(QUESTIONS[:2])]


@pytest.fixture(params=[("full", "sdpa"), ("grouped", "eager")], ids="-".join)
def lens(request):
    return lens_of(*request.param)


def written(lens, inputs, method, **options):
    """Return the tokens and the logits of every step."""
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(lens, *([] if method is None else [method])):
        out = lens.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, dim=1)


def apart(found, wanted):
    """The largest difference of logits; the same ones are cut off."""
    known = wanted.isfinite()
    assert torch.equal(found.isfinite(), known)
    return float((found - wanted)[known].abs().max())


@every_method
def test_every_step_is_that_of_the_whole_prompt(lens, name):
    """Questions of two lengths onto two pictures: padding stands before them."""
    method, pictures = METHODS[name], [picture(0), picture(1)]
    asked = read(lens, pictures).ask(ASKED, OWNERS)
    assert not asked["attention_mask"].bool().all()
    whole = lens.prompt([pictures[owner] for owner in OWNERS], ASKED)
    wanted, logits = written(lens, whole, method)
    _, plain = written(lens, whole, None)
    effect = (logits[:, 0] - plain[:, 0])[logits[:, 0].isfinite()].abs().max()
    for _ in range(2):  # what is made of a beginning is made once
        ids, found = written(lens, dict(asked), method)
        error = apart(found, logits)
        print(f"error {error:.1e}, effect {effect:.2g}")
        assert torch.equal(ids, wanted)
        assert error < 1e-4 < effect / 50


@pytest.mark.parametrize("name", ["VCD", "IMCCD, gated", "PAI", "VisFlow and ICD"])
@pytest.mark.parametrize("how", DECODINGS)
def test_answers_are_those_of_whole_prompts(name, how):
    """One picture, and batches that cut its questions anyhow; the prefix is one for all."""
    lens, method = lens_of("full", "sdpa"), METHODS[name]
    prefix, decoding = read(lens, picture(0)), DECODINGS[how]
    wanted = cl.generate(lens, [(picture(0), q) for q in QUESTIONS], method, decoding)
    given = [(prefix, q) for q in QUESTIONS]
    for size in (2, 3):
        found = cl.generate(lens, given, method, decoding, batch_size=size, progress=False)
        assert [one.tolist() for one in found.ids] == [one.tolist() for one in wanted.ids]
        assert found.margins == pytest.approx(wanted.margins, abs=1e-4)


@pytest.fixture
def towers(monkeypatch):
    """The number of pictures in each run of a vision tower, a twin's too."""
    conv2d, calls = functional.conv2d, []

    def counted(pictures, *args, **options):
        calls.append(len(pictures))
        return conv2d(pictures, *args, **options)

    assert why_unshared(lens_of("full", "sdpa"), None) is None  # the probe is not counted
    monkeypatch.setattr(functional, "conv2d", counted)
    return calls


def test_the_tower_runs_once_for_each_picture_that_is_seen(towers):
    """Counted over two batches: the prompt's own, and one more for each other beginning."""
    lens = lens_of("full", "sdpa")
    how = {"batch_size": 2, "progress": False, "decoding": cl.Greedy(max_new_tokens=2)}
    more = {"IMCCD": 0, "guidance": 0, "PAI": 0, "CDAR alone": 0, "IMCCD, gated": 0}
    for name, method in METHODS.items():
        towers.clear()
        prefix = read(lens, picture(0))
        for _ in range(2):
            cl.generate(lens, [(prefix, q) for q in QUESTIONS], method, **how)
        extra = {"VisFlow and ICD": 3}.get(name, more.get(name, 1))  # R of both, and the lead
        assert towers == [1] * (1 + extra), name


def test_another_noise_is_another_beginning():
    """Whatever else the prefix was asked under, and however often."""
    lens = lens_of("full", "sdpa")
    prefix = read(lens, picture(0))
    asked, whole = prefix.ask(QUESTIONS[0]), lens.prompt(picture(0), QUESTIONS[0])
    others = [cl.VCD(seed=seed, noise_step=step) for seed, step in ((0, 300), (0, 700), (1, 300))]
    others += [DISTURB, cl.ICD(instruction="see a car"), cl.IMCCD(alpha=1.0), cl.VisFlow()]
    wanted = [written(lens, whole, method)[1] for method in others]
    for place in (*range(len(others)), 0, 4, 3):
        assert apart(written(lens, dict(asked), others[place])[1], wanted[place]) < 1e-4
        assert len(prefix.beginning._made) <= KEPT
    first = [one[:, 0].masked_fill(one[:, 0].isinf(), -50) for one in wanted]
    pairs = [(a - b).abs().max() for i, a in enumerate(first) for b in first[:i]]
    assert min(pairs) > 0.05, "each is another one's"


def test_prompts_one_after_the_other_in_a_run():
    """Nothing of a question is left when the next is read: the gate's steps, above all."""
    lens = lens_of("full", "sdpa")
    prefixes = [read(lens, picture(number)) for number in range(4)]
    asked = [prefix.ask(QUESTIONS[0]) for prefix in prefixes]
    for name in ("IMCCD, gated", "VCD", "VisFlow"):
        with torch.inference_mode(), cl.intervening(lens, METHODS[name]):
            together = [lens.hf_model(**one).logits[:, -1] for one in asked]
        for one, found in zip(asked, together, strict=True):
            with torch.inference_mode(), cl.intervening(lens, METHODS[name]):
                assert torch.equal(lens.hf_model(**one).logits[:, -1], found), name


def test_a_picture_that_is_read_in_the_run(one):
    """The pass that reads it is nobody's business; a whole prompt is read as ever after it."""
    method, whole = METHODS["VCD"], one.prompt(picture(1), QUESTIONS[1])
    wanted = [written(one, one.prompt(picture(0), QUESTIONS[0]), method)[1][:, 0]]
    wanted.append(written(one, whole, method)[1][:, 0])
    with torch.inference_mode(), cl.intervening(one, method):
        asked = read(one, picture(0)).ask(QUESTIONS[0])
        found = [one.hf_model(**inputs).logits[:, -1] for inputs in (asked, whole)]
        features = one.hf_model.get_image_features(whole["pixel_values"], return_dict=True)
        read(one, picture(0))
        one.hf_model(**asked)  # what the tower saw for it is no pixels of the next prompt
        rest = {name: value for name, value in whole.items() if name != "pixel_values"}
        with pytest.raises(InterventionError, match="saw no pixels"):
            one.hf_model(**rest, mm_encoder_outputs={"image": features})
    for ours, theirs in zip(found, wanted, strict=True):
        assert apart(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["VCD", "ICD", "IMCCD", "guidance", "VisFlow"])
def test_a_cache_of_which_nobody_knows_what_it_was_read_from(one, name):
    """A fork that has gone on, or that a caller cut or filled, is no beginning."""
    method, prefix = METHODS[name], read(one, picture(0))
    asked = prefix.ask(QUESTIONS[0])
    with torch.inference_mode():
        cache, token = prefix.fork(), torch.full((1, 1), 20)
        with cl.intervening(one, cl.KnockOut()):
            one.hf_model(**asked.inputs, **{CACHE: cache})
            one.hf_model(input_ids=token, **{CACHE: cache})
        with (
            cl.intervening(one, method),
            pytest.raises(InterventionError, match="nobody knows what it was read from"),
        ):
            one.hf_model(input_ids=token.expand(1, 3), **{CACHE: cache})


def test_weights_that_changed_under_a_fork():
    lens = cl.load((tiny_model(), make_processor()), check=False)
    for method in (METHODS["VCD"], METHODS["IMCCD"], METHODS["VisFlow"]):
        given = dict(read(lens, picture(0)).ask(QUESTIONS[0]))
        with torch.no_grad():
            lens.hf_model.lm_head.weight.mul_(1.5)
        with cl.intervening(lens, method), pytest.raises(PromptError, match="Read it again"):
            lens.hf_model(**given)


def test_two_threads_with_a_prefix_of_theirs():
    lens = lens_of("full", "sdpa")
    prefix = read(lens, picture(0))
    methods = [cl.VCD(seed=0), cl.VCD(seed=1), cl.VisFlow()]
    whole, how = [(picture(0), q) for q in QUESTIONS], cl.Greedy(max_new_tokens=STEPS)
    alone = [cl.generate(lens, whole, method, how).ids for method in methods]
    found = [None] * len(methods)

    def answer(place):
        given = [(prefix, q) for q in QUESTIONS]
        found[place] = cl.generate(lens, given, methods[place], how).ids

    threads = [threading.Thread(target=answer, args=(place,)) for place in range(len(methods))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, alone, strict=True):
        assert [one.tolist() for one in ours] == [one.tolist() for one in theirs]


def test_what_is_made_of_a_prefix_ends_with_it():
    """It hangs on no module, and no cycle keeps it; it is ordinary tensors."""
    lens = lens_of("full", "sdpa")
    prefix = read(lens, picture(0))
    for name in ("VCD", "IMCCD", "VisFlow", "PAI"):
        written(lens, dict(prefix.ask(QUESTIONS[0])), METHODS[name])  # under inference_mode
    (noisy,) = [one for one in prefix.beginning._made.values() if hasattr(one, "cache")]
    assert not any(layer.keys.is_inference() for layer in noisy.cache.layers)
    with cl.intervening(lens, METHODS["VCD"]):  # with gradients
        lens.hf_model(**prefix.ask(QUESTIONS[0])).logits[:, -1].amax().backward()
    lens.hf_model.zero_grad()
    made = weakref.ref(noisy), weakref.ref(prefix.beginning)
    gc.disable()
    try:
        del noisy, prefix
        assert [one() for one in made] == [None, None]
    finally:
        gc.enable()


def test_a_model_that_no_twin_can_be_made_of(one):
    lens = cl.load((copy.deepcopy(one.hf_model), one.processor), check=False)
    assert why_unshared(lens, cl.VisFlow()) is None
    inner = lens.hf_model.model.language_model.layers[0].mlp
    inner.forward = lambda hidden: type(inner).forward(inner, hidden)
    assert "runs a forward function that was put on it" in why_unshared(lens, cl.VisFlow())
    assert why_unshared(lens, cl.CLVA()) is None


@pytest.mark.parametrize("name", ["ICD", "PAI", "VisFlow"])
def test_patches_of_the_text_are_read_onto_the_rest(one, name, monkeypatch, towers):
    """Prompts of several lengths, whose text begins at several places."""
    method = {"ICD": replace(DISTURB, beta=0)}
    method |= {"PAI": cl.PAI(guidance=1.7, beta=0), "VisFlow": cl.VisFlow()}
    asked = QUESTIONS[:2]
    source, target = (one.prompt([picture(i), picture(i + 1)], asked) for i in (11, 0))
    found, counts = [], []
    for refusal in (None, "not now"):
        towers.clear()
        if refusal is not None:
            monkeypatch.setattr(patch_sweep, "why_unshared", lambda *_: "not now")
        options = {"spans": "last", "part": "z", "layers": range(2, 10)}
        found.append(cl.patch_activations(one, source, target, method=method[name], **options))
        counts.append(len(towers))
    error = (found[0].values - found[1].values).abs().max()
    assert error < 1e-4 < found[1].effect.abs().max() / 20
    assert counts[0] < counts[1], "it was shared"
