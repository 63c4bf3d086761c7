"""What released programs say: the other half of ``methods.py``, which starts it.

    python released.py NAME CLONE CASE

runs where the release's own transformers is installed, and needs nothing of clva_lens. CASE is the
folder that ``methods.py`` wrote: the language model's weights, the prompts, and the features of
their pictures, so that a release's vision tower is the only thing of it that is left out. Each
function below imports a method from CLONE, calls it as the release's scripts do, one prompt at a
time, and returns the logits that it chooses each token from. Draws take the likeliest token.
"""

import json
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from released_models import FIRST, IMAGE, VISUAL, Case, build
from safetensors.torch import load_file, save_file


class Kept(list):
    """Logits, kept as a processor of logits that leaves them as they are."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.append(scores[0].clone())
        return scores


def stopping(case: Case) -> Callable[..., bool]:
    """Return what ends a sampler after the case's number of tokens."""
    steps = [0]

    def over(input_ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        steps[0] += 1
        return steps[0] == case["steps"]

    return over


def greedy(model: Any, case: Case, prompt: Case, then: Callable = lambda ids, x: x) -> list:
    """Return the logits of each step, ``then`` being a release's processor of logits."""
    ids, past, kept = prompt["ids"], None, []
    for _ in range(case["steps"]):
        out = model(
            **model.prepare_inputs_for_generation(
                ids, past_key_values=past, images=prompt["features"]
            )
        )
        past = out.past_key_values
        kept.append(then(ids, out.logits[:, -1])[0].clone())
        ids = torch.cat([ids, kept[-1].argmax().view(1, 1)], dim=1)
    return kept


def plain(case: Case, settings: Case) -> list[list]:
    """No method: how far the two transformers are from each other."""
    model = build(case)
    return [greedy(model, case, prompt) for prompt in case["prompts"]]


def sampled(model: Any, case: Case, sample: Callable, settings: Case, **given: str) -> list[list]:
    """A released sampler; ``given`` names a prompt's tensors that are further arguments of it."""
    logits = []
    for prompt in case["prompts"]:
        kept = Kept()
        sample(
            model,
            prompt["ids"],
            logits_warper=kept,
            stopping_criteria=stopping(case),
            images=prompt["features"],
            **{name: prompt[key] for name, key in given.items()},
            **settings,
        )
        logits.append(list(kept))
    return logits


def strength(settings: Case) -> Case:
    return {"cd_alpha": settings["alpha"], "cd_beta": settings["beta"]}


def vcd(case: Case, settings: Case) -> list[list]:
    """The released ``sample``; the noise is of the released function, drawn by ``methods.py``."""
    sample, noisy = import_module("vcd_utils.vcd_sample").sample, f"noisy{settings['noise_step']}"
    return sampled(build(case), case, sample, strength(settings), images_cd=noisy)


def icd(case: Case, settings: Case) -> list[list]:
    """The released ``sample`` for LLaVA, with the disturbed prompt's tokens."""
    sample = import_module("icd_utils.icd_sample_llava").sample
    return sampled(build(case), case, sample, strength(settings), input_ids_cd="disturbed")


def only(case: Case, settings: Case) -> list[list]:
    """The released ``sample`` over the release's own Llama."""
    given = {
        "images_pos": None,
        "images_neg": None,
        "use_only": True,
        "js_gamma": settings["gamma"],
    }
    given |= {"ritual_alpha_pos": settings["agreeing"], "ritual_alpha_neg": settings["alpha"]}
    given |= {"ritual_beta": settings["beta"]}
    return sampled(build(case), case, import_module("only_utils.only_sample").sample, given)


def told_marks(prompt: Case) -> Callable:
    """Return what stands for the release's own decision, one layer after another."""
    count = sum(name.startswith("marks") for name in prompt)
    told = iter([prompt[f"marks{number}"] for number in range(count)])
    return lambda scores: (next(told)[None].to(scores.dtype), None, None)


def imccd(case: Case, settings: Case) -> list[list]:
    """The released greedy search or sampler, over the release's own Llama.

    With ``marks``, the image tokens that stand out are those that ``methods.py`` was told.
    """
    module, logits = import_module("vcd_utils.vcd_sample"), []
    search, model = getattr(module, settings["search"]), build(case)
    for prompt in case["prompts"]:
        if settings["marks"]:
            told = told_marks(prompt)
            for layer in model.model.layers:
                layer.self_attn.GMM_mask = told
        kept, ids = Kept(), prompt["ids"]
        given = {"cd_alpha": settings["alpha"], "cd_beta": settings["beta"]}
        given |= {"images_cd": prompt["features"], "use_mask": True} if settings["alpha"] else {}
        place = FIRST - ids.shape[1] + 1  # counted from the end of the tokens
        where = {"image_token_start": FIRST, "image_token_end": place}
        search(
            model,
            ids,
            stopping_criteria=stopping(case),
            images=prompt["features"],
            mask_mode=settings["mode"],
            key_pos=[where],
            tokenizer=settings["gated"],
            **{"logits_warper" if settings["search"] == "sample" else "logits_processor": kept},
            **given,
        )
        logits.append(list(kept))
    return logits


class Watched(list):
    """Rounds of a beam search, kept as a processor of logits: beams and log-probabilities."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.append((input_ids.clone(), scores.clone()))
        return scores


def opera(case: Case, settings: Case) -> list[dict[str, torch.Tensor]]:
    """The released ``generate`` with its arguments, in the clone's own transformers."""
    model, searches = build(case), []
    for prompt in case["prompts"]:
        watched, ids = Watched(), prompt["ids"]
        out = model.generate(
            ids,
            images=prompt["features"],
            attention_mask=torch.ones_like(ids),
            num_beams=5,
            max_new_tokens=settings["steps"],
            do_sample=False,
            use_cache=True,
            eos_token_id=settings["end"],
            pad_token_id=0,
            output_attentions=True,
            logits_processor=[watched],
            opera_decoding=settings["weight"] > 0,
            key_position={
                "image_start": FIRST,
                "image_end": FIRST + VISUAL - 1,
                "response_start": ids.shape[1] + VISUAL - 1,
            },
            scale_factor=settings["scale"],
            threshold=settings["threshold"],
            num_attn_candidates=settings["candidates"],
            penalty_weights=settings["weight"],
        )
        count = ids.shape[1]
        one = {"answer": out[0, count:]}
        for number, (beams, scores) in enumerate(watched):
            one |= {f"beams{number}": beams[:, count:], f"log_probs{number}": scores}
        searches.append(one)
    return searches


def deco(case: Case, settings: Case) -> list[list]:
    """The released greedy search, in the clone's own transformers."""
    model, logits = build(case), []
    for prompt in case["prompts"]:
        kept = Kept()
        model.deco_greedy_search(
            prompt["ids"],
            settings["alpha"],
            settings["top_p"],
            settings["top_k"],
            list(range(20, 29)),
            logits_processor=kept,
            stopping_criteria=stopping(case),
            output_hidden_states=True,
            images=prompt["features"],
        )
        # It asks for the processor twice a step: for the plain logits, then for its own.
        logits.append(list(kept)[1::2])
    return logits


def pai(case: Case, settings: Case) -> list[list]:
    """The released attention, and the released guidance where there is one."""
    modify, guide = import_module("attention").llama_modify, import_module("CFG").CFGLogits
    guided, logits = settings["guidance"] != 1, []
    model = build(case)
    for prompt in case["prompts"]:
        modify(model, 2, 32, True, settings["alpha"], guided, FIRST, FIRST + VISUAL)
        without = prompt["ids"][prompt["ids"] != IMAGE][None]
        then = guide(settings["guidance"], without, model, start_layer=2, end_layer=32)
        logits.append(greedy(model, case, prompt, then) if guided else greedy(model, case, prompt))
    return logits


def clearsight(case: Case, settings: Case) -> list[list]:
    """The released attention in layers 9 to 14, as its script puts it there."""
    model, adapter = build(case), import_module("AttnAdapter").AttnAdapter
    for index, layer in enumerate(model.model.layers):
        if index > 8 and index < 15:
            new = adapter(model.config, settings["enhance"], settings["suppress"])
            new.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = new.eval().to(model.dtype)
    return [greedy(model, case, prompt) for prompt in case["prompts"]]


def memvr(case: Case, settings: Case) -> list[list]:
    """The released MLP and forward pass; its names of LLaVA's package are stand-ins."""
    from transformers.models.llama import modeling_llama

    for name, held in (
        ("llava", ()),
        ("llava.constants", ("IGNORE_INDEX", "IMAGE_TOKEN_INDEX", "DEFAULT_IMAGE_PATCH_TOKEN")),
        ("llava.mm_utils", ("get_anyres_image_grid_shape",)),
        ("llava.model", ()),
        ("llava.model.llava_arch", ()),
    ):
        module = sys.modules[name] = types.ModuleType(name)
        for one in (*held, "DEFAULT_IM_START_TOKEN", "DEFAULT_IM_END_TOKEN"):
            setattr(module, one, None)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    sys.modules["llava.model.llava_arch"].LlavaMetaForCausalLM = type("Meta", (), {})
    released = import_module("memvr")
    modeling_llama.LlamaMLP = released.LlamaMLP
    model, logits = build(case), []
    released.apply_memvr_llama(
        model, settings["start"], settings["end"], settings["gamma"], settings["ratio"]
    )
    for prompt in case["prompts"]:
        model.model.layers[0].mlp.visual_token = prompt["features"][0]
        logits.append(greedy(model, case, prompt))
    return logits


# Where in a clone the modules of a release are found.
FOLDERS = {
    "clearsight": "visaug/inference",
    "deco": ".",  # its own transformers
    "opera": "transformers-4.29.2/src",
    "only": "transformers/src",  # the same, and the clone's root
}


def read_case(folder: Path) -> Case:
    """Return what ``methods.py`` wrote."""
    case: Case = json.loads((folder / "case.json").read_text())
    case["weights"] = load_file(folder / "weights.safetensors")
    tensors = load_file(folder / "prompts.safetensors")
    case["prompts"] = [
        {name.split(".")[1]: x for name, x in tensors.items() if name.startswith(f"{number}.")}
        for number in range(case["count"])
    ]
    return case


def main(name: str, clone: str, folder: str) -> None:
    """Write the logits of each setting and prompt, [step, vocabulary], or say the version only."""
    sys.path[:0] = [str(Path(clone, FOLDERS.get(name, "."))), clone]
    torch.set_num_threads(1)
    torch.multinomial = lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True)
    import transformers

    print(transformers.__version__)
    if folder == "version":
        return
    found, case = {}, read_case(Path(folder)) | {"name": name}
    for number, settings in enumerate(case["settings"]):
        with torch.no_grad():
            some = case | {"prompts": case["prompts"][: settings.get("prompts")]}
            logits = globals()[settings["run"]](some, settings)
        for item, x in enumerate(logits):
            if isinstance(x, dict):
                found |= {f"{number}.{item}.{key}": one.contiguous() for key, one in x.items()}
            else:
                found[f"{number}.{item}"] = torch.stack(x)
    save_file(found, Path(folder) / "released.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
