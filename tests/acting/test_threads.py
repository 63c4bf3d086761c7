"""A run is its thread's and its task's: others run plain, or are refused in words.

Nothing here depends on who is faster: a hook on a layer holds one thread until the other is done.
"""

import asyncio
import contextlib
import contextvars
import gc
import threading
from functools import cache

import pytest
import torch
from test_state import state
from tiny_models import KERNELS, QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.ground.errors import InterventionError
from clva_lens.lens.asking import Asking
from clva_lens.lens.generate import generate_batches
from clva_lens.methods.base import METHODS
from clva_lens.models.belonging import HERE
from clva_lens.models.kv_cache import CACHE, cache_of

SOON = 60
OTHERS = (cl.KnockOut(), cl.VCD(), cl.DeCo())
ACTING = [name for name in METHODS.names() if name != "opera"]  # it decodes by itself: see below


@pytest.fixture(params=KERNELS)
def lens(request):
    return lens_of("full", request.param)


@pytest.fixture(scope="module")
def untouched():
    models = [lens_of("full", kernel).hf_model for kernel in KERNELS]
    return models, [state(model) for model in models]


@pytest.fixture(autouse=True)
def unchanged(untouched):
    models, before = untouched
    yield
    assert not _ACTIVE
    assert not HERE.get()
    assert [state(model) for model in models] == before


def asked(lens, which=0):
    return lens.prompt(picture(which), QUESTIONS[which])


def logits(lens, which=0):
    with torch.no_grad():
        return lens.hf_model(**asked(lens, which)).logits


def under(lens, *methods, which=0):
    with cl.intervening(lens, *methods):
        return logits(lens, which)


def watched(lens, which=0):
    with cl.observing(lens) as seen:
        logits(lens, which)
    return seen.trace.intensity


def answers(lens, method, which=0, beams=False):
    how = cl.Beam(num_beams=3, max_new_tokens=3) if beams else cl.Greedy(max_new_tokens=3)
    found = cl.generate(lens, asked(lens, which), method, how, progress=False)
    return torch.stack(found.ids)


def same(found, wanted):
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found.shape == wanted.shape and torch.equal(found, wanted)


def beside(lens, held, call, visit=1):
    """Return what ``held`` gives in a thread that waits in a layer, and ``call`` meanwhile."""
    reached, go, results, visits = threading.Event(), threading.Event(), {}, []

    def wait(*_):
        if threading.current_thread() is thread:
            visits.append(1)
            if len(visits) == visit:
                reached.set()
                assert go.wait(SOON)

    def run():
        try:
            results["held"] = held()
        except Exception as error:
            results["held"] = error
        reached.set()

    thread = threading.Thread(target=run)
    hook = lens.hf_model.model.language_model.layers[6].register_forward_pre_hook(wait)
    try:
        thread.start()
        assert reached.wait(SOON)
        assert len(visits) == visit, results
        try:
            results["call"] = call()
        except Exception as error:
            results["call"] = error
        go.set()
        thread.join(SOON)
        assert not thread.is_alive()
    finally:
        go.set()
        hook.remove()
    return results["held"], results["call"]


def everything(lens, count=8):
    """What a second thread does: plainly, under methods, observing, tracing, generating."""
    calls = (
        lambda: logits(lens, 1),
        lambda: under(lens, OTHERS[0], which=1),
        lambda: under(lens, OTHERS[1], which=1),
        lambda: under(lens, OTHERS[2], which=1),
        lambda: watched(lens, 1),
        lambda: cl.trace_attention(lens, asked(lens, 1), OTHERS[0]).maps,
        lambda: answers(lens, None, 1),
        lambda: answers(lens, OTHERS[1], 1),
    )
    return [call() for call in calls[:count]]


@cache
def alone():
    """The same without another thread."""
    return everything(lens_of("full", "sdpa"))


@pytest.mark.parametrize("name", ACTING)
def test_beside_a_pass_under_a_method(name):
    lens, method = lens_of("full", "sdpa"), METHODS.get(name)()
    wanted = under(lens, method), alone()
    assert not torch.equal(wanted[0], logits(lens))
    found = beside(lens, lambda: under(lens, method), lambda: everything(lens))
    assert same(list(found), list(wanted))


@pytest.mark.parametrize("name", METHODS.names())
def test_beside_a_generation_under_a_method(name):
    lens, method = lens_of("full", "sdpa"), METHODS.get(name)()
    beams = method.decodings == ("beam",)
    wanted = answers(lens, method, beams=beams), alone()[:3]
    found = beside(
        lens, lambda: answers(lens, method, beams=beams), lambda: everything(lens, 3), visit=3
    )
    assert same(list(found), list(wanted))


def test_beside_an_observer():
    lens = lens_of("full", "sdpa")
    wanted = watched(lens), alone()
    found = beside(lens, lambda: watched(lens), lambda: everything(lens))
    assert same(list(found), list(wanted))


def test_beside_a_plain_pass(lens):
    """The other thread's runs come and go while this one has none."""
    wanted = logits(lens), everything(lens)
    found = beside(lens, lambda: logits(lens), lambda: everything(lens))
    assert same(list(found), list(wanted))


def test_first_to_open_is_first_to_close(lens):
    """The kernel's name stays changed until the last run ends."""
    config = lens.hf_model.model.language_model.config
    kernel, method = config._attn_implementation, OTHERS[0]
    wanted = under(lens, method), under(lens, cl.CLVA(tau=1.0), which=1)
    first, opened, second = threading.Event(), threading.Event(), []

    def run():
        with cl.intervening(lens, cl.CLVA(tau=1.0)):
            opened.set()
            assert first.wait(SOON)
            second.append(logits(lens, 1))
            second.append(config._attn_implementation)

    thread = threading.Thread(target=run)
    with cl.intervening(lens, method):
        thread.start()
        assert opened.wait(SOON)
        found = logits(lens)
    assert config._attn_implementation == f"clva_{kernel}"
    plain = logits(lens)
    first.set()
    thread.join(SOON)
    assert same([found, second[0]], list(wanted))
    assert same(plain, logits(lens))
    assert second[1] == f"clva_{kernel}"
    assert config._attn_implementation == kernel


# ── nnsight's traces ──


def traced(lens, method):
    with lens.trace(asked(lens)):
        cl.intervene(method)
        found = lens.output.logits.save()
    return found  # noqa: RET504 - a block of a trace returns nothing


def test_beside_a_trace(lens):
    """A trace takes part in every call of its model, so that other threads have to wait."""
    wanted = traced(lens, OTHERS[0])
    for call in (logits, watched, lambda lens: under(lens, OTHERS[1])):
        found, refused = beside(lens, lambda: traced(lens, OTHERS[0]), lambda: call(lens))  # noqa: B023
        assert same(found, wanted)
        assert isinstance(refused, InterventionError)
        assert "another thread traces this model" in str(refused)


def test_trace_beside_a_run(lens):
    wanted = under(lens, OTHERS[1]), traced(lens, OTHERS[0])
    found = beside(lens, lambda: under(lens, OTHERS[1]), lambda: traced(lens, OTHERS[0]))
    assert same(list(found), list(wanted))


def test_intervening_within_a_trace(lens):
    """A worker of nnsight's has the context of its model."""
    with lens.trace(asked(lens)):  # noqa: SIM117 - the inner block is the trace's
        with cl.intervening(lens, OTHERS[0]):
            found = lens.output.logits.save()
    assert same(found, traced(lens, OTHERS[0]))


# ── tasks ──


def decode(lens, which, steps=3):
    """Yield the logits of each pass of a greedy answer.

    No ``no_grad`` is held across a yield: its state is the thread's, so that tasks in turns would
    leave it behind.
    """
    read = torch.no_grad()(lens.hf_model.__call__)
    out = read(**asked(lens, which), use_cache=True)
    yield out.logits
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(dim=-1)
        out = read(input_ids=token, **{CACHE: cache_of(out)})
        yield out.logits


def test_tasks_that_take_turns():
    lens = lens_of("full", "sdpa")
    methods = (cl.CLVA(tau=1.0), cl.VCD(), cl.PAI(), None)

    async def ask(which, method):
        found = []
        opened = cl.intervening(lens, method) if method else contextlib.nullcontext()
        with opened:
            await asyncio.sleep(0)
            for one in decode(lens, which % 3):
                found.append(one)
                await asyncio.sleep(0)
        return found

    async def together():
        return await asyncio.gather(*(ask(i, one) for i, one in enumerate(methods)))

    wanted = [asyncio.run(ask(i, one)) for i, one in enumerate(methods)]
    assert same(asyncio.run(together()), wanted)
    assert not same(wanted[0], list(decode(lens, 0)))


def test_who_is_handed_the_context(lens):
    """A run cannot follow two: neither a thread nor a task that its owner started."""

    async def child():
        return logits(lens)

    async def main():
        with cl.intervening(lens, OTHERS[0]):
            for other in (asyncio.to_thread(logits, lens), asyncio.create_task(child())):
                with pytest.raises(InterventionError, match=r"handed the context.*in the function"):
                    await other
            with pytest.raises(InterventionError, match=r"handed the context"):
                await asyncio.to_thread(under, lens, OTHERS[1])
            return logits(lens)

    assert same(asyncio.run(main()), under(lens, OTHERS[0]))
    with cl.intervening(lens, OTHERS[0]):
        copied = contextvars.copy_context()
    assert same(copied.run(logits, lens), logits(lens))  # what is over is over in copies too


# ── generators ──


def drawn(lens, method):
    with cl.intervening(lens, method):
        for which in range(3):
            yield logits(lens, which)


def test_half_finished_generators():
    lens = lens_of("full", "sdpa")
    wanted = [under(lens, OTHERS[0], which=which) for which in range(3)]
    one = drawn(lens, OTHERS[0])
    found = [next(one)]
    for call in (logits, watched, lambda lens: next(drawn(lens, OTHERS[2]))):
        with pytest.raises(InterventionError, match=r"half-finished generator, drawn .*close\(\)"):
            call(lens)
    found += one
    assert same(found, wanted)
    assert same(logits(lens), beside(lens, lambda: logits(lens), lambda: None)[0])


def test_half_finished_generator_within_a_block(lens):
    """Its methods come on top of the block's, and are not left there."""
    with cl.intervening(lens, OTHERS[0]):
        outer = logits(lens)
        one = drawn(lens, cl.CLVA(tau=1.0))
        first = next(one)
        with pytest.raises(InterventionError, match=r"half-finished generator"):
            logits(lens)
        one.close()
        assert same(logits(lens), outer)
    assert same(first, under(lens, OTHERS[0], cl.CLVA(tau=1.0)))
    one = drawn(lens, OTHERS[0])
    next(one)
    del one
    gc.collect()
    assert not _ACTIVE


@contextlib.contextmanager
def set_up(lens, method):
    with cl.intervening(lens, method):
        yield


def test_generators_that_set_up(lens):
    """What a context manager's generator opens is for whoever enters it."""

    def within():
        with set_up(lens, OTHERS[0]):
            yield logits(lens)

    wanted = under(lens, OTHERS[0])
    with set_up(lens, OTHERS[0]):
        assert same(logits(lens), wanted)
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_up(lens, OTHERS[0]))
        assert same(logits(lens), wanted)
    one = within()
    assert same(next(one), wanted)
    with pytest.raises(InterventionError, match=r"half-finished generator, within"):
        logits(lens)
    one.close()


@pytest.fixture
def opened(lens):
    with cl.intervening(lens, OTHERS[0]):
        yield


def test_fixtures_set_up(lens, opened):
    found = logits(lens)
    with cl.intervening(lens, cl.DeCo()):
        assert not same(logits(lens), found)


def test_batches_that_are_half_drawn(lens):
    """Between two batches nothing is open."""
    pairs = [(picture(i), QUESTIONS[i]) for i in range(3)]
    how = Asking(method=OTHERS[1], decoding=cl.Greedy(max_new_tokens=3), batch_size=1)
    wanted = [one.ids for one in generate_batches(lens, pairs, how, progress=False)]
    plain, batches = logits(lens), generate_batches(lens, pairs, how, progress=False)
    found = [next(batches).ids]
    assert same(logits(lens), plain)
    found += [one.ids for one in batches]
    assert same(found, wanted)
