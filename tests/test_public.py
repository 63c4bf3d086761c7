"""The public surface: a change here is a change for users."""

import subprocess
import sys

import clva_lens as cl


def test_public_names():
    assert cl.__all__ == [
        "CLVA",
        "ICD",
        "IMCCD",
        "ONLY",
        "OPERA",
        "PAI",
        "VCD",
        "AblateHeads",
        "Beam",
        "ClearSight",
        "ClvaLensError",
        "DeCo",
        "Greedy",
        "HeadClasses",
        "KnockOut",
        "MemVR",
        "PatchActivations",
        "Sampling",
        "Shuffled",
        "TokenSpans",
        "VisFlow",
        "VisualAnchors",
        "attention_drift",
        "benchmarks",
        "classify_heads",
        "compare",
        "compose",
        "composed_saliency",
        "direct_logit_attribution",
        "evaluate",
        "figures",
        "generate",
        "head_means",
        "intervene",
        "intervening",
        "load",
        "logit_lens",
        "methods",
        "models",
        "new_record",
        "observe",
        "observing",
        "open_record",
        "patch_activations",
        "patch_mask",
        "pointing_game",
        "register_method",
        "score",
        "to_transformer_lens",
        "trace_attention",
        "trace_statistics",
    ]
    assert all(hasattr(cl, name) for name in cl.__all__)


def test_what_is_registered():
    assert cl.methods() == (
        "ablation",
        "clearsight",
        "clva",
        "deco",
        "icd",
        "imccd",
        "knockout",
        "memvr",
        "only",
        "opera",
        "pai",
        "vcd",
        "visflow",
    )
    assert cl.models() == ("generic", "instructblip", "llava", "qwen-vl")
    assert set(cl.benchmarks()) >= {
        "chair/coco",
        "chair/toy",
        "pope/toy/adversarial",
        "pope/toy/popular",
        "pope/toy/random",
    }
    assert set(cl.figures()) == {
        "drift_curves",
        "head_attribution",
        "head_intensity",
        "logit_lens",
        "method_comparison",
        "costs",
        "differences",
        "layer_curves",
        "surface",
        "task_scores",
        "patch_maps",
        "patching",
        "pointing",
        "saliency_overlays",
    }


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
