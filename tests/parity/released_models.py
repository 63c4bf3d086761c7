"""A language model of the release's own classes that reads a picture's features: LLaVA's wiring.

A part of ``released.py``, which runs where the release's own transformers is installed.
"""

from typing import Any

import torch

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
            self, input_ids, past_key_values=None, images=None, attention_mask=None, **given
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


def imccd_class() -> type:
    """Return the same for IMCCD's Llama, which keeps two caches, wired as it does itself."""
    from transformers.modeling_outputs import CausalLMOutputWithPastIMCCD

    class Llava(plain_class()):
        def forward(self, input_ids=None, images=None, past_key_values=None, **given):
            mode, _ = given.pop("mask_mode", ""), given.pop("modi_mask", None)
            past_attns, _ = given.pop("past_attns", None), given.pop("return_dict", None)
            read = {"input_ids": input_ids}
            if past_key_values is None:
                read = self.embedded(input_ids, images)
                where = {"image_token_start": FIRST, "image_token_end": FIRST + VISUAL}
                given["key_pos"] = given.get("key_pos") or [where]
            out = self.model(
                **read,
                **given,
                past_key_values=past_key_values,
                adaptive_mask=mode in ("ved", "imccd"),
                past_attns=past_attns if mode else None,
                return_dict=True,
            )
            given = {name: value for name, value in out.items() if name != "last_hidden_state"}
            return CausalLMOutputWithPastIMCCD(logits=self.lm_head(out[0]), **given)

        def prepare_inputs_for_generation(
            self,
            input_ids,
            past_key_values=None,
            past_key_values_without_pos=(),
            images=None,
            past_num=1,
            **given,
        ):
            return {
                "input_ids": input_ids[:, -past_num:] if past_key_values else input_ids,
                "past_key_values": past_key_values,
                "past_key_values_without_pos": past_key_values_without_pos,
                "use_cache": True,
                "images": images,
            }

    return Llava


CLASSES = {"only": only_class, "imccd": imccd_class}


def build(case: Case) -> Any:
    """Return the model with the weights of the case."""
    from transformers import LlamaConfig

    config = LlamaConfig(**case["config"], use_cache=True, eos_token_id=None)
    config._attn_implementation = "eager"
    model = CLASSES.get(case["name"], plain_class)()(config).eval()
    model.to(case["weights"]["lm_head.weight"].dtype)
    missing, unexpected = model.load_state_dict(case["weights"], strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model
