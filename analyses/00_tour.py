# %% [markdown]
# # A tour: which heads look at the object, and does the answer depend on them?
#
# **Question.** One picture, one question. Which attention heads look at what is asked for, and
# would the answer be the same without them?
#
# **Method.** From loading a model to a small experiment with a control, in the order in which one
# asks: look, check the map, take it away, patch it in, read the layers, follow the words, and at
# last judge a method, our own one among them. Every result draws itself. The model is a small one
# that was trained on an embedded world; the calls are the same for a LLaVA from the Hub.

# %%
import importlib.util

if importlib.util.find_spec("clva_lens") is None:  # in Colab
    get_ipython().run_line_magic("pip", "install -q clva-lens")

# %% tags=["parameters"]
model = "toy-llava"
questions = 60

# %%
import math
from dataclasses import dataclass, replace

import torch
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.methods.base import BiasSession, Method, row_bias
from clva_lens.toy.scenes import render, sample_scenes

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
lens

# %% [markdown]
# ## A picture and a question
#
# `model.prompt` takes a path, bytes, a PIL image or an array. Here it is a scene whose objects are
# known, so that we can ask about one of them, and make the same scene without it.

# %%
scene = sample_scenes(3, seed=7)[0]
kind = max(scene.kinds, key=lambda one: scene.patches(one).sum())
question = f"is there a {kind} in the image?"
photo = render(scene)
there = lens.prompt(photo, question)
there

# %% [markdown]
# ## Look
#
# One forward pass, no attention matrix is kept. Fig. 1: the share of its attention that each head
# gives to the image, with the visually sensitive and insensitive heads marked.

# %%
attention = cl.trace_attention(lens, there)
attention

# %% [markdown]
# Where the sensitive heads look, layer by layer, with what was asked for outlined:

# %%
on_object = torch.from_numpy(scene.patches(kind)).flatten()
attention.draw_image(there, heads="sensitive", outlines={"objects": on_object})

# %% [markdown]
# ## Is it the object?
#
# The pointing game asks whether a map's largest value lies on the object, and how much of the map
# does. Chance is the share of the picture that the object covers.

# %%
game = cl.pointing_game(attention.maps, on_object, layers=attention.layers)
game

# %%
shares = game.shares
best = [divmod(int(at), shares.shape[1]) for at in shares.flatten().argsort(descending=True)[:12]]
looking = [(attention.layers[row], head) for row, head in best]
Markdown(f"The twelve heads that look at the {kind} most: {looking}")

# %% [markdown]
# ## Does the answer depend on them?
#
# A map is no cause. We hide the image from these heads, and, as the control, from as many drawn at
# random; and from all heads of the middle layers.

# %%
generator = torch.Generator().manual_seed(0)
drawn = torch.randperm(shares.numel(), generator=generator)[: len(looking)].tolist()
random_heads = [(attention.layers[at // shares.shape[1]], at % shares.shape[1]) for at in drawn]
conditions = {
    "nothing hidden": None,
    "hidden from the 12 heads": cl.KnockOut(heads=looking),
    "hidden from 12 random heads": cl.KnockOut(heads=random_heads),
    "hidden from all after the anchor": cl.KnockOut(),
    "CLVA": cl.CLVA(),
}
margins = {name: cl.generate(lens, there, one).margins[0] for name, one in conditions.items()}
Markdown("\n".join(f"- {name}: yes−no margin {value:+.2f}" for name, value in margins.items()))

# %% [markdown]
# ## Where is the answer kept?
#
# Activation patching runs the scene *without* the object with some activations of the scene with
# it: 0 is the answer without, 1 the answer with it.

# %%
rest = replace(scene, things=tuple(one for one in scene.things if one.kind != kind))
gone = lens.prompt(render(rest), question)
patched = cl.patch_activations(lens, there, gone)
patched

# %% [markdown]
# ## What do the layers say?
#
# The logit lens reads each layer as if it were the last one. On image tokens: where the residual
# stream itself says what was asked for.

# %%
cl.logit_lens(lens, there, span="image", tokens=kind)

# %% [markdown]
# Direct logit attribution divides the margin among heads and image tokens; the parts add up.

# %%
cl.direct_logit_attribution(lens, there)

# %% [markdown]
# ## A caption, word by word
#
# For every generated word: where the model looked as it wrote it, and how sure it was. Objects
# that are not in the scene would be red.

# %%
cl.caption_attention(lens, (photo, "describe the image."), objects=scene.kinds)

# %% [markdown]
# ## To touch
#
# Every word, layer and head of a prompt, before and after a method: one file that opens in any
# browser, without Python. `told.show()` is the same here in the notebook, with
# `pip install "clva-lens[explorer]"`.

# %%
told = cl.explore(lens, there, cl.CLVA(), objects=on_object, progress=False)
told.to_html("explorer.html")
told

# %% [markdown]
# ## All at once
#
# `cl.scan` runs most of this, ranks what it finds, and puts a null beside each number.

# %%
scanned = cl.scan(lens, there, objects=on_object, progress=False)
scanned

# %%
print(scanned)

# %% [markdown]
# ## A method of one's own, and its control
#
# A method says which sessions it opens. This one has the last row look harder at the middle of the
# picture, where photographers put things. Its control shuffles the weights among the image tokens:
# what is left of a gain then is not about *where*. Differences are paired, and their intervals
# resample pictures.


# %%
@dataclass(frozen=True, kw_only=True)
class LookAtTheMiddle(Method):
    """The last row gives image tokens up to ``gain`` times the weight, the more central the more."""

    name = "look-at-the-middle"
    paper = "ours: an example"
    sites = ("decoder",)
    gain: float = 4.0

    def sessions(self, target):
        return [BiasSession("decoder", target.at("decoder").layers, self.bias)]

    def bias(self, call):
        side = int(call.step.visual.shape[-1] ** 0.5)
        off = torch.linspace(-1, 1, side).abs()
        central = 1 - (off[:, None] + off) / 2
        weights = central.flatten().expand(call.step.visual.shape) * math.log(self.gain)
        return row_bias(call, "last", weights.to(call.query.device))


mine = LookAtTheMiddle()
asked = "pope/toy/adversarial"
methods = {"greedy": None, "mine": mine, "shuffled": cl.Shuffled(mine), "knock-out": cl.KnockOut()}
reports = dict(
    zip(
        methods,
        cl.evaluate(lens, asked, methods=list(methods.values()), limit=questions, progress=False),
        strict=True,
    )
)
compared = {
    name: cl.compare(reports["greedy"].score, reports[name].score)
    for name in ("mine", "shuffled", "knock-out")
}
compared["mine"].draw("mine", against="greedy")

# %%
compared["knock-out"].draw("knock-out", against="greedy")

# %% [markdown]
# ## Finding

# %%
changes = {name: one.metrics["accuracy"].difference for name, one in compared.items()}
record.keep_metrics(
    margin=margins["nothing hidden"],
    margin_without_the_heads=margins["hidden from the 12 heads"],
    margin_without_random_heads=margins["hidden from 12 random heads"],
    margin_without_the_image=margins["hidden from all after the anchor"],
    object_share_of_the_best_head=float(shares.max()),
    chance=game.chance,
    **{f"accuracy_change_{name.replace('-', '_')}": one.estimate for name, one in changes.items()},
)
record.keep_rows("margins", [{"condition": name, "margin": one} for name, one in margins.items()])
Markdown(
    f"The head that looks at the {kind} most has {float(shares.max()):.2f} of its image attention "
    f"on it ({game.chance:.2f} by chance). The margin of yes is {margins['nothing hidden']:+.2f}; "
    f"with the image hidden from the twelve that look most it is "
    f"{margins['hidden from the 12 heads']:+.2f}, from twelve drawn at random "
    f"{margins['hidden from 12 random heads']:+.2f}. On {questions} questions, hiding the image "
    f"changes accuracy by {100 * changes['knock-out'].estimate:+.1f} points, looking at the middle by "
    f"{100 * changes['mine'].estimate:+.1f}, and its shuffled control by "
    f"{100 * changes['shuffled'].estimate:+.1f}."
)
