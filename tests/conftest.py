"""Fixtures of the whole session: tests must leave the models as they are (tiny_models.py)."""

import os

import shape_checks  # It checks what is imported after it.

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # Here and in subprocesses; threads that wait burn time.

import math
import subprocess
from collections.abc import Callable, Iterator

import hypothesis
import jaxtyping
import pytest
import torch
from tiny_models import (
    HEADS,
    KERNELS,
    QUESTIONS,
    SHARED,
    SITES,
    blip_of,
    double_of,
    lens_of,
    picture,
    size_of,
)
from transformers import LlavaForConditionalGeneration

from clva_lens.lens.load import LensModel
from clva_lens.models.prompt import Prompt

# An example has no deadline: the machine may be busy with something else.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


@pytest.fixture(scope="session", params=KERNELS)
def blip(request: pytest.FixtureRequest) -> LensModel:
    """The tiny InstructBLIP with both kernels."""
    return blip_of(request.param)


@pytest.fixture(scope="session")
def one_blip() -> LensModel:
    """One kernel (sdpa), for what does not depend on it."""
    return blip_of("sdpa")


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest) -> str:
    """Each attention site of an InstructBLIP."""
    return request.param


@pytest.fixture(autouse=True)
def counted_anew() -> None:
    """Each test has its own first calls, which are those whose shapes are checked."""
    shape_checks.CALLS.clear()


# ── fixtures for every family ──


@pytest.fixture(scope="session", params=[(h, k) for h in HEADS for k in KERNELS], ids="-".join)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(heads, kernel): full or grouped-query attention, fused or eager."""
    return request.param


@pytest.fixture(scope="session")
def lens(variant: tuple[str, str]) -> LensModel:
    """The tiny model in each of the four variants."""
    return lens_of(*variant)


@pytest.fixture(scope="session")
def exact(variant: tuple[str, str]) -> LlavaForConditionalGeneration:
    """The same weights in float64, for the reference."""
    return double_of(variant[0])


@pytest.fixture(scope="session")
def exact_of() -> Callable[[str], LlavaForConditionalGeneration]:
    """``exact_of(heads)``: the float64 copy of the model with that kind of heads."""
    return double_of


@pytest.fixture(scope="session")
def one() -> LensModel:
    """One variant (full, sdpa), for what does not depend on it."""
    return lens_of("full", "sdpa")


@pytest.fixture(scope="session")
def ask() -> Callable[..., Prompt]:
    """Return prompts: ``ask(lens)`` for a single one, ``ask(lens, 3)`` for a batch of three."""

    def make(lens: LensModel, batch: int | None = None, first: int = 0) -> Prompt:
        if batch is None:
            return lens.prompt(picture(first), QUESTIONS[first % 3])
        several = range(first, first + batch)
        return lens.prompt([picture(i) for i in several], [QUESTIONS[i % 3] for i in several])

    return make


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switch the test suite's type checks off: users do not have them, our own checks must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process may be started, an installer least of all: not even if the error is swallowed."""
    started: list[object] = []

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        started.append(args)
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    yield
    assert started == []


@pytest.fixture(scope="module", autouse=True)
def shared_models():
    """No test changes a weight of a model that others use."""
    yield
    assert all(math.isclose(size_of(model), size, rel_tol=1e-12) for model, size in SHARED)


@pytest.fixture(autouse=True)
def ambient_state():
    """No test, and nothing that it calls, leaves PyTorch otherwise than it was."""
    yield
    left = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    assert left == (True, False, torch.float32)
