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
from safetensors.torch import load_file, save_file

IMAGE = -200  # stands for the picture, as in LLaVA's own code
FIRST, VISUAL = 35, 576
Case = dict[str, Any]


def plain_class() -> type:
    """Return the release's Llama with a picture's features in place of the image token."""
    from transformers import LlamaForCausalLM

    class Llava(LlamaForCausalLM):
        def embedded(self, input_ids, images):
            if images is None or input_ids.shape[1] == 1:
                return {"input_ids": input_ids}
            place, table = int((input_ids[0] == IMAGE).nonzero()), self.get_input_embeddings()
            parts = [table(input_ids[:, :place]), images, table(input_ids[:, place + 1 :])]
            return {"inputs_embeds": torch.cat(parts, dim=1)}

        def forward(self, input_ids=None, images=None, **given):
            return super().forward(**self.embedded(input_ids, images), **given)

        def prepare_inputs_for_generation(
            self, input_ids, past_key_values=None, images=None, **given
        ):
            if past_key_values:
                input_ids = input_ids[:, -1:]
            # One prompt, no padding: the mask is all ones, and counted by LLaVA's own wiring.
            return {
                "input_ids": input_ids,
                "past_key_values": past_key_values,
                "use_cache": True,
                "images": images,
            }

        def prepare_inputs_for_generation_cd(self, input_ids, images_cd=None, **given):
            return self.prepare_inputs_for_generation(input_ids, **(given | {"images": images_cd}))

    return Llava


def only_class() -> type:
    """Return the same for ONLY's Llama, whose passes return two things, wired as it does itself."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Llava(plain_class()):
        def forward(self, input_ids=None, images=None, use_only=False, return_dict=None, **given):
            given |= self.embedded(input_ids, images)
            out, other = self.model(return_dict=True, use_only=use_only, **given)
            found = CausalLMOutputWithPast(
                logits=self.lm_head(out[0]), past_key_values=out.past_key_values
            )
            return (found, self.lm_head(other + 0.5 * out[0])) if use_only else found

        def prepare_inputs_for_generation(self, input_ids, use_only=False, **given):
            return super().prepare_inputs_for_generation(input_ids, **given) | {
                "use_only": use_only
            }

    return Llava


def build(case: Case) -> Any:
    """Return the model with the weights of the case."""
    from transformers import LlamaConfig

    config = LlamaConfig(**case["config"], use_cache=True)
    config._attn_implementation = "eager"
    model = (only_class() if case["name"] == "only" else plain_class())(config).eval()
    missing, unexpected = model.load_state_dict(case["weights"], strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


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
            layer.self_attn = new.eval()
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
            logits = globals()[settings["run"]](case, settings)
        found |= {f"{number}.{item}": torch.stack(x) for item, x in enumerate(logits)}
    save_file(found, Path(folder) / "released.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
