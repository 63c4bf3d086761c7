"""Tiny Qwen-VLs, and the folders that Qwen would have published them in.

The vocabulary file, the names of tensors and the configuration are written from the facts of the
published checkpoints, not by the package's own tables.
"""

import base64
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

TEXT = (
    "is there a cup in the image what red blue car yes no Yes No answer it you are helpful "
    "assistant user system Picture Answer"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *[f"<|extra_{i}|>" for i in range(205)],
    *["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"],
]


@cache
def ranks() -> dict[bytes, int]:
    """Byte strings by rank: the bytes, then beginnings of words, with and without a space."""
    table = {bytes([byte]): byte for byte in range(256)}
    for word in [*TEXT.split(), "é", "\n\n", "  ", "你好"]:
        for text in (word.encode(), b" " + word.encode()):
            for end in range(2, len(text) + 1):
                table.setdefault(text[:end], len(table))
    return table


def special_id(token: str) -> int:
    return len(ranks()) + SPECIAL.index(token)


def write_vocabulary(path: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items()]
    path.write_text("\n".join(lines) + "\n")


VISUAL = {
    "heads": 2,
    "image_size": 48,
    "image_start_id": special_id("<img>"),
    "layers": 2,
    "mlp_ratio": 2.02,
    "n_queries": 16,
    "output_dim": 256,
    "patch_size": 8,
    "width": 24,
}


def official_config(**changes: object) -> dict:
    """A ``config.json`` with the published one's fields: 6 × 6 patches, 4 × 4 queries."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "kv_channels": 64,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 512,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 128,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": False,
        "use_logn_attn": True,
        "visual": VISUAL,
        "vocab_size": len(ranks()) + len(SPECIAL) + 3,
    } | changes


def tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names, large enough that everything matters."""
    noise = torch.Generator().manual_seed(seed)

    def some(*shape: int, scale: float = 1.0, around: float = 0.0) -> torch.Tensor:
        return around + scale * torch.randn(*shape, generator=noise)

    width, half, vocab = (
        config["hidden_size"],
        config["intermediate_size"] // 2,
        config["vocab_size"],
    )
    seen = config["visual"]
    eye, out, ffn = seen["width"], seen["output_dim"], int(seen["width"] * seen["mlp_ratio"])
    patch, queries = seen["patch_size"], seen["n_queries"]

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": some(size, scale=0.2, around=1),
            f"{name}.bias": some(size, scale=0.2),
        }

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": some(rows, columns, scale=gain * columns**-0.5),
            f"{name}.bias": some(rows, scale=0.3),
        }

    made = {
        "transformer.wte.weight": some(vocab, width),
        "transformer.ln_f.weight": some(width, scale=0.2, around=1),
        "lm_head.weight": some(vocab, width, scale=width**-0.5),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}"
        made |= {
            f"{name}.ln_1.weight": some(width, scale=0.2, around=1),
            f"{name}.ln_2.weight": some(width, scale=0.2, around=1),
            **linear(f"{name}.attn.c_attn", 3 * width, width, gain=1.4),
            f"{name}.attn.c_proj.weight": some(width, width, scale=width**-0.5),
            f"{name}.mlp.w1.weight": some(half, width, scale=width**-0.5),
            f"{name}.mlp.w2.weight": some(half, width, scale=width**-0.5),
            f"{name}.mlp.c_proj.weight": some(width, half, scale=half**-0.5),
        }
    name = "transformer.visual"
    made |= {
        f"{name}.conv1.weight": some(eye, 3, patch, patch, scale=0.2),
        f"{name}.positional_embedding": some(256, eye, scale=0.5),
        **norm(f"{name}.ln_pre", eye),
        **norm(f"{name}.ln_post", out),
        f"{name}.proj": some(out, out, scale=out**-0.5),
        f"{name}.attn_pool.query": some(queries, out),
        f"{name}.attn_pool.pos_embed": some(queries, out, scale=0.7),
        f"{name}.attn_pool.kv_proj.weight": some(out, eye, scale=eye**-0.5),
        **norm(f"{name}.attn_pool.ln_q", out),
        **norm(f"{name}.attn_pool.ln_kv", out),
        f"{name}.attn_pool.attn.in_proj_weight": some(3 * out, out, scale=1.4 * out**-0.5),
        f"{name}.attn_pool.attn.in_proj_bias": some(3 * out, scale=0.3),
        **linear(f"{name}.attn_pool.attn.out_proj", out, out),
    }
    for layer in range(seen["layers"]):
        block = f"{name}.transformer.resblocks.{layer}"
        made |= {
            **norm(f"{block}.ln_1", eye),
            **norm(f"{block}.ln_2", eye),
            **linear(f"{block}.attn.in_proj", 3 * eye, eye, gain=1.4),
            **linear(f"{block}.attn.out_proj", eye, eye),
            **linear(f"{block}.mlp.c_fc", ffn, eye),
            **linear(f"{block}.mlp.c_proj", eye, ffn),
        }
    return made


TRAP = "raise SystemExit('the code of the repository was run')\n"


def publish(
    folder: Path,
    *,
    chats: bool = True,
    kind: str = "safetensors",
    shards: int = 3,
    config: dict | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder as Qwen did, with Python files that must not be run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = official_config() if config is None else config
    weights = tensors(config) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {
                "chat_format": "chatml" if chats else "raw",
                "eos_token_id": special_id("<|endoftext|>"),
                "pad_token_id": special_id("<|endoftext|>"),
                "max_new_tokens": 512,
                "do_sample": True,
                "top_k": 0,
                "top_p": 0.3,
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "model_max_length": 512,
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            }
        )
    )
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "visual"):
        (folder / f"{name}.py").write_text(TRAP)
    write_vocabulary(folder / "qwen.tiktoken")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names, files = sorted(weights), {}
    for shard in range(shards):
        part = {name: weights[name].contiguous() for name in names[shard::shards]}
        path = f"{stem}-{shard + 1:05}-of-{shards:05}.{kind}" if shards > 1 else f"{stem}.{kind}"
        files |= dict.fromkeys(part, path)
        save_file(part, folder / path) if kind == "safetensors" else torch.save(part, folder / path)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": files}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def picture(seed: int) -> np.ndarray:
    """Return a 60 × 40 picture of coloured squares."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return coarse.repeat(10, axis=0).repeat(10, axis=1)
