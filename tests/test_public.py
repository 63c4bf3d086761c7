"""The public surface: a change here is a change for users."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.figures.base import FIGURES
from clva_lens.methods.base import METHODS
from clva_lens.models.family import FAMILIES


def test_public_names():
    assert cl.__all__ == [
        "AGLA",
        "ASCD",
        "CLVA",
        "DLC",
        "ED",
        "ICD",
        "IMCCD",
        "M3ID",
        "ONLY",
        "OPERA",
        "PAI",
        "SID",
        "VCD",
        "VDD",
        "VISTA",
        "AblateHeads",
        "Beam",
        "ClearSight",
        "ClvaLensError",
        "DeCo",
        "FromCheckpoint",
        "Greedy",
        "HeadClasses",
        "HeadGuided",
        "KnockOut",
        "MemVR",
        "PatchActivations",
        "PostHocDebias",
        "Ray",
        "Sampling",
        "Shuffled",
        "Steer",
        "SteeringVector",
        "TokenSpans",
        "ViCrop",
        "VisFlow",
        "VisualAnchors",
        "attention_drift",
        "attribution_patching",
        "benchmarks",
        "caption_attention",
        "classify_heads",
        "compare",
        "compose",
        "composed_saliency",
        "direct_logit_attribution",
        "edge_attribution",
        "evaluate",
        "explore",
        "figures",
        "generate",
        "head_means",
        "image_map",
        "intervene",
        "intervening",
        "load",
        "logit_lens",
        "methods",
        "modality_parts",
        "models",
        "new_record",
        "observe",
        "observing",
        "open_record",
        "overlay",
        "patch_activations",
        "patch_mask",
        "pointing_game",
        "probe",
        "read",
        "register_method",
        "sae_features",
        "scan",
        "score",
        "steering_vector",
        "text_centric_heads",
        "to_transformer_lens",
        "trace_attention",
        "trace_statistics",
        "vti",
    ]
    assert all(hasattr(cl, name) for name in cl.__all__)


REGISTERED = {
    "benchmarks": BENCHMARKS,
    "figures": FIGURES,
    "methods": METHODS,
    "models": FAMILIES,
}


def undocumented(thing):
    """The parameters that a docstring neither lists under Args nor names in its prose."""
    prose = re.split(r"\n(?:>>> |Example::)", inspect.getdoc(thing) or "")[0]
    wanted = [one for one in inspect.signature(thing).parameters if one != "self"]
    said = r"``{0}(=[^`]*)?``|^\s+\*{{0,2}}{0}: \S"
    return [one for one in wanted if not re.search(said.format(one), prose, re.MULTILINE)]


@pytest.mark.parametrize("name", [name for name in cl.__all__ if name not in REGISTERED])
def test_every_public_name_lists_its_parameters(name):
    thing = getattr(cl, name)
    raised = isinstance(thing, type) and issubclass(thing, Exception)
    assert raised or undocumented(thing) == []


def test_a_parameter_without_a_word_is_seen():
    def silent(first, second, **third):
        """Return nothing of the ``first``.

        Args:
            second: said.
        """

    assert undocumented(silent) == ["third"]


@pytest.mark.parametrize("room", REGISTERED)
def test_what_is_registered_is_listed(room):
    """Every file of a room that registers something is imported by the room, and listed."""
    listed = getattr(cl, room)()
    assert listed == REGISTERED[room].names() == tuple(sorted(listed))
    folder = Path(cl.__file__).parent / room
    registering = re.compile(
        r"^(@register_method|@figure\(|\s*BENCHMARKS\.register|FAMILIES\.register)", re.MULTILINE
    )
    files = [path for path in folder.glob("*.py") if registering.search(path.read_text())]
    assert len(files) >= 4
    for path in files:
        assert f"clva_lens.{room}.{path.stem}" in sys.modules, f"{path.name} is not imported"


def test_names_that_runs_and_records_have_are_there():
    """Names are kept for good, since run folders and records store them; new ones may come."""
    assert {"ablation", "clearsight", "clva", "deco", "icd", "imccd"} <= set(cl.methods())
    assert {"knockout", "memvr", "only", "opera", "pai", "vcd", "visflow"} <= set(cl.methods())
    assert {"generic", "instructblip", "llava", "qwen-vl"} <= set(cl.models())
    assert {"chair/coco", "chair/toy", "mme/toy", "pope/toy/random"} <= set(cl.benchmarks())
    assert {"pope/toy/adversarial", "pope/toy/popular"} <= set(cl.benchmarks())
    assert {"drift_curves", "head_attribution", "head_intensity", "logit_lens"} <= set(cl.figures())
    assert {"costs", "differences", "layer_curves", "surface", "task_scores"} <= set(cl.figures())
    assert {"method_comparison", "patch_maps", "patching", "pointing"} <= set(cl.figures())
    assert "saliency_overlays" in cl.figures()


def test_every_error_is_ours():
    from clva_lens.ground import errors

    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(own) >= 9
    assert all(issubclass(error, cl.ClvaLensError) for error in own)


def test_import_starts_no_installer_and_leaves_torch_alone():
    """Importing must not run pip, seed or thread anything, nor import beartype."""
    code = (
        "import subprocess, sys, torch\n"
        "def refuse(*a, **k): raise AssertionError(f'a process was started: {a}')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "import clva_lens\n"
        "after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
        "assert 'transformer_lens' not in sys.modules\n"
        "print('clean')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("clean"), done.stderr
