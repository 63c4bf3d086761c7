"""What is observed lines up with the tokens of the answer, in whichever beam they stood."""

import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError

STEPS = 6  # with fewer, no beam crosses another
LAYERS = (2, 7)


def expected(lens, prompt, row, answer, method=None):
    """The maps of the rows that wrote the answer, from one uncached pass over all of it."""
    inputs = {name: value[row : row + 1] for name, value in prompt.inputs.items()}
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], dim=1)
    ones = torch.ones_like(answer)[None]
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in LAYERS]
    _, cache = lens.run_with_cache(inputs, names, method=method)
    visual = prompt.spans.image[row].nonzero()[:, 0]
    rows = slice(start - 1, start - 1 + len(answer))
    return torch.stack([cache[name][0, :, rows][..., visual] for name in names])


def answers(lens, prompt, count=1, method=None, **options):
    given = {"max_new_tokens": STEPS, "do_sample": False, **options}
    with torch.no_grad(), cl.intervening(lens, method), cl.observing(lens, LAYERS) as seen:
        ids = lens.hf_model.generate(**prompt.inputs, **given)
    return ids, seen, seen.answers(ids, prompts=count)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}]
)
@pytest.mark.parametrize("method", [None, cl.KnockOut(layers=(6,))])
def test_maps_are_of_the_answers_own_rows(options, method):
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt([picture(0), picture(1)], list(QUESTIONS[:2]))
    ids, seen, found = answers(lens, prompt, 2, method, **options)
    per, start = len(ids) // 2, prompt["input_ids"].shape[1]
    crossed = 0
    for number, maps in enumerate(found):
        answer = ids[number, start : start + maps.shape[2]]
        wanted = expected(lens, prompt, number // per, answer, method)
        assert maps.shape == wanted.shape and maps.shape[2] >= 2
        assert (maps - wanted).abs().max() < 1e-5
        row = number // per * options.get("num_beams", 1)
        naive = torch.stack([step[:, row, :, 0] for step in seen.steps[: maps.shape[2] - 1]], dim=2)
        crossed += (naive - wanted[:, :, 1:]).abs().max() > 1e-3
    assert (crossed > 0) == (options != {})  # the first row of each pass is another beam's


def test_answers_of_a_qformer_model():
    lens = blip_of("sdpa")
    prompt = lens.prompt([picture(0), picture(1)], list(QUESTIONS[:2]))
    with torch.no_grad(), cl.observing(lens, LAYERS, site="decoder") as seen:
        options = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 3}
        ids = lens.hf_model.generate(**prompt.inputs, **options)
    maps = seen.answers(ids, prompts=2)
    assert len(maps) == 2 and all(one.shape[2] >= 2 for one in maps)


def test_in_a_trace():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    with lens.generate(prompt, max_new_tokens=STEPS, do_sample=False, num_beams=4) as tracer:
        seen = cl.observe(LAYERS)
        ids = tracer.result.save()
    (maps,) = seen.answers(ids)
    answer = ids[0, prompt["input_ids"].shape[1] :][: maps.shape[2]]
    assert (maps - expected(lens, prompt, 0, answer)).abs().max() < 1e-5


def test_beside_a_contrast_that_follows_beams_too():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    plain = cl.generate(lens, prompt, cl.VCD(), cl.Beam(num_beams=3, max_new_tokens=STEPS)).ids
    with torch.no_grad(), cl.intervening(lens, cl.VCD()), cl.observing(lens, LAYERS) as seen:
        options = {"num_beams": 3, "max_new_tokens": STEPS, "do_sample": False}
        ids = lens.hf_model.generate(**prompt.inputs, **options)
    assert seen.answers(ids)[0].shape[2] >= 2
    assert ids[0, prompt["input_ids"].shape[1] :][: len(plain[0])].tolist() == plain[0].tolist()


def test_other_ids_are_refused():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    ids, seen, _ = answers(lens, prompt)
    with pytest.raises(InterventionError, match=r"begins with token .*which no row read.*prompts="):
        seen.answers((ids[:, -STEPS:] + 1) % 60)
