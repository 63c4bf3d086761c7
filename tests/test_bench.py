import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console
from transformers import Cache

from clva_lens.experiments.speed.bench import (
    BenchReport,
    BenchRow,
    Clocks,
    PeakMemory,
    bench,
    peak_memory,
    token_samples,
)
from clva_lens.experiments.speed.models import (
    LARGE_TARGETS,
    SCALING,
    Subject,
    named_subject,
    random_instructblip,
    random_llava,
    random_prompt,
    scaling_subjects,
    toy_subjects,
)
from clva_lens.experiments.speed.rewriting import NAME, rewriting
from clva_lens.experiments.speed.several import Spent, _rows
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.intervene import intervening
from clva_lens.methods.clva import CLVA
from clva_lens.models.family import FAMILIES

KIB = 256  # float32 values in one KiB
GENERATIONS = {
    "generate",
    "generate, CLVA",
    "generate, CLVA of the prompt",
    "generate, nnsight",
    "generate, nnsight, CLVA",
    "generate, eager",
    "generate, eager, CLVA",
    "generate, the paper's rewriting",
    "generate, VCD",
    "generate, IMCCD",
}
PREFILLS = {
    "prefill",
    "prefill, CLVA",
    "prefill, CLVA masked",
    "prefill, CLVA split",
    "prefill, CLVA folded",
    "prefill, the paper's rewriting",
}
TOKENS = {"a token", "a token, CLVA", "a token, the paper's rewriting"}
FORWARDS = {"forward", "forward, no cache", "trace_attention", "output_attentions"}
LLAVAS = {
    "run_with_cache",
    "TransformerLens' run_with_cache",
    "6 questions",
    "6 questions, CLVA",
    "6 questions, picture read once",
    "6 questions, CLVA, picture read once",
    "6 questions, VCD, picture read once",
    "6 questions, IMCCD, picture read once",
    "6 questions, greedy + CLVA + KnockOut, picture read once",
    "6 questions, cache copied by hand",
    "6 questions, 30 CLVA, picture read once",
    "2 questions",
    "2 questions, picture read once",
}
TIMED = {(case, "s") for case in GENERATIONS | PREFILLS | TOKENS | FORWARDS}
CASES = {
    *TIMED,
    *((case, "s") for case in LLAVAS),
    *((case, "peak") for case in PREFILLS | FORWARDS | LLAVAS),
    ("trace_attention", "MiB"),
    ("output_attentions", "MiB"),
}


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clva_lens.experiments.speed.bench.ROUND_SECONDS", 1e-6)
        model = random_llava(layers=4, width=16, heads=8, image_tokens=36)
        subjects = [Subject("tiny", model, LARGE_TARGETS)]
        made = bench(rounds=1, subjects=subjects, new_tokens=2, progress=False)
    assert model.config.text_config._attn_implementation == "sdpa"
    return made


def test_every_case_is_there_once_with_finite_positive_ratios(report):
    assert {(row.case, row.unit) for row in report.rows} == CASES
    assert len(report.rows) == len(CASES)
    for row in report.rows:
        # A token's time is a difference, which may be anything in one round of a tiny model.
        if row.unit == "s" and not row.case.startswith("a token"):
            assert math.isfinite(row.ratio) and row.ratio > 0
            assert row.low <= row.ratio <= row.high
            assert row.value > 0
            assert row.samples == 1
        assert row.over in {case for case, _ in CASES}


def test_baselines_are_themselves(report):
    for row in report.rows:
        if row.case == row.over:
            assert row.ratio == 1


def test_patterns_take_memory_and_tracing_takes_less(report):
    peaks = {row.case: row for row in report.rows if row.unit == "peak"}
    assert peaks["trace_attention"].ratio < 1.2 < peaks["output_attentions"].ratio
    looking, plain = peaks["trace_attention"].value, peaks["forward, no cache"].value
    assert plain < looking <= 1.2 * plain  # a tiny model's; 1.05 is for larger ones
    assert peaks["prefill, CLVA"].ratio < peaks["prefill, the paper's rewriting"].ratio
    memory = {row.case: row for row in report.rows if row.unit == "MiB"}
    # The patterns of all but the last layer lie under the peak: 3 × 8 heads × 60 × 60 × 4 bytes.
    assert memory["output_attentions"].value * 2**20 >= 3 * 8 * 60 * 60 * 4
    assert memory["output_attentions"].ratio == 1
    assert memory["trace_attention"].value < memory["output_attentions"].value


def test_targets_are_those_of_the_subject(report):
    named = {(row.case, row.unit): row.target for row in report.rows if row.target is not None}
    assert named == LARGE_TARGETS


def test_report_is_json_and_a_table(report):
    data = json.loads(json.dumps(report.as_dict()))
    assert len(data["rows"]) == len(CASES)
    assert data["rounds"] == 1
    assert data["environment"]["device"] == "cpu"
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert "trace_attention" in text and "≤ 1.03" in text and "MiB peak" in text


def test_a_report_can_be_read_elsewhere(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.as_dict()))
    assert BenchReport.read(path).as_dict() == report.as_dict()
    path.write_text('{"rows": [{}]}')
    with pytest.raises(ParameterError, match="bench --out"):
        BenchReport.read(path)


@pytest.mark.parametrize(("ratio", "target", "met"), [(1.2, 1.25, True), (1.3, 1.25, False)])
def test_a_row_says_whether_its_target_is_met(ratio, target, met):
    row = BenchRow("m", "a", "b", "s", 1.0, ratio, ratio, ratio, ratio, 9, target)
    free = BenchRow("m", "a", "b", "s", 1.0, ratio, ratio, ratio, ratio, 9, None)
    assert row.met is met
    assert free.met is None
    assert BenchReport((row, free), 1, {}).met is met


def test_wrong_numbers_are_refused():
    with pytest.raises(ParameterError, match="Pass rounds=3"):
        bench(rounds=0)
    with pytest.raises(ParameterError, match="Pass 576"):
        random_llava(image_tokens=577)


def test_random_prompt_has_the_models_image_tokens():
    model = random_llava(layers=4, width=16, heads=2, image_tokens=36)
    prompt = random_prompt(model)
    assert prompt.spans.visual_count == 36
    assert prompt.inputs["input_ids"].shape == (1, 8 + 36 + 16)


def test_an_instructblip_is_measured_too():
    model = random_instructblip(layers=4, width=16, heads=2)
    assert random_prompt(model).spans.visual_count == model.config.num_query_tokens == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clva_lens.experiments.speed.bench.ROUND_SECONDS", 1e-6)
        subject = next(one for one in toy_subjects() if "InstructBLIP" in one.name)
        made = bench(rounds=1, subjects=[subject], new_tokens=2, progress=False)
    peaks = {(case, "peak") for case in PREFILLS | FORWARDS}
    assert {(row.case, row.unit) for row in made.rows} == TIMED | peaks
    rows = [row for row in made.rows if not row.case.startswith("a token")]
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in rows)


def test_a_token_is_what_a_generation_takes_beyond_its_prefill():
    times = {
        "generate": [Clocks(5.0, 9.0)],
        "prefill": [Clocks(2.0, 3.0)],
        "generate, CLVA": [Clocks(8.0, 6.0)],
        "prefill, CLVA": [Clocks(2.0, 3.0)],
    }
    found = token_samples(times, 4)
    assert found == {"a token": [Clocks(1.0, 2.0)], "a token, CLVA": [Clocks(2.0, 1.0)]}


@torch.no_grad()
def test_the_papers_rewriting_is_clva(one, ask):
    model = copy.deepcopy(one.hf_model)
    inputs = ask(one).inputs
    image = inputs["input_ids"][0] == model.config.image_token_index
    with intervening(model, CLVA()):
        expected = model(**inputs).logits
    plain = model(**inputs).logits
    model.set_attn_implementation({"text_config": NAME})
    with rewriting(model, image):
        found = model(**inputs).logits
    error, effect = (float((expected - x).abs().max()) for x in (found, plain))
    assert error < 1e-4
    assert effect > 1000 * error


def test_shapes_are_found_by_name_or_folder(tmp_path):
    small = random_llava(layers=4, width=16, heads=2, image_tokens=36)
    small.config.save_pretrained(tmp_path)
    model = named_subject(str(tmp_path), "cpu", torch.bfloat16).model
    assert model.dtype == torch.bfloat16
    assert [p.shape for p in model.parameters()] == [p.shape for p in small.parameters()]
    assert random_prompt(model).spans.visual_count == 36
    with pytest.raises(ParameterError, match=r"instructblip-7b, llava-1\.5-7b, qwen-vl-7b"):
        named_subject("qwen2-vl-7b", "cpu", torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ParameterError, match="'llama'"):
        named_subject(str(tmp_path), "cpu", torch.float32)


def test_a_qwen_vl_can_be_measured(tmp_path):
    FAMILIES.get("qwen-vl").tiny().config.save_pretrained(tmp_path)
    subject = named_subject(str(tmp_path), "cpu", torch.float32, 2, ("prefill, CLVA",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clva_lens.experiments.speed.bench.ROUND_SECONDS", 1e-6)
        made = bench(rounds=1, subjects=[subject], new_tokens=1, progress=False)
    assert [(row.case, row.unit) for row in made.rows] == [
        ("prefill", "s"),
        ("prefill, CLVA", "s"),
        ("prefill", "peak"),
        ("prefill, CLVA", "peak"),
    ]


def test_scaling_varies_one_thing(monkeypatch):
    monkeypatch.setattr("clva_lens.experiments.speed.bench.ROUND_SECONDS", 1e-6)
    monkeypatch.setitem(SCALING, "tokens", (16, 64))
    monkeypatch.setitem(SCALING, "batch", (1, 2))
    monkeypatch.setitem(SCALING, "layers", (4, 5))
    sizes = {}
    for what in SCALING:
        for one in scaling_subjects(what):
            prompt = random_prompt(one.model, one.batch)
            depth = one.model.config.text_config.num_hidden_layers
            sizes.setdefault(what, []).append((prompt.spans.image.sum().item(), depth))
    assert sizes == {
        "tokens": [(16, 8), (64, 8)],
        "batch": [(256, 8), (512, 8)],
        "layers": [(256, 4), (256, 5)],
    }
    subjects = [one._replace(only=("output_attentions",)) for one in scaling_subjects("tokens")]
    made = bench(rounds=1, subjects=subjects, new_tokens=1, progress=False)
    found = {row.model: row.ratio for row in made.rows if row.case == "output_attentions"}
    assert list(found) == [f"random LLaVA, 8 × 512, {count} image tokens" for count in (16, 64)]
    with pytest.raises(ParameterError, match="tokens, batch, layers"):
        scaling_subjects("width")


def test_a_case_that_is_not_there_is_named():
    model = random_llava(layers=4, width=16, heads=2, image_tokens=36)
    subject = Subject("tiny", model, {}, only=("prefil",))
    with pytest.raises(ParameterError, match=r"no case 'prefil'.*prefill, CLVA"):
        bench(rounds=1, subjects=[subject], progress=False)


def test_workers_are_compared_round_by_round():
    one = [Spent(100.0, 90.0, 90.0), Spent(200.0, 100.0, 99.0), Spent(120.0, 100.0, 99.0)]
    several = [
        Spent(55.0, 1.0, 0.5, [40.0, 45.0]),
        Spent(100.0, 2.0, 1.0, [60.0, 40.0]),
        Spent(78.0, 1.6, 0.8, [50.0, 30.0]),
    ]
    wall, busiest, writer, beside = _rows("toy", one, several)
    # 55/100, 100/200, 78/120; 45/90, 60/100, 50/100; 0.5/42.5, 1/50, 0.8/40
    assert (wall.case, wall.ratio, wall.value) == ("2 workers", 0.55, 78.0)
    assert (busiest.ratio, busiest.value, busiest.over) == (0.5, 50.0, "1 process")
    assert (writer.ratio, writer.value) == (0.02, 0.8)
    assert (beside.ratio, beside.value) == (0.04, 1.6)
    assert [row.target for row in (wall, busiest, writer, beside)] == [0.6, 0.6, 0.02, None]
    assert BenchReport((wall, busiest, writer, beside), 3, {}).met


def test_peak_counts_what_is_alive_at_once():
    def pattern():
        first = torch.zeros(4 * KIB)  # 4 KiB live
        second = first + 1  # 8
        del first  # 4
        third = torch.cat([second, second])  # 12
        del second  # 8
        assert third.view(2, -1).mT.sum() > 0  # 8 and four bytes
        fourth = torch.zeros(3 * KIB)  # 11
        del third, fourth  # 0

    assert peak_memory(pattern, torch.device("cpu")) == 12 * 1024


def test_what_was_there_before_is_not_counted():
    before = torch.zeros(4 * KIB)

    def pattern():
        view = before.view(2, -1)
        view += 1  # in place
        return view.mT

    assert peak_memory(pattern, torch.device("cpu")) == 0


def test_views_share_their_storage_and_keep_it_alive():
    with PeakMemory() as memory:
        whole = torch.zeros(4 * KIB)
        part = whole[:KIB]
        del whole
        assert memory.live == 4 * 1024
        del part
        assert memory.live == 0
    assert memory.peak == 4 * 1024


def tensors_within(found):
    """Every tensor of a model's output, its cache and the outputs in it."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, Cache):
        return [one for layer in found.layers for one in (layer.keys, layer.values)]
    parts = found.values() if isinstance(found, dict) else found or ()
    return [tensor for part in parts for tensor in tensors_within(part)]


def test_after_a_pass_the_live_storages_are_those_of_its_outputs():
    model = random_llava(layers=4, width=16, heads=2, image_tokens=36)
    inputs = random_prompt(model).inputs
    with torch.inference_mode(), PeakMemory() as memory:
        out = model(**inputs)
        live = memory.live
    storages = [tensor.untyped_storage() for tensor in tensors_within(out)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert live == sum(sizes.values())
