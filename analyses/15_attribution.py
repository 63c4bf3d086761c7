# %% [markdown]
# # What do gradients say that patching says?
#
# **Question.** Do first-order estimates order heads, layers and edges as exact patches of them do,
# and what do they save?
#
# **Method.** The same scene with an object (source) and without it (target), asked whether it is
# there; the metric is the margin logit(yes) − logit(no). Every head of every layer is patched at
# the image's, the text's and the last row's positions, and so is the residual stream entering each
# layer; `cl.attribution_patching` estimates the same patches. Of edges between a head or MLP and a
# later layer, those that EAP does not hold to be nothing are drawn at random, and each is patched. Spearman's ρ
# compares the orders, over the heads (or edges) of all pairs at once; its interval is a bootstrap over
# pairs, and with fewer than ten pairs over heads or edges of one ranking. Passes are counted as prompts
# that the last layer reads, and backward passes of the gradient.
# EAP's slope is that of the target, from where an edge is patched; EAP-IG's is the mean over the way
# to the source.
#
# **Nulls.** The same estimates dealt out at random to the heads of their layer (so that an order of
# layers alone counts for the null), and to any edge.

# %% tags=["parameters"]
model = "toy-llava"
pairs = 10
edges = 24
steps = 5
seed = 7

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.benchmarks.statistics import FEWEST
from clva_lens.experiments.measuring import require_several
from clva_lens.lens.edge_attribution import patch_edges
from clva_lens.science.ranks import rank_correlation
from clva_lens.toy.scenes import render, sample_scenes

record = cl.new_record()
require_several("this analysis", pairs, pairs)
lens = cl.load(model)
record.uses(lens)
spans = ("image", "text", "last")
asked = []
for scene in sample_scenes(pairs, seed):
    kind = scene.things[0].kind
    rest = tuple(thing for thing in scene.things if thing.kind != kind)
    without = replace(scene, things=rest)
    question = f"is there a {kind} in the image?"
    asked.append(tuple(lens.prompt(render(one), question) for one in (scene, without)))


class Counted:
    """Prompts that the decoder's last layer reads."""

    def __enter__(self):
        self.read = 0
        layer = lens.hf_model.get_decoder().layers[-1]
        self.handle = layer.register_forward_hook(self.count)
        return self

    def count(self, module, given, out):
        self.read += len(out[0] if isinstance(out, tuple) else out)

    def __exit__(self, *_):
        self.handle.remove()


# %% [markdown]
# ## Heads and layers

# %%
guessed, measured = {}, {}  # by part and span: [pair, layer, column]
passes = {"estimate": 0, "heads": 0, "one span": 0}
for there, gone in asked:
    with Counted() as counted:
        estimates = cl.attribution_patching(lens, there, gone)
    passes["estimate"] += counted.read + 1
    for part, each in (("z", "head"), ("resid_pre", None)):
        for span in spans:
            options = {"spans": span, "part": part, "each": each}
            with Counted() as counted:
                exact = cl.patch_activations(lens, there, gone, progress=False, **options)
            if part == "z":
                passes["heads"] += counted.read
                passes["one span"] += counted.read if span == "last" else 0
            guess = estimates.patching(part, span, each=each)
            guessed.setdefault((part, span), []).append(guess.effect)
            measured.setdefault((part, span), []).append(exact.effect)
guessed, measured = (
    {key: torch.stack(x).numpy() for key, x in one.items()} for one in (guessed, measured)
)
dealt = np.random.default_rng(seed)


def shuffled(values):
    """The estimates of a layer, dealt out to its heads; where there is one a layer, to layers."""
    return dealt.permuted(values, axis=-1 if values.shape[-1] > 1 else -2)


def order(estimate, exact):
    """Spearman's ρ over all pairs, with its interval over pairs where there are enough of them."""
    own = rank_correlation(estimate, exact)
    if len(estimate) < FEWEST:
        return own.estimate, own.low, own.high
    draws = np.random.default_rng(seed).integers(0, len(estimate), (400, len(estimate)))
    drawn = [rank_correlation(estimate[i], exact[i], resamples=1).estimate for i in draws]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return own.estimate, float(low), float(high)


def kept(of, how, values, exact):
    """A row on how well values order what exact patching finds."""
    value, low, high = order(values, exact)
    single = [one.estimate for one in map(rank_correlation, values, exact)]
    return {
        "of": of,
        "how": how,
        "rho": value,
        "low": low,
        "high": high,
        "median_of_pairs": float(np.nanmedian(single)),
        "largest_exact": float(np.abs(exact).max()),
        "largest_estimate": float(np.abs(values).max()),
    }


rows, curves = [], []
names = {"z": "heads", "resid_pre": "layers"}
for (part, span), exact in measured.items():
    estimate = guessed[part, span]
    for how, values in (("estimate", estimate), ("shuffled", shuffled(estimate))):
        rows.append(kept(f"{names[part]}, {span}", how, values, exact))
        for layer in range(exact.shape[1]) if part == "z" and span != "text" else ():
            value, low, high = order(values[:, layer], exact[:, layer])
            if np.isfinite([value, low, high]).all():
                curves.append(
                    {
                        "quantity": f"ρ with exact patching, heads at the span “{span}”",
                        "run": how,
                        "layer": layer,
                        "value": value,
                        "low": low,
                        "high": high,
                    }
                )
record.keep_rows("by_layer", curves)
record.draw("layer_curves", table="by_layer")

# %% [markdown]
# ## Edges

# %%
found = {"eap": [], "eap-ig": []}
exact_edges, cost = [], {}
for there, gone in asked:
    attributions = {
        how: cl.edge_attribution(lens, there, gone, how=how, steps=steps) for how in found
    }
    eap = attributions["eap"]
    cost = {how: one.passes for how, one in attributions.items()}
    some = (eap.exists & (eap.scores[0] != 0)).nonzero().tolist()
    chosen = [some[i] for i in dealt.permutation(len(some))[:edges]]
    named = [(eap.writers[u], eap.readers[v]) for u, v in chosen]
    exact_edges.append(patch_edges(lens, there, gone, named, progress=False)[0].numpy())
    for how, one in attributions.items():
        found[how].append([float(one.scores[0, u, v]) for u, v in chosen])
exact_edges = np.array(exact_edges)
for how, values in {**found, "shuffled": dealt.permuted(found["eap"], axis=1)}.items():
    rows.append(kept("edges", how, np.array(values), exact_edges))
record.keep_rows("orders", rows)
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## Finding


# %%
def said(of: str, how: str) -> str:
    row = next(row for row in rows if row["of"] == of and row["how"] == how)
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def rho(of: str, how: str) -> float:
    return next(row["rho"] for row in rows if row["of"] == of and row["how"] == how)


at = {key: value / len(asked) for key, value in passes.items()}
saved, saved_one = at["heads"] / at["estimate"], at["one span"] / at["estimate"]
image = next(row for row in rows if row["of"] == "layers, image" and row["how"] == "estimate")
record.keep_metrics(
    pairs=len(asked),
    rho_heads_image=rho("heads, image", "estimate"),
    rho_heads_text=rho("heads, text", "estimate"),
    rho_heads_last=rho("heads, last", "estimate"),
    rho_layers_image=rho("layers, image", "estimate"),
    rho_edges_eap=rho("edges", "eap"),
    rho_edges_eap_ig=rho("edges", "eap-ig"),
    rho_edges_shuffled=rho("edges", "shuffled"),
    passes_of_an_estimate=at["estimate"],
    passes_of_heads_at_one_span=at["one span"],
    passes_of_heads_at_all_spans=at["heads"],
)
Markdown(
    f"On {len(asked)} pairs and **{model}**, estimated and exact heads × layers have ρ = "
    + ", ".join(f"{said(f'heads, {span}', 'estimate')} ({span})" for span in spans)
    + ", shuffled within layers "
    + ", ".join(said(f"heads, {span}", "shuffled") for span in spans)
    + f". Patches of the whole stream: {said('layers, image', 'estimate')} (image), "
    f"{said('layers, text', 'estimate')} (text); an image's patch moves the margin by up to "
    f"{image['largest_exact']:.1f} and is estimated at up to {image['largest_estimate']:.1f}. Edges: EAP "
    f"{said('edges', 'eap')} ({cost['eap']} passes), EAP-IG {said('edges', 'eap-ig')} ({cost['eap-ig']} passes), "
    f"shuffled {said('edges', 'shuffled')}. An estimate takes {at['estimate']:.0f} passes; exact heads × layers "
    f"take {at['one span']:.0f} at one span, **{saved_one:.0f} times as many**, and {at['heads']:.0f} at the three, "
    f"**{saved:.0f} times as many**: the same three passes estimate all spans."
)
