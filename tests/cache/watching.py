"""References for cache entries: PyTorch's own hooks on transformers' modules, nothing of ours."""

from contextlib import contextmanager

import torch


@contextmanager
def watched(model, places):
    """Fill a dict: name → what (path, "in" | "out" | "weights") saw; "weights" is output[1]."""
    seen, handles = {}, []

    def before(name):
        def hook(_, args, kwargs):
            seen.setdefault(name, (*args, *kwargs.values())[0])

        return hook

    def after(name, side):
        def hook(_, args, output):
            if side == "weights":
                output = output[1]
            elif isinstance(output, tuple):
                output = output[0]
            seen.setdefault(name, output)

        return hook

    for name, (path, side) in places.items():
        module = model.get_submodule(path)
        if side == "in":
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after(name, side)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watch(model, inputs, places):
    """Return what a plain forward pass made at some places."""
    with torch.no_grad(), watched(model, places) as seen:
        model(**inputs)
    return seen


def llama(path, layers):
    """Where a Llama decoder at ``path`` has its activations, by TransformerLens' names."""
    places = {"hook_embed": (f"{path}.layers.0", "in")}
    for i in layers:
        block, own = f"blocks.{i}", f"{path}.layers.{i}"
        places |= {
            f"{block}.hook_resid_pre": (own, "in"),
            f"{block}.attn.hook_q": (f"{own}.self_attn.q_proj", "out"),
            f"{block}.attn.hook_k": (f"{own}.self_attn.k_proj", "out"),
            f"{block}.attn.hook_v": (f"{own}.self_attn.v_proj", "out"),
            f"{block}.attn.hook_z": (f"{own}.self_attn.o_proj", "in"),
            f"{block}.hook_attn_out": (f"{own}.self_attn", "out"),
            f"{block}.hook_resid_mid": (f"{own}.post_attention_layernorm", "in"),
            f"{block}.mlp.hook_pre": (f"{own}.mlp.gate_proj", "out"),
            f"{block}.mlp.hook_post": (f"{own}.mlp.down_proj", "in"),
            f"{block}.hook_mlp_out": (f"{own}.mlp", "out"),
            f"{block}.hook_resid_post": (own, "out"),
        }
    return places


def vision(path, layers, joint):
    """Where a vision tower's layers have theirs; ``joint``: InstructBLIP's, with one projection."""
    out = "projection" if joint else "out_proj"
    places = {"vision.hook_embed": (f"{path}.0", "in")}
    for i in layers:
        block, own = f"vision.blocks.{i}", f"{path}.{i}"
        places |= {
            f"{block}.hook_resid_pre": (own, "in"),
            f"{block}.attn.hook_z": (f"{own}.self_attn.{out}", "in"),
            f"{block}.hook_attn_out": (f"{own}.self_attn", "out"),
            f"{block}.hook_resid_mid": (f"{own}.layer_norm2", "in"),
            f"{block}.mlp.hook_post": (f"{own}.mlp.fc2", "in"),
            f"{block}.hook_mlp_out": (f"{own}.mlp", "out"),
            f"{block}.hook_resid_post": (own, "out"),
        }
        if not joint:
            for one in "qkv":
                places[f"{block}.attn.hook_{one}"] = (f"{own}.self_attn.{one}_proj", "out")
    return places


def qformer(layers):
    """Where a Q-Former has its activations."""
    places = {"qformer.hook_embed": ("qformer.encoder.layer.0", "in")}
    for i in layers:
        block, own = f"qformer.blocks.{i}", f"qformer.encoder.layer.{i}"
        kinds = [("attn", "attention", "hook_attn_out", "hook_resid_mid")]
        if i % 2 == 0:
            kinds.append(
                ("cross_attn", "crossattention", "hook_cross_attn_out", "hook_resid_mid_cross")
            )
        places |= {
            f"{block}.hook_resid_pre": (own, "in"),
            f"{block}.mlp.hook_pre": (f"{own}.intermediate_query.dense", "out"),
            f"{block}.mlp.hook_post": (f"{own}.intermediate_query", "out"),
            f"{block}.hook_mlp_out": (f"{own}.output_query.dense", "out"),
            f"{block}.hook_resid_post": (own, "out"),
        }
        for kind, path, added, mid in kinds:
            for one, name in zip("qkv", ("query", "key", "value"), strict=True):
                places[f"{block}.{kind}.hook_{one}"] = (f"{own}.{path}.attention.{name}", "out")
            places |= {
                f"{block}.{kind}.hook_z": (f"{own}.{path}.attention", "out"),
                f"{block}.{added}": (f"{own}.{path}.output.dense", "out"),
                f"{block}.{mid}": (f"{own}.{path}", "out"),
            }
    return places
