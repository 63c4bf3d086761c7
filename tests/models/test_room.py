"""Keys and values with room behind them: transformers' own layers to the bit, whatever is done."""

import copy
import random

import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture
from transformers import DynamicCache

import clva_lens as cl
from clva_lens.lens.prefix import read
from clva_lens.lens.sharing import Prefixes
from clva_lens.models.kv_cache import CACHE
from clva_lens.models.room import ANSWER, Room, RoomyLayer

LAYERS, HEADS, LENGTH, KEYS, VALUES = 2, 3, 5, 4, 6
ROWS = [0, 1, 1]


def states(batch, count, seed):
    dice = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, HEADS, count, width, generator=dice) for width in (KEYS, VALUES)
    )


def beginning():
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*states(2, LENGTH, layer), layer)
    return cache


def selected():
    cache = beginning()
    cache.batch_select_indices(torch.tensor(ROWS))
    return cache


def roomy(room=None):
    return (room or Room(6 - ANSWER)).fork(beginning(), torch.tensor(ROWS))


def same(one, other):
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


def rows_of(cache):
    return len(cache.layers[0].keys)


CHANGES = {
    "crop": lambda cache: cache.crop(-1),
    "reorder": lambda cache: cache.reorder_cache(torch.arange(rows_of(cache)).flip(0)),
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0, 0])),
}


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_any_order_of_changes_is_that_of_transformers_own(seed):
    """And what a pass was handed stays as it was, cropped and read again or not."""
    dice = random.Random(seed)
    both, handed = [roomy(), selected()], []
    for number in range(12):
        name = dice.choice([*CHANGES, *["update"] * 6]) if number > 1 else "update"
        if name == "update":
            new = states(rows_of(both[0]), dice.choice([1, 1, 3]), 100 + number)
            for layer in range(LAYERS):
                found, wanted = (cache.update(*new, layer) for cache in both)
                assert all(map(torch.equal, found, wanted))
                handed += [(one, one.clone()) for one in found]
        else:
            both = [CHANGES[name](cache) or cache for cache in both]
        assert same(*both)
    assert handed
    assert all(torch.equal(one, kept) for one, kept in handed)


def test_what_fits_is_written_in_place_and_the_rest_is_copied():
    cache = roomy(Room(2 - ANSWER))
    (layer, _) = cache.layers
    assert isinstance(layer, RoomyLayer)
    at = layer.keys.data_ptr()
    with torch.no_grad():
        for moved in (False, False, True):
            cache.update(*states(3, 1, 9), 0)
            assert (layer.keys.data_ptr() != at) is moved


def test_two_forks_at_once_have_room_of_their_own_and_two_in_turn_the_same():
    room, cache, rows = Room(4 - ANSWER), beginning(), torch.tensor(ROWS)
    kept = copy.deepcopy(cache)
    with torch.no_grad():
        first = room.fork(cache, rows)
        first.update(*states(3, 2, 1), 0)
        second = room.fork(cache, rows)
        at = second.layers[0].keys.data_ptr()
        assert at != first.layers[0].keys.data_ptr()
        second.update(*states(3, 2, 2), 0)
        assert torch.equal(first.layers[0].keys[..., LENGTH:, :], states(3, 2, 1)[0])
        del second
        third = room.fork(cache, rows)
        assert third.layers[0].keys.data_ptr() == at
        assert same(third, selected())
        layers = third.layers  # whoever keeps a layer keeps its room
        del third
        assert room.fork(cache, rows).layers[0].keys.data_ptr() != at
        assert layers[0].keys.data_ptr() == at
        fewer = room.fork(cache, torch.tensor([1]))
        assert torch.equal(fewer.layers[0].keys, kept.layers[0].keys[1:])
    assert same(cache, kept)


def test_gradients_reach_what_was_read_before():
    """A write in place would change what an earlier pass needs to go back."""
    found = []
    for cache in (roomy(), selected()):
        new = [one.requires_grad_() for one in states(3, 1, 3)]
        for _ in range(2):
            keys, values = cache.update(*new, 0)
        (keys.square().sum() + values.square().sum()).backward()
        found.append([one.grad for one in new])
    assert all(map(torch.equal, *found))


METHODS = {
    "none": None,
    "CLVA": cl.CLVA(tau=1.0),
    "KnockOut": cl.KnockOut(),
    "PAI": cl.PAI(alpha=0.5, guidance=1.7),
    "VCD": cl.VCD(noise_step=400),
}


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_methods_that_take_turns_say_what_each_says_alone(tokens):
    """Answers of 40 tokens outgrow the room."""
    lens = lens_of("grouped", "sdpa")
    asked = read(lens, [picture(0), picture(1)]).ask(QUESTIONS, [0, 1, 1])
    together = asked.for_several_runs()
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def logits(inputs, method):
        with torch.no_grad(), cl.intervening(lens, *([] if method is None else [method])):
            out = lens.hf_model.generate(
                **inputs, **options, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits)

    plain, places = None, set()
    for method in METHODS.values():
        inputs = together.by_beam(1)
        places.add(inputs[CACHE].layers[0].keys.data_ptr())
        found, wanted = logits(inputs, method), logits(asked, method)
        del inputs
        assert torch.equal(found, wanted)
        plain = wanted if plain is None else plain
        known = wanted.isfinite()
        assert method is None or (wanted - plain)[known].abs().max() > 0.05
    assert len(places) == 1


def test_who_asks_the_same_again_gets_the_same_room():
    lens, prefixes = lens_of("full", "sdpa"), Prefixes()
    given = (lens, [picture(0)] * 2, QUESTIONS[:2], None, "picture")
    one, two = (prefixes.ask(*given) for _ in range(2))
    assert one is two
    assert one.room is not None
    assert one.row(0).room is None
