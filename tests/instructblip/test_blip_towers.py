"""A picture that the vision tower reads once for its questions: the answers, the rows, the record.

The oracle is the same run with ``share=None``, whose tower reads a picture for every question.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from tiny_models import LANGUAGES, QUESTIONS, blip_of, picture, tiny_blip

import clva_lens as cl
from clva_lens.benchmarks.base import Benchmark, Sample, choose
from clva_lens.benchmarks.pope import score_pope
from clva_lens.experiments.speed.flops import tower_flops
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.lens.facts import sharing
from clva_lens.lens.towers import TowerPrompt, TowerReadings, pictures_read_once

READING, ANSWERING = cl.CLVA(tau=1.0), cl.CLVA(tau=1.0, site="decoder")
METHODS = {
    "plain": None,
    "CLVA": READING,
    "CLVA at the decoder": ANSWERING,
    "both": cl.compose(READING, ANSWERING),
    "KnockOut": cl.KnockOut(),
    "VCD": cl.VCD(),
    "CLVA and VCD": cl.compose(READING, cl.VCD()),
    "MemVR": cl.MemVR(ratio=0.5, gamma=0.0, start=2, end=9),
}
LLAMA_ONLY = ("VCD", "CLVA and VCD", "MemVR")
DECODINGS = {
    "greedy": cl.Greedy(max_new_tokens=3),
    "beams": cl.Beam(num_beams=3, max_new_tokens=3),
    "sampling": cl.Sampling(seed=3, max_new_tokens=3),
}
PICTURES = [picture(0), picture(1)]
ASKED = [(one, question) for one in PICTURES for question in QUESTIONS]


@dataclass(frozen=True)
class Three(Benchmark):
    """Four random pictures with three questions each; some of them broken."""

    version: ClassVar[str] = "1"
    max_new_tokens: ClassVar[int] = 3
    broken: tuple[int, ...] = ()

    @property
    def name(self):
        return "three"

    def samples(self, limit=None, seed=0):
        pictures = [picture(i) * (math.nan if i in self.broken else 1) for i in range(4)]
        everything = [
            Sample(f"{i}{j}", one, question, ("yes", "no")[j % 2], group=str(i))
            for i, one in enumerate(pictures)
            for j, question in enumerate(QUESTIONS)
        ]
        return choose(everything, limit, seed)

    def score(self, samples, answers):
        return score_pope(samples, answers, "strict")


@contextmanager
def rows_read(lens, *modules):
    """Yield, for each module, how many rows it has put out at each call."""
    counts = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _m, _a, out, into=into: into.append(len(out[0])))
        for module, into in zip(modules, counts, strict=True)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tokens_read(lens):
    """Yield how many tokens the tower's last layer has read at each call."""
    counts = []
    layer = lens.hf_model.vision_model.encoder.layers[-1]
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append((args or [*kwargs.values()])[0][..., 0].numel()),
        with_kwargs=True,
    )
    try:
        yield counts
    finally:
        handle.remove()


def apart(found, wanted):
    """The largest difference of margins; the tokens are the same."""
    assert all(torch.equal(a, b) for a, b in zip(found.ids, wanted.ids, strict=True))
    pairs = zip(found.margins, wanted.margins, strict=True)
    return max(abs(one - other) for one, other in pairs)


def ask(lens, method, how, share, size, asked=ASKED):
    options = {"batch_size": size, "share": share, "progress": False}
    return cl.generate(lens, asked, method, DECODINGS[how], **options)


@cache
def plain_margins(language):
    return ask(blip_of("sdpa", language), None, "greedy", None, 6).margins


@pytest.mark.parametrize(
    ("language", "name"),
    [
        (language, name)
        for language in LANGUAGES
        for name in METHODS
        if language == "llama" or name not in LLAMA_ONLY
    ],
)
def test_shared_is_unshared(language, name):
    """Over families, language models and methods; and the methods do act, on each picture."""
    lens, method = blip_of("sdpa", language), METHODS[name]
    wanted = ask(lens, method, "greedy", None, 6)
    with rows_read(lens, lens.hf_model.vision_model) as (rows,):
        found = ask(lens, method, "greedy", "picture", 6)
    assert rows == [2]
    assert apart(found, wanted) < 1e-5
    plain = plain_margins(language)
    assert max(abs(a - b) for a, b in zip(plain[:3], plain[3:], strict=True)) > 0.05
    effect = max(abs(a - b) for a, b in zip(wanted.margins, plain, strict=True))
    assert name == "plain" or effect > 1e-3


@pytest.mark.parametrize("language", ["llama", "t5", "blip2-opt"])
@pytest.mark.parametrize(
    ("how", "size", "reads"), [("greedy", 4, [1, 1]), ("beams", 6, [2]), ("sampling", 3, [1, 1])]
)
def test_every_decoding_and_batch(language, how, size, reads):
    """A batch of four holds one picture's three questions: batches are whole pictures."""
    lens = blip_of("sdpa", language)
    method = METHODS["CLVA and VCD" if language == "llama" else "CLVA"]
    with rows_read(lens, lens.hf_model.vision_model) as (rows,):
        found = ask(lens, method, how, "picture", size)
    assert rows == reads
    assert apart(found, ask(lens, method, how, None, size)) < 1e-5


def test_in_bfloat16():
    """No further apart than two batches are."""
    lens = cl.load((tiny_blip().to(torch.bfloat16), blip_of("sdpa").processor), check=False)
    found, wanted = (ask(lens, READING, "greedy", share, 6) for share in ("picture", None))
    batch = apart_margins(ask(lens, READING, "greedy", None, 3), wanted)
    assert apart_margins(found, wanted) <= 8 * batch + 1e-9


def apart_margins(found, wanted):
    pairs = zip(found.margins, wanted.margins, strict=True)
    return max(abs(one - other) for one, other in pairs)


@pytest.mark.parametrize(
    ("language", "method", "queries"),
    [
        ("llama", None, [6]),  # it reads the question too
        ("blip2-opt", None, [2]),
        ("blip2-opt", ANSWERING, [2]),
        ("blip2-opt", READING, [6]),  # it is edited: each question has anchors of its own
    ],
)
def test_which_queries_are_read_once(language, method, queries):
    lens = blip_of("sdpa", language)
    inner = lens.hf_model
    with rows_read(lens, inner.vision_model, inner.qformer) as counts:
        ask(lens, method, "greedy", "picture", 6)
    assert counts == [[2], queries]


def test_the_next_method_and_the_next_batch_find_it_read(one_blip):
    methods = [None, READING, cl.KnockOut(site="decoder")]
    with tokens_read(one_blip) as tokens:
        made = cl.evaluate(one_blip, Three(), methods=methods, batch_size=6, progress=False)
        assert tokens == [2 * 17, 1, 1] * 2, "a token for nothing where nothing is new"
        tokens.clear()
        cl.evaluate(one_blip, Three(), batch_size=2, progress=False)
        assert tokens == [17, 1] * 4, "a picture is cut, and known in the next batch"
    for method, report in zip(methods, made, strict=True):
        alone = cl.evaluate(one_blip, Three(), method, share=None, batch_size=6, progress=False)
        for one, other in zip(report.rows, alone.rows, strict=True):
            assert one["answer"] == other["answer"]
            assert abs(one["margin"] - other["margin"]) < 1e-5
        assert report.record["share"] == "tower"
        assert "the Q-Former of this model reads the question" in report.record["unshared"]
        assert "share" not in alone.record


def test_a_broken_picture_fails_alone(one_blip):
    given = {"batch_size": 12, "progress": False, "max_failed": 1.0}
    found = cl.evaluate(one_blip, Three(broken=(1,)), **given)
    whole = cl.evaluate(one_blip, Three(), share=None, **given)
    assert [row["error"] is not None for row in found.rows] == [False] * 3 + [True] * 3 + [
        False
    ] * 6
    pairs = [(a, b) for a, b in zip(found.rows, whole.rows, strict=True) if a["error"] is None]
    assert max(abs(a["margin"] - b["margin"]) for a, b in pairs) < 1e-5


def test_share_decides_resume(one_blip, tmp_path):
    given = {"batch_size": 6, "progress": False, "out": tmp_path / "run"}
    cl.evaluate(one_blip, Three(), share=None, **given)
    with pytest.raises(BenchmarkError, match="share"):
        cl.evaluate(one_blip, Three(), resume=True, **given)


def test_check_model_says_what_is_read_once(one_blip, one):
    assert sharing(one_blip).startswith("by the vision tower only: the Q-Former")
    assert sharing(one) == "yes"
    with pytest.raises(ParameterError, match="'llava' names no vision tower"):
        cl.generate(one, [(picture(0), QUESTIONS[0])], share="tower")


def state(model):
    return [
        (dict(one._forward_pre_hooks), dict(one._forward_hooks), set(vars(one)))
        for one in model.modules()
    ]


def test_nothing_is_left_behind(one_blip):
    model = one_blip.hf_model
    before = state(model)
    prompt = one_blip.prompt([PICTURES[0]] * 3, QUESTIONS)
    shown = TowerPrompt.of(prompt, ["one"] * 3, TowerReadings())
    with pytest.raises(KeyboardInterrupt), pictures_read_once(model, shown):
        assert state(model) != before
        raise KeyboardInterrupt
    assert state(model) == before
    with rows_read(one_blip, model.vision_model) as (rows,), torch.no_grad():
        model(**prompt)
    assert rows == [3]


def test_other_rows_than_the_prompts_are_left_alone(one_blip):
    """A pass of another batch within the block, by hand, is what it is outside."""
    model = one_blip.hf_model
    prompt = one_blip.prompt([PICTURES[0]] * 3, QUESTIONS)
    other = one_blip.prompt(PICTURES, QUESTIONS[:2])
    shown = TowerPrompt.of(prompt, ["one"] * 3, TowerReadings())
    with torch.no_grad(), pictures_read_once(model, shown):
        found = model(**other).logits
    with torch.no_grad():
        assert torch.equal(found, model(**other).logits)


def test_other_weights_read_it_again():
    lens = cl.load((tiny_blip(), blip_of("sdpa").processor), check=False)
    model, readings = lens.hf_model, TowerReadings()
    prompt = lens.prompt([PICTURES[0]] * 3, QUESTIONS)
    shown = TowerPrompt.of(prompt, ["one"] * 3, readings)

    def logits(given):
        with torch.no_grad(), pictures_read_once(model, given):
            return model(**given).logits

    before = logits(shown)
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(3)
    after = logits(shown)
    torch.testing.assert_close(after, logits(prompt), rtol=0, atol=1e-5)
    assert float((after - before).abs().max()) > 0.01


def test_at_full_size():
    """42 % of a question's operations are the tower's: five of six are left out."""
    found = tower_flops()
    print(f"InstructBLIP-7B, 6 questions a picture: {found}")
    assert found["once"] <= 0.68
    assert found["again"] < found["once"] - 0.05
