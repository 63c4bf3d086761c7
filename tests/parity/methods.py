"""Methods against the programs that their authors released, run as they are.

No part of the suite: it wants clones of the releases, and for each a Python that has torch,
safetensors and the transformers that the release stands on:

    python tests/parity/methods.py [--half] vcd=CLONE,PYTHON pai=CLONE,PYTHON ...

A tiny LLaVA of 32 layers, so that every layer number in a release means what it says, with 576
image tokens at position 35 and random weights, is built here and handed over: ``released.py`` puts
the same weights and the same picture features into the release's own classes in a process of its
own, and both decode four prompts greedily. Compared are, at every step, the set of tokens that
survive, and their logits; beside the difference stands the effect, by how much the method itself
moves the log-odds of two tokens that it keeps. "plain" is no method: how far apart the two
transformers are. A step after the first one that chooses another token is not compared. With
``--half`` all of it is in bfloat16, where "plain" says how much of a difference is rounding.

OPERA is a beam search, compared as one (``searches.py``), on a toy of 4 layers. IMCCD is run once
more with its marks, the image tokens that stand out, being this package's, for a score next to the
mean is on one side of it or on the other by rounding.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import clva_lens as cl
from clva_lens.methods import imccd
from clva_lens.methods.base import Method
from clva_lens.models.family import find_family

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import searches  # noqa: E402
from releases import PROMPTS, RELEASES, Release  # noqa: E402
from tiny_models import tokenizer  # noqa: E402

STEPS, FIRST, VISUAL, IMAGE = 6, 35, 576, 5
DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
# Standard deviations of weights by the end of their names; the rest keep what they are made with.
SCALES = {"q_proj": 0.2, "k_proj": 0.2, "v_proj": 0.12, "o_proj": 0.1, "lm_head": 0.44}
SCALES |= {"gate_proj": 0.1, "up_proj": 0.1, "down_proj": 0.1, "embed_tokens": 1.0}
SCALES |= {"linear_1": 0.3, "linear_2": 0.2, "patch_embedding": 0.5}


@torch.no_grad()
def build(layers: int) -> LlavaForConditionalGeneration:
    """Return the model; its patterns are peaked, and its logits spread by about 3.5."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**DECODER, num_hidden_layers=layers),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if name.endswith("weight") and module in SCALES:
            parameter.normal_(std=SCALES[module])
        elif module.endswith("norm") and "language_model" in name:
            parameter.uniform_(0.7, 1.3)
    model.lm_head.weight[IMAGE] = 0  # an answer with it could not be read again
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def processor() -> LlavaProcessor:
    """Return the model's processor; it tokenizes ICD's instruction, and nothing else."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def prompts() -> list[dict[str, torch.Tensor]]:
    """Return the inputs: BOS, 34 words, the picture, and 17 to 20 words."""
    drawn = torch.Generator().manual_seed(1)
    made = []
    for item in range(PROMPTS):
        words = torch.randint(6, 96, (FIRST - 1 + 17 + item,), generator=drawn)
        picture = torch.full((VISUAL,), IMAGE)
        ids = torch.cat([torch.tensor([1]), words[: FIRST - 1], picture, words[FIRST - 1 :]])[None]
        pixels = torch.randn(1, 3, 48, 48, generator=drawn)
        made.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        )
    return made


@torch.no_grad()
def features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    return model.model.get_image_features(pixel_values=pixels).pooler_output[0][None]


def one_for_picture(ids: torch.Tensor) -> torch.Tensor:
    """Return the tokens with LLaVA's -200 in the place of all image tokens."""
    inside = (ids[0] == IMAGE).nonzero()
    return torch.cat(
        [ids[:, : int(inside[0])], ids.new_full((1, 1), -200), ids[:, int(inside[-1]) + 1 :]], dim=1
    )


def noise_of(clone: Path):
    """Return the released function that adds noise; it needs torch alone."""
    spec = spec_from_file_location("released_noise", clone / "vcd_utils" / "vcd_add_noise.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.add_diffusion_noise


def marks_of(lens: Any, method: Method, given: dict) -> list[torch.Tensor]:
    """Return what stands out of the image by IMCCD, [head, row, image token] of each layer."""
    marks, means = [], imccd._means

    def noting(looked: torch.Tensor, rows: torch.Tensor, old: int) -> torch.Tensor:
        found = means(looked, rows, old)
        marks.append((looked > found)[0])
        return found

    with patch.object(imccd, "_means", noting):
        ours(lens, method, given)
    return marks


def hand_over(name: str, clone: Path, lens: Any, inputs: list, folder: Path) -> None:
    """Write the case for ``released.py``."""
    model, release = lens.hf_model, RELEASES[name]
    weights = {
        key.replace("model.language_model.", "model."): value.contiguous()
        for key, value in model.state_dict().items()
        if "language_model" in key or key == "lm_head.weight"
    }
    tensors = {}
    for item, given in enumerate(inputs):
        tensors[f"{item}.ids"] = one_for_picture(given["input_ids"])
        tensors[f"{item}.features"] = features(model, given["pixel_values"])
        if name == "icd":
            disturbed = find_family(model).disturb(
                model, lens.processor, given, release.settings[1][1].instruction
            )
            tensors[f"{item}.disturbed"] = one_for_picture(disturbed["input_ids"])
        for method in [one for told, one in release.settings if told.get("marks")]:
            marks = marks_of(lens, method, given)
            tensors |= {f"{item}.marks{number}": one for number, one in enumerate(marks)}
        for step in {one["noise_step"] for one, _ in release.settings if "noise_step" in one}:
            torch.manual_seed(0)
            noisy = noise_of(clone)(given["pixel_values"], step)
            tensors[f"{item}.noisy{step}"] = features(model, noisy)
    settings = [{"run": name} | given for given, _ in release.settings]
    config = DECODER | {"num_hidden_layers": release.layers}
    case = {"config": config, "steps": STEPS, "count": len(inputs), "settings": settings}
    (folder / "case.json").write_text(json.dumps(case))
    save_file(weights, folder / "weights.safetensors")
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / "prompts.safetensors")


@torch.no_grad()
def ours(lens: Any, method: Method | None, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of every step, and the plain model's for the same tokens."""
    with cl.intervening(lens, *([] if method is None else [method])):
        out = lens.hf_model.generate(
            **given,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(out.logits)
    mask = torch.ones_like(out.sequences)
    whole = given | {"input_ids": out.sequences[:, :-1], "attention_mask": mask[:, :-1]}
    return logits, lens.hf_model(**whole).logits[0, -STEPS:]


def compared(found: list[torch.Tensor], mine: list, label: str) -> str:
    """Return a line for one setting."""
    same = cut = steps = 0
    error, effect = 0.0, []
    for theirs, (logits, plain) in zip(found, mine, strict=True):
        for old, new, bare in zip(theirs, logits, plain, strict=True):
            old, new, bare = old.float(), new.float(), bare.float()
            kept = old.isfinite() & new.isfinite()
            steps += 1
            cut += torch.equal(old.isfinite(), new.isfinite())
            error = max(error, float((old - new)[kept].abs().max()))
            moved = (new - bare)[kept]
            effect.append(float(moved.max() - moved.min()))
            if old.argmax() != new.argmax():
                break
            same += 1
    return (
        f"{label}: difference {error:.1e}, effect {median(effect):.2g} to {max(effect):.2g}; "
        f"{same} of {STEPS * len(found)} tokens equal, {cut} of {steps} cut-offs"
    )


def compared_logits(found: dict, lens: Any, inputs: list, release: Release) -> Iterator[str]:
    """Yield a line for each setting of a method that is decoded greedily."""
    for number, (given, method) in enumerate(release.settings):
        mine = [ours(lens, method, one) for one in inputs]
        theirs = [found[f"{number}.{item}"] for item in range(len(inputs))]
        yield compared(theirs, mine, said(given))


def compared_searches(found: dict, lens: Any, inputs: list, release: Release) -> Iterator[str]:
    """Yield a line for each setting of a beam search, the plain one being before the others."""
    plain = []
    for number, (given, method) in enumerate(release.settings):
        some = inputs[: given["prompts"]]
        mine = [searches.ours(lens, method, one, given, IMAGE) for one in some]
        plain = mine if given["weight"] == 0 else plain
        theirs = [searches.read(found, f"{number}.{item}") for item in range(len(some))]
        yield searches.compared(theirs, mine, plain, said(given))


def said(given: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in given.items())


def compare(name: str, clone: Path, python: str, dtype: torch.dtype) -> Iterator[str]:
    """Run both and yield what is printed."""
    release = RELEASES[name]
    if not (clone / release.file).is_file():
        raise SystemExit(
            f"{name}: {clone} has no {release.file}. Pass the path of a clone of "
            f"{release.repository}."
        )
    other = [python, str(HERE / "released.py"), name, str(clone)]
    asked = subprocess.run([*other, "version"], check=True, capture_output=True, text=True)
    version = asked.stdout.split()[-1]
    if not version.startswith(release.transformers):
        raise SystemExit(
            f"{name}: {python} has transformers {version}, but {release.repository} stands on "
            f"{release.transformers}. Pass a Python that has it."
        )
    lens = cl.load((build(release.layers).to(dtype), processor()))
    inputs = [given | {"pixel_values": given["pixel_values"].to(dtype)} for given in prompts()]
    with TemporaryDirectory() as folder:
        hand_over(name, clone, lens, inputs, Path(folder))
        subprocess.run([*other, folder], check=True, stdout=subprocess.DEVNULL)
        found = load_file(Path(folder) / "released.safetensors")
    yield f"{name}: {release.repository}, transformers {version}, {dtype}"
    kind = compared_searches if "steps" in release.settings[0][0] else compared_logits
    for line in kind(found, lens, inputs, release):
        yield f"  {line}"


def main(arguments: list[str]) -> None:
    """Print a comparison for each NAME=CLONE,PYTHON, after --half in bfloat16."""
    dtype = torch.bfloat16 if "--half" in arguments else torch.float32
    for argument in [one for one in arguments if one != "--half"]:
        name, _, rest = argument.partition("=")
        clone, _, python = rest.partition(",")
        if name not in RELEASES or not clone:
            known = ", ".join(RELEASES)
            raise SystemExit(f"{argument}: pass NAME=CLONE,PYTHON with NAME of {known}.")
        for line in compare(name, Path(clone), python or sys.executable, dtype):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
