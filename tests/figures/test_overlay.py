"""Maps on a photo: each value lies where its token lies, and the scale is what it says it is."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import lens_of, picture

import clva_lens as cl
from clva_lens.figures import photo_maps
from clva_lens.ground.errors import ClvaLensError, ParameterError, PromptError

PHOTO = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)


def asked():
    return lens_of("full", "sdpa").prompt(PHOTO, "what is it ?")


def hot(prompt, *tokens):
    """Maps of one panel a token, which have one value at it."""
    count = prompt.spans.visual_count
    return torch.nn.functional.one_hot(torch.tensor(tokens), count).float()


def heat(drawing, panel=0):
    """The cells' opacity, and their edges on the drawn photo (left, right, lower, upper)."""
    base, drawn = drawing.axes[panel].images
    return drawn.get_array()[..., 3], drawn.get_extent(), base.get_array().shape


@pytest.mark.parametrize("times", [1, 20])  # a large photo is drawn smaller
@pytest.mark.parametrize("photo", ["seen", "whole"])
def test_a_value_is_drawn_where_its_token_lies(photo, times):
    large = PHOTO.repeat(times, axis=0).repeat(times, axis=1)
    prompt = lens_of("full", "sdpa").prompt(large, "what is it ?")
    piece = prompt.piece_at("decoder")
    tokens = (0, piece.columns - 1, len(piece.tokens) - 2)
    drawing = cl.overlay(prompt, hot(prompt, *tokens), photo=photo)
    for panel, token in enumerate(tokens):
        opacity, (left, right, lower, upper), size = heat(drawing, panel)
        row, column = np.argwhere(opacity == opacity.max()).squeeze()
        wide, high = (right - left) / piece.columns, (lower - upper) / piece.rows
        found = [left + column * wide, upper + row * high]
        found += [found[0] + wide, found[1] + high]
        cell = piece.cells[piece.tokens.tolist().index(token)].tolist()
        if photo == "seen":
            cell = [edge - piece.box[axis % 2] for axis, edge in enumerate(cell)]
        scale = size[1] / (80 * times if photo == "whole" else piece.box[2] - piece.box[0])
        assert found == pytest.approx([edge * scale for edge in cell], abs=0.6)
    whole = heat(drawing)[1]
    assert (whole[0] > 0) == (photo == "whole")  # the processor crops the sides of a wide photo


def test_colours_end_where_the_picture_says():
    values = np.tile(np.linspace(0, 1, 576).reshape(24, 24), (3, 1, 1))
    values[1] *= 2
    values[2, 5, 5] = 50.0  # a sink
    tops = {}
    for scale in ("shared", "panel", "p99"):
        drawing = photo_maps(PHOTO / 255, values, scale=scale, notes=["a", "b", "c"])
        tops[scale] = float(drawing.axes[-1].get_ylim()[1])
        said = " ".join(text.get_text() for text in drawing.texts) + str(drawing._supxlabel)
        assert {"shared": "largest value", "panel": "own scale", "p99": "99th"}[scale] in said
        notes = [ax.get_xlabel() for ax in drawing.axes[:3]]
        assert all(("ends at" in note) == (scale == "panel") for note in notes)
        seen = heat(drawing)[0]
        faint = (seen < 0.3).mean()
        assert (faint > 0.9) == (scale == "shared")  # the sink hides all but itself
    assert tops["shared"] == 50.0 and tops["panel"] == 1.0
    assert tops["p99"] == pytest.approx(np.quantile(values, 0.99)) and tops["p99"] < 2


def test_signed_maps_have_a_scale_around_0():
    prompt = asked()
    values = hot(prompt, 3)[0] - hot(prompt, 4)[0]
    drawing = cl.overlay(prompt, values, scale="shared")
    assert drawing.axes[-1].get_ylim() == (-1.0, 1.0)
    colours = drawing.axes[0].images[1].get_array().reshape(-1, 4)
    red, blue = colours[3, [0, 2]], colours[4, [0, 2]]
    assert red[0] > red[1] and blue[0] < blue[1] and colours[0, 3] < colours[3, 3]
    nothing = cl.overlay(prompt, 0 * values, smooth=True, outlines={"objects": values > 0})
    assert nothing._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused():
    lens, prompt = lens_of("full", "sdpa"), asked()
    values = hot(prompt, 1)
    both = lens.prompt([picture(0), picture(1)], ["what is it ?"] * 2)
    for error, message, given, options in (
        (ParameterError, r"shape \(1, 3\).*image tokens: \d+ at the decoder", values[:, :3], {}),
        (ParameterError, r"photo is 'all'. Pass 'seen' or 'whole'", values, {"photo": "all"}),
        (ClvaLensError, r"scale is 'log'. Pass 'shared'", values, {"scale": "log"}),
        (ClvaLensError, r"2 titles, but 1 maps", values, {"titles": ["a", "b"]}),
        (ClvaLensError, "nan or infinite", values / 0, {}),
    ):
        with pytest.raises(error, match=message):
            cl.overlay(prompt, given, **options)
    with pytest.raises(PromptError, match=r"a batch of 2. Pass prompt.row"):
        cl.overlay(both, values)
    row = cl.overlay(both.row(1), values)
    assert len(row.axes) == 2
    bare = cl.trace_attention(lens, {**prompt})
    with pytest.raises(PromptError, match=r"not made of one. Pass model.prompt"):
        bare.draw_image(as_bare(lens, prompt))


def as_bare(lens, prompt):
    from clva_lens.models.prompt import as_prompt

    return as_prompt(lens, {**prompt})


def test_results_draw_themselves():
    lens = lens_of("full", "sdpa")
    prompt = asked()
    one = cl.trace_attention(lens, prompt)
    many = cl.trace_attention(lens, lens.prompt([PHOTO, picture(1)], ["what is it ?"] * 2))
    with torch.no_grad(), cl.intervening(lens, cl.CLVA()) as run:
        lens.hf_model(**prompt)
    mask = torch.zeros(prompt.spans.visual_count, dtype=torch.bool)
    mask[:5] = True
    drawn = {
        "trace": one.draw(),
        "classes": many.heads().draw(),
        "drift": cl.attention_drift(many).draw(),
        "image": one.draw_image(prompt, layers=[2, 5], heads={2: [0], 5: [1, 3]}, columns=1),
        "anchors": run.anchors.draw(prompt),
        "pointing": cl.pointing_game(one.maps, mask, layers=one.layers).draw(),
    }
    for name, figure in drawn.items():
        assert figure.rows and figure._repr_png_().startswith(b"\x89PNG"), name
    shown = torch.tensor([row["value"] for row in drawn["image"].rows])
    wanted = one.saliency({2: [0], 5: [1, 3]})[[one.layers.index(2), one.layers.index(5)]]
    assert torch.allclose(shown, prompt.on_grid(wanted).flatten().float(), atol=1e-7)
    written = {text.get_text() for text in one.draw("elsewhere").axes[0].texts}
    assert f"{float(1 - one.intensity[0, 0]):.2f}" in written
    for thing in (one, many, one.heads(), cl.attention_drift(one)):
        assert thing._repr_png_() is not None and "0x" not in repr(thing)
    with pytest.raises(ParameterError, match=r"the trace has no layer 99. Pass some of"):
        one.draw_image(prompt, layers=[99])
    with pytest.raises(ParameterError, match=r"of a batch. Pass trace\[i\]"):
        many.draw_image(prompt)


def test_words_of_the_question_are_drawn(one):
    """Each word's row by layer, against the pattern that eager attention puts out."""
    prompt = one.prompt(PHOTO, "is there a cup ?")
    trace = cl.trace_attention(one, prompt, each_row=True)
    drawn = trace.draw_image(prompt, layers=[2, 5], heads={2: [0], 5: [1, 3]}, tokens=["cup", -1])
    titles = [axes.get_title() for axes in drawn.axes[:2]]
    assert titles == ["layer 2, 'cup'", "layer 2, 'assistant:'"]
    ids = prompt["input_ids"][0].tolist()
    row = len(ids) - 1 - ids[::-1].index(one.words.convert_tokens_to_ids("cup"))
    eager = lens_of("full", "eager")
    with torch.no_grad():
        patterns = eager.hf_model(**prompt, output_attentions=True).attentions
    image = prompt.spans.image[0]
    wanted = [
        patterns[layer][0, heads, at].mean(dim=0)[image]
        for layer, heads in ((2, [0]), (5, [1, 3]))
        for at in (row, -1)
    ]
    shown = torch.tensor([value["value"] for value in drawn.rows])
    grids = prompt.on_grid(torch.stack(wanted)).flatten()
    assert (shown - grids).abs().max() < 1e-5 and float(grids.std()) > 1e-3
    assert len(trace.draw_image(prompt, tokens=["cup"]).axes) == 2
    both = cl.trace_attention(one, one.prompt([PHOTO] * 2, ["what is it ?"] * 2), each_row=True)
    assert torch.equal(both[1].rows[:, :, -1], both[1].maps) and len(both[1].words[0]) > 3
    with pytest.raises(ParameterError, match="the text has no token 'dog'"):
        trace.draw_image(prompt, tokens=["dog"])
    with pytest.raises(ParameterError, match="each_row=True"):
        cl.trace_attention(one, prompt).draw_image(prompt, tokens=[0])


def test_a_model_says_what_it_is():
    lens = lens_of("full", "sdpa")
    assert "site 'decoder'" in repr(lens) and len(repr(lens)) < 1000
    assert "(vision_tower)" in str(lens)


def test_comparisons_and_reports_draw_themselves(tmp_path):
    model = cl.load("toy-llava", check=False)
    made = [
        cl.evaluate(model, name, method=method, limit=24, progress=False)
        for name in ("pope/toy/random", "chair/toy")
        for method in (None, cl.KnockOut())
    ]
    for plain, blind in (made[:2], made[2:]):
        found = cl.compare(plain.score, blind.score)
        drawn = found.draw("knock-out", against="greedy")
        changes = {row["metric"]: row["change"] for row in drawn.rows}
        defined = {name: pair.difference.estimate for name, pair in found.metrics.items()}
        defined = {name: value for name, value in defined.items() if np.isfinite(value)}
        assert len(defined) >= 3 and any(defined.values())
        assert {name: changes[name] for name in defined} == defined
        assert found._repr_png_() is not None
        shown = {row["metric"]: row["value"] for row in plain.draw().rows}
        assert len(shown) >= 3
        for name, value in shown.items():
            assert value == pytest.approx(plain.metrics[name])
        assert plain._repr_png_() is not None
    null = cl.compare(made[0].score, made[0].score).draw()
    assert {row["change"] for row in null.rows} == {0.0}
    one = dataclasses.replace(made[0], rows=made[0].rows[:1])
    assert one._repr_png_() is None  # one picture has no interval
