"""The import order of the rooms: nothing imports what comes after it."""

import ast
from pathlib import Path

import clva_lens

ROOT = Path(clva_lens.__file__).parent
ORDER = [
    {"errors"},
    {"registry", "settings", "progress", "axes", "transformerlens"},
    {"heads", "anchors", "drift", "pointing", "moments", "folding"},
    {"step"},
    {"passes", "logits", "models.twin", "windows"},
    {"qwen_vl.configuration", "qwen_vl.tokenizer"},
    {"qwen_vl.vision", "qwen_vl.processor"},
    {"qwen_vl.model"},
    {"qwen_vl.__init__"},
    {"qwen_vl.convert"},
    {"models.hooks"},
    {"readout"},
    {"models.family"},
    {"models.grids"},
    {
        "models.generic",
        "models.llava",
        "models.instructblip",
        "models.qwen_vl",
        "models.__init__",
    },
    {"stream"},
    {"session"},
    {"merging"},
    {"attention"},
    {"rows", "logit_parts"},
    {
        "methods.base",
        "methods.beams",
        "methods.choosing",
        "methods.ablation",
        "methods.clearsight",
        "methods.clva",
        "methods.contrast",
        "methods.deco",
        "methods.icd",
        "methods.imccd",
        "methods.controls",
        "methods.knockout",
        "methods.memvr",
        "methods.only",
        "methods.opera",
        "methods.patching",
        "methods.vcd",
        "methods.hooks",
        "methods.pai",
        "methods.scores",
        "methods.visflow",
        "methods.__init__",
    },
    {"models.prompt"},
    {"trace"},
    {"intervene", "models.check"},
    {"trace_statistics"},
    {"cache"},
    {"toy.__init__", "toy.pretrained.__init__", "toy.scenes", "toy.questions"},
    {"models.lens"},
    {"generate", "bridge", "masks", "model_facts"},
    {"benchmarks.lines", "benchmarks.metrics"},
    {"benchmarks.base"},
    {"benchmarks.statistics"},
    {
        "benchmarks.parsers",
        "benchmarks.protocols",
        "benchmarks.files",
        "benchmarks.hub",
        "benchmarks.comparison",
    },
    {"benchmarks.pope", "benchmarks.mme_files"},
    {"benchmarks.pope_sets", "benchmarks.mme"},
    {"benchmarks.pope_sampling", "benchmarks.toy_pope"},
    {"benchmarks.toy_skills", "benchmarks.toy_mme"},
    {"benchmarks.chair_words", "benchmarks.chair_tokens", "benchmarks.chair_singular"},
    {"benchmarks.chair_vocabulary"},
    {"benchmarks.chair_lemmas"},
    {"benchmarks.chair_reading"},
    {"benchmarks.chair", "benchmarks.chair_truth"},
    {"benchmarks.chair_coco", "benchmarks.toy_chair", "benchmarks.llava_bench"},
    {"benchmarks.llava_judge"},
    {"benchmarks.__init__"},
    {"record", "runs"},
    {"evaluate"},
    {"figures.base"},
    {"figures.overlay", "figures.layer_map", "figures.of_records"},
    {
        "figures.accuracy",
        "figures.attribution",
        "figures.costs",
        "figures.differences",
        "figures.drift",
        "figures.heads",
        "figures.layer_curves",
        "figures.logit_lens",
        "figures.patch_maps",
        "figures.patching",
        "figures.pointing",
        "figures.saliency",
        "figures.surface",
        "figures.task_scores",
    },
    {"figures.attention_records"},
    {"figures.__init__"},
    {"logit_lens", "attribution"},
    {"patching", "game"},
    {"toy.build", "toy.checkpoint"},
    {"toy.build_instructblip"},
    {"toy.packing", "toy.vision", "toy.measure"},
    {"toy.reading", "toy.reading_instructblip"},
    {"toy.train"},
    {"toy.train_instructblip"},
    {"toy.toys"},
    {"toy.card"},
    {"look", "bench_models", "bench_paper"},
    {"bench_cases"},
    {"bench", "demo"},
    {"paper", "experiments.__init__", "experiments.record", "experiments.notebook"},
    {"experiments.draft", "experiments.drawing", "experiments.measuring"},
    {"experiments.archive"},
    {"experiments.commands"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
NNSIGHT = {"models.lens", "intervene", "bench"}
TRANSFORMER_LENS = {"transformerlens", "cache"}
NO_TORCH = {name for name in LEVEL if name.startswith(("benchmarks.", "figures."))}
SCIENCE = {"heads", "anchors", "drift", "pointing", "moments", "axes"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, [alias.name for alias in node.names]


def own(module, names):
    """The clva_lens modules that an import statement reaches."""
    if not module.startswith("clva_lens"):
        return
    short = module.removeprefix("clva_lens").lstrip(".")
    for name in names:
        inner = f"{short}.{name}".lstrip(".")
        if inner in LEVEL:
            yield inner
        elif f"{inner}.__init__" in LEVEL:
            yield f"{inner}.__init__"
        else:
            yield short if short in LEVEL else f"{short}.__init__".lstrip(".")


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set(LEVEL)


def test_nothing_imports_what_comes_after_it():
    wrong = [
        f"{name} imports {used}"
        for name, path in modules()
        for module, names in imports(path)
        for used in own(module, names)
        if LEVEL[used] > LEVEL[name]
    ]
    assert wrong == []


def test_each_upstream_stays_in_its_rooms():
    wrong = []
    for name, path in modules():
        for module, _ in imports(path):
            top = module.split(".")[0]
            if top == "nnsight" and name not in NNSIGHT:
                wrong.append(f"{name} imports nnsight")
            if top == "transformer_lens" and name not in TRANSFORMER_LENS:
                wrong.append(f"{name} imports transformer_lens")
            if name in NO_TORCH and top in ("torch", "transformers"):
                wrong.append(f"{name} imports {top}")
            if name in SCIENCE and top in ("transformers", "nnsight", "pathlib"):
                wrong.append(f"{name} imports {top}")
    assert wrong == []


def test_files_are_short_enough_to_read():
    long = {n: len(p.read_text().splitlines()) for n, p in modules()}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
    assert not {n for n in long if n.rpartition(".")[2] in ("utils", "common", "helpers")}
