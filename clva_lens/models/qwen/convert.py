"""From a published Qwen-VL checkpoint to the native model: every tensor once, no code, no network.

A published folder has weights under the names of Qwen's own modules (safetensors or pickles, whole
or in shards), ``config.json`` with model_type "qwen" and remote code named in ``auto_map``,
``qwen.tiktoken`` and ``generation_config.json``. Its Python files are never opened. Pickles are
read by ``torch.load(weights_only=True)``, which makes tensors and nothing else.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig

from clva_lens.ground.errors import ModelLoadError
from clva_lens.models.qwen.configuration import QwenVLConfig
from clva_lens.models.qwen.model import QwenVLForConditionalGeneration
from clva_lens.models.qwen.processor import CHAT_TEMPLATE, QwenVLProcessor, image_processor
from clva_lens.models.qwen.tokenizer import END_OF_TEXT, FILE, IMAGE_PAD, make_tokenizer
from clva_lens.models.qwen_files import published_folder

# Computed, never learned: the released code leaves them out too when it loads a checkpoint.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.masked_bias$")
Cut = Literal["whole", "thirds", "thirds of heads", "transposed"]


class Target(NamedTuple):
    """Where a published tensor goes: native names, and how it is cut for them.

    "thirds" are one after another; in "thirds of heads" each head has its own, as in the vision
    tower's joint projection.
    """

    names: tuple[str, ...]
    cut: Cut = "whole"


def targets(config: QwenVLConfig) -> dict[str, Target]:
    """Return the published tensors of a model of this size, and where each of them goes."""
    language, visual = "model.language_model", "transformer.visual"
    table = {
        "transformer.wte.weight": Target((f"{language}.embed_tokens.weight",)),
        "transformer.ln_f.weight": Target((f"{language}.norm.weight",)),
        "lm_head.weight": Target(("lm_head.weight",)),
    }
    for layer in range(config.text_config.num_hidden_layers):
        theirs, ours = f"transformer.h.{layer}", f"{language}.layers.{layer}"
        joint = tuple(f"{ours}.self_attn.{part}_proj" for part in "qkv")
        table |= {
            f"{theirs}.ln_1.weight": Target((f"{ours}.input_layernorm.weight",)),
            f"{theirs}.ln_2.weight": Target((f"{ours}.post_attention_layernorm.weight",)),
            f"{theirs}.attn.c_proj.weight": Target((f"{ours}.self_attn.o_proj.weight",)),
            # Theirs is c_proj(w1(x) · silu(w2(x))): w2 is the gate.
            f"{theirs}.mlp.w1.weight": Target((f"{ours}.mlp.up_proj.weight",)),
            f"{theirs}.mlp.w2.weight": Target((f"{ours}.mlp.gate_proj.weight",)),
            f"{theirs}.mlp.c_proj.weight": Target((f"{ours}.mlp.down_proj.weight",)),
        }
        for kind in ("weight", "bias"):
            names = tuple(f"{one}.{kind}" for one in joint)
            table[f"{theirs}.attn.c_attn.{kind}"] = Target(names, "thirds")
    return table | _vision_targets(config, visual) | _resampler_targets(visual)


def _vision_targets(config: QwenVLConfig, visual: str) -> dict[str, Target]:
    tower = "model.vision_tower"
    table = {
        f"{visual}.conv1.weight": Target((f"{tower}.patch_embedding.weight",)),
        f"{visual}.positional_embedding": Target((f"{tower}.position_embedding",)),
    }
    for kind in ("weight", "bias"):
        table[f"{visual}.ln_pre.{kind}"] = Target((f"{tower}.pre_layernorm.{kind}",))
    same = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for layer in range(config.vision_config.num_hidden_layers):
        theirs = f"{visual}.transformer.resblocks.{layer}"
        ours = f"{tower}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            names = tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
            table[f"{theirs}.attn.in_proj.{kind}"] = Target(names, "thirds of heads")
            for name, native in same.items():
                table[f"{theirs}.{name}.{kind}"] = Target((f"{ours}.{native}.{kind}",))
    return table


def _resampler_targets(visual: str) -> dict[str, Target]:
    theirs, ours = f"{visual}.attn_pool", "model.resampler"
    table = {
        f"{theirs}.query": Target((f"{ours}.query",)),
        f"{theirs}.pos_embed": Target((f"{ours}.positions",)),
        f"{theirs}.kv_proj.weight": Target((f"{ours}.kv_proj.weight",)),
        f"{visual}.proj": Target((f"{ours}.projection.weight",), "transposed"),
    }
    for kind in ("weight", "bias"):
        names = tuple(f"{ours}.{part}_proj.{kind}" for part in "qkv")
        table |= {
            f"{theirs}.attn.in_proj_{kind}": Target(names, "thirds"),
            f"{theirs}.attn.out_proj.{kind}": Target((f"{ours}.out_proj.{kind}",)),
            f"{theirs}.ln_q.{kind}": Target((f"{ours}.ln_q.{kind}",)),
            f"{theirs}.ln_kv.{kind}": Target((f"{ours}.ln_kv.{kind}",)),
            f"{visual}.ln_post.{kind}": Target((f"{ours}.ln_post.{kind}",)),
        }
    return table


def native_tensors(found: Mapping[str, Tensor], config: QwenVLConfig) -> dict[str, Tensor]:
    """Return published tensors under native names, each used exactly once.

    Raises:
        ModelLoadError: naming tensors that are missing, that nothing uses, or whose shape does not
            fit the configuration.
    """
    table = targets(config)
    rest = {name for name in found if not COMPUTED.search(name)}
    if rest != table.keys():
        raise ModelLoadError(
            "the checkpoint's tensors are not those of its config.json: "
            f"{_some(table.keys() - rest)} missing, {_some(rest - table.keys())} left over. Pass "
            "the whole, unchanged folder of Qwen/Qwen-VL or Qwen/Qwen-VL-Chat."
        )
    made: dict[str, Tensor] = {}
    for name, target in table.items():
        heads = config.vision_config.num_attention_heads
        parts = _cut(name, found[name], target, heads)
        for native, part in zip(target.names, parts, strict=True):
            assert native not in made, f"two tensors go to {native}"
            made[native] = part
    with torch.device("meta"):
        wanted = QwenVLForConditionalGeneration(config).state_dict()
    assert made.keys() == wanted.keys(), sorted(made.keys() ^ wanted.keys())
    for name, tensor in made.items():
        if tensor.shape != wanted[name].shape:
            raise ModelLoadError(
                f"the checkpoint's tensor for '{name}' is {list(tensor.shape)}, but its "
                f"config.json needs {list(wanted[name].shape)}. Pass an unchanged checkpoint."
            )
    return made


def _cut(name: str, tensor: Tensor, target: Target, heads: int) -> tuple[Tensor, ...]:
    if target.cut == "transposed":
        return (tensor.T.contiguous(),)
    if target.cut == "whole":
        return (tensor,)
    if len(tensor) % (3 * heads if target.cut == "thirds of heads" else 3):
        raise ModelLoadError(
            f"the tensor '{name}' has {len(tensor)} rows, which are no queries, keys and values of "
            f"{heads} heads. Pass an unchanged checkpoint."
        )
    if target.cut == "thirds":
        return tuple(part.contiguous() for part in tensor.chunk(3))
    parts = rearrange(tensor, "(head part d) ... -> part (head d) ...", head=heads, part=3)
    return tuple(part.contiguous() for part in parts)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "none"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name; they stay on disk until they are used.

    Safetensors are preferred where there are both.

    Raises:
        ModelLoadError: if there are no weights, a shard is missing or broken, a pickle holds more
            than tensors, or a tensor is there twice.
    """
    made: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _read_file(path):
            if name in made:
                raise ModelLoadError(
                    f"the tensor '{name}' is in '{path.name}' and in another file of '{folder}'. "
                    "Leave the files of one checkpoint there."
                )
            made[name] = tensor
    return made


def _weight_files(folder: Path) -> list[Path]:
    for kind, stem in (("safetensors", "model"), ("bin", "pytorch_model")):
        index = folder / f"{stem}.{kind}.index.json"
        if index.is_file():
            named = sorted(set(_read_json(index).get("weight_map", {}).values()))
            # A name may not lead out of the folder.
            paths = [folder / Path(name).name for name in named]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise ModelLoadError(
                    f"'{folder}' lacks {len(missing)} of {len(named)} weight files, such as "
                    f"{missing[0]}. Download the whole repository."
                )
            return paths
        paths = sorted(folder.glob(f"{stem}*.{kind}"))
        if paths:
            return paths
    raise ModelLoadError(
        f"the folder '{folder}' has no weights (model*.safetensors or pytorch_model*.bin). "
        "Download the whole repository."
    )


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise ModelLoadError(f"'{path}' is broken ({error}). Download it again.") from error
        return
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"'{path}' holds more than tensors and is refused, since reading it could run code. "
            "Download the published file again."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ModelLoadError(
            f"'{path}' is no file that torch.save() wrote, or is broken: "
            f"{str(error).splitlines()[0]} Download it again."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise ModelLoadError(f"'{path}' is no table of tensors. Download the published file again.")
    yield from found.items()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"'{path}' cannot be read ({error}). Download the whole repository."
        ) from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"'{path}' holds no table. Download it again.")
    return found


def read_published(
    folder: Path, *, dtype: torch.dtype | str = "auto", **options: Any
) -> tuple[QwenVLForConditionalGeneration, QwenVLProcessor]:
    """Return model and processor of a published folder, converted in memory.

    ``dtype="auto"`` is that of the files; ``options`` go to ``from_pretrained``. A chat model ends
    its answer at "<|im_end|>" or "<|im_start|>", as the released ``chat`` does. The settings of
    sampling are left out: decoding is the caller's.

    Raises:
        ModelLoadError: if anything is missing, left over, broken or of another shape.
    """
    found = _read_json(folder / "config.json")
    config = QwenVLConfig.from_official(found)
    decoding = _read_json(folder / "generation_config.json")
    chats = decoding.get("chat_format") == "chatml"
    text, vision = config.text_config, config.vision_config
    tokenizer = make_tokenizer(folder / FILE, longest=text.max_position_embeddings)
    pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    if pad != config.image_token_id or len(tokenizer) > text.vocab_size:
        raise ModelLoadError(
            f"'{folder / FILE}' gives <imgpad> the id {pad}, but config.json means "
            f"{config.image_token_id}. Download both again."
        )
    processor = QwenVLProcessor(
        image_processor(vision.image_size),
        tokenizer,
        num_queries=vision.num_queries,
        chat_template=CHAT_TEMPLATE if chats else None,
    )
    tensors = native_tensors(read_tensors(folder), config)
    if dtype == "auto":
        dtype = tensors["lm_head.weight"].dtype
    model = QwenVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, **options
    )
    ends = [END_OF_TEXT, "<|im_end|>", "<|im_start|>"] if chats else [END_OF_TEXT]
    ids: Any = tokenizer.convert_tokens_to_ids(ends)
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=ids[0])
    return model.eval(), processor


def convert(source: str | Path, target: str | Path) -> None:
    """Write a published folder as a native one, which loads faster and is safetensors only.

    Raises:
        ModelLoadError: if ``source`` is no published Qwen-VL, or does not convert.
    """
    folder = published_folder(str(source))
    if folder is None:
        raise ModelLoadError(
            f"'{source}' is no published Qwen-VL (a config.json with model_type 'qwen' and a part "
            "'visual'). Pass the folder of Qwen/Qwen-VL or Qwen/Qwen-VL-Chat."
        )
    model, processor = read_published(folder)
    model.save_pretrained(target)
    processor.save_pretrained(target)
