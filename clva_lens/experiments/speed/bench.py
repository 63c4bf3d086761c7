"""What the library costs: time and memory, as ratios to the plain model, measured in one run.

The cases of a model run in turn, in rounds whose order rotates; each round gives the ratio of every
case to its baseline, and the median of these is reported, with quartiles. On a CPU the ratios that
count are of *processor* time, which other programs disturb least; on CUDA they are of wall time.
"""

import gc
import json
import math
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from clva_lens.experiments.speed.calls import COUNTED, counted_model, pass_calls
from clva_lens.experiments.speed.cases import PAPER, Case, cases_of
from clva_lens.experiments.speed.models import Subject, random_subjects, toy_subjects
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Method
from clva_lens.models.family import find_site

# A model whose plain generation is shorter than this gets as many more rounds.
ROUND_SECONDS = 1.0


@dataclass(frozen=True)
class BenchRow:
    """What one case takes, and the ratio of that to what the case ``over`` takes.

    With unit "s", ``value`` is the median wall time of a call, ``ratio`` the median over rounds in
    the clock that counts on the device, ``low`` and ``high`` its quartiles, ``wall`` the median
    ratio of wall times, ``samples`` the number of rounds. With unit "MiB", ``value`` is how far the
    peak of memory lies above a plain pass's, and ``ratio`` is of such numbers; with unit "peak", it
    is the peak itself in MiB, less what was there before (the weights). With "calls" (of Python and
    of C) and "operators", it is how many more a pass takes, and ``ratio`` is of all of them.
    """

    model: str
    case: str
    over: str
    unit: str
    value: float
    ratio: float
    low: float
    high: float
    wall: float | None
    samples: int
    target: float | None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within its target; None if nothing is promised."""
        return None if self.target is None else self.ratio <= self.target


@dataclass(frozen=True)
class BenchReport:
    """All measurements, and what they were made on. ``rich.print`` shows it as a table."""

    rows: tuple[BenchRow, ...]
    rounds: int
    environment: Mapping[str, str | int]

    @property
    def met(self) -> bool:
        """Whether every target that was measured is met."""
        return all(row.met is not False for row in self.rows)

    @classmethod
    def read(cls, path: Path) -> "BenchReport":
        """Return a report that ``clva-lens bench --out`` wrote, perhaps on another machine.

        Raises:
            ParameterError: if the file is no report.
        """
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            names = [field.name for field in fields(BenchRow)]
            rows = tuple(BenchRow(**{name: row[name] for name in names}) for row in told["rows"])
            return cls(rows, told["rounds"], told["environment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ParameterError(
                f"{path} is no report of a benchmark ({error}). Pass a file that 'clva-lens bench "
                "--out FILE' wrote."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "rows": [asdict(row) | {"met": row.met} for row in self.rows],
            "rounds": self.rounds,
            "environment": dict(self.environment),
            "met": self.met,
        }

    def __rich__(self) -> Group:
        """Return a table for each model."""
        tables: list[Table | str] = []
        for model in dict.fromkeys(row.model for row in self.rows):
            table = Table(title=model, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
            for title in ("case", "takes", "over", "ratio", "quartiles", "target"):
                table.add_column(title, justify="left" if title in ("case", "over") else "right")
            for row in (row for row in self.rows if row.model == model):
                target = "" if row.target is None else f"≤ {row.target:g} "
                target += {True: "[green]met", False: "[red]missed", None: ""}[row.met]
                unit = "MiB peak" if row.unit == "peak" else row.unit
                digits = 0 if row.unit in ("calls", "operators") else 3
                takes, spread = f"{row.value:.{digits}f} {unit}", f"{row.low:.3f}–{row.high:.3f}"
                table.add_row(row.case, takes, row.over, f"{row.ratio:.3f}", spread, target)
            tables.append(table)
        used = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        return Group(*tables, f"Medians of interleaved rounds; {used}.")


def bench(
    rounds: int = 3,
    quick: bool = False,
    *,
    device: str = "cpu",
    subjects: Iterable[Subject] | None = None,
    new_tokens: int = 10,
    progress: bool = True,
) -> BenchReport:
    """Measure CLVA and tracing on the toys and, unless ``quick``, on larger random models.

    The toys are untrained: their cost does not depend on the weights; being fast, they get more
    rounds. The whole takes minutes. ``subjects`` replaces the models; it may make each when asked.

    Raises:
        ParameterError: if ``rounds`` or ``new_tokens`` is below 1.
    """
    if rounds < 1 or new_tokens < 1:
        raise ParameterError(
            f"rounds and new_tokens must be >= 1, but are {rounds} and {new_tokens}. Pass rounds=3."
        )
    rows: list[BenchRow] = [] if quick or subjects is not None else measure_calls(COUNTED)
    if subjects is None:
        subjects = toy_subjects() if quick else toy_subjects() + random_subjects()
    kinds: set[str] = set()
    gc.freeze()  # Collecting before each sample would else go through all that is imported.
    try:
        for subject in subjects:
            nn.Module.to(subject.model.eval(), device=device)
            kinds.add(str(subject.model.dtype).removeprefix("torch."))
            with torch.inference_mode():
                cases = cases_of(subject.model, new_tokens, subject.batch, subject.only)
                rows += measure_time(subject, cases, rounds, new_tokens, progress=progress)
                rows += measure_memory(subject, cases)
            del subject, cases  # before the next one is made
    finally:
        gc.unfreeze()
    versions = {name: version(name) for name in ("torch", "transformers", "nnsight")}
    how = {"device": device, "dtype": ", ".join(sorted(kinds)), "new_tokens": new_tokens}
    used = {**versions, **how, "threads": torch.get_num_threads(), **hardware(device)}
    return BenchReport(tuple(rows), rounds, used)


def measure_calls(methods: Mapping[str, Method]) -> list[BenchRow]:
    """Return how many calls and operators methods add to a prompt's pass and to a step."""
    model, rows = counted_model(), list[BenchRow]()
    plain = pass_calls(model)
    for name, method in methods.items():
        for of, found in pass_calls(model, method).items():
            for unit, own, base in (
                ("calls", found.python_and_c, plain[of].python_and_c),
                ("operators", found.operators, plain[of].operators),
            ):
                case, more, ratio = f"{of}, {name}", own - base, own / base
                same = ratio, ratio, ratio, ratio  # counts have no spread
                rows.append(BenchRow("LLaVA, 32 × 16", case, of, unit, more, *same, 1, None))
    return rows


def hardware(device: str) -> dict[str, str | int]:
    """Return what the measurements were made on: the processor, and the GPU if it is one."""
    found: dict[str, str | int] = {
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


@contextmanager
def _kernel(model: PreTrainedModel, kernel: str | dict[str, str]) -> Iterator[None]:
    before = find_site(model).config._attn_implementation or "eager"
    model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Clocks(NamedTuple):
    """Seconds by the wall clock, and of processor time over all threads of this process."""

    wall: float
    cpu: float


def _timed(case: Case, model: PreTrainedModel) -> Clocks:
    """Return the time of one call."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    with _kernel(model, case.kernel):
        gc.collect()
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        case.call()
        wait()
        return Clocks(time.perf_counter() - wall, time.process_time() - cpu)


def measure_time(
    subject: Subject, cases: list[Case], rounds: int, new_tokens: int, *, progress: bool = True
) -> list[BenchRow]:
    """Return the times of all cases of one model, interleaved, after a warm-up of each."""
    model = subject.model
    samples: dict[str, list[Clocks]] = {case.name: [] for case in cases}
    columns = (TextColumn(subject.name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = not (progress and (console.is_terminal or console.is_jupyter))
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(subject.name, total=None)
        warm = [min(_timed(case, model), _timed(case, model)) for case in cases]
        rounds *= math.ceil(ROUND_SECONDS / warm[0].wall)
        bar.update(task, total=rounds * len(cases))
        for number in range(rounds):
            shift = number % len(cases)
            order = cases[shift:] + cases[:shift]
            # Every other round backwards, so that no case always follows the same one.
            for case in order[:: -1 if number % 2 else 1]:
                samples[case.name].append(_timed(case, model))
                bar.advance(task)
    rows = [_time_row(subject, case, samples) for case in cases]
    each = token_samples(samples, new_tokens) if new_tokens > 1 else {}
    rows += [_time_row(subject, Case(name, "a token", "", cases[0].call), each) for name in each]
    return rows


TOKENS = {
    "a token": ("generate", "prefill"),
    "a token, CLVA": ("generate, CLVA", "prefill, CLVA"),
    f"a token, {PAPER}": (f"generate, {PAPER}", f"prefill, {PAPER}"),
}
"""What is derived from generations and prefills of the same round; it is over "a token"."""


def token_samples(samples: Mapping[str, list[Clocks]], new_tokens: int) -> dict[str, list[Clocks]]:
    """Return the time of one more token, by round: that of a generation less its prefill's."""

    def each(whole: str, first: str) -> list[Clocks]:
        pairs = zip(samples[whole], samples[first], strict=True)
        spread = [(np.array(one) - np.array(other)) / (new_tokens - 1) for one, other in pairs]
        return [Clocks(*one.tolist()) for one in spread]

    whole = TOKENS["a token"]
    return {
        name: each(*pair)
        for name, pair in TOKENS.items()
        if set(whole) <= samples.keys() and set(pair) <= samples.keys()
    }


def _time_row(subject: Subject, case: Case, samples: Mapping[str, list[Clocks]]) -> BenchRow:
    own, base = (np.array(samples[name]) for name in (case.name, case.over))
    wall, cpu = (own / base).T
    counts = wall if subject.model.device.type == "cuda" else cpu
    low, middle, high = np.quantile(counts, [0.25, 0.5, 0.75]).tolist()
    seconds, ratios = float(np.median(own[:, 0])), (middle, low, high, float(np.median(wall)))
    target = subject.targets.get((case.name, "s"))
    return BenchRow(subject.name, case.name, case.over, "s", seconds, *ratios, len(own), target)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensor storages that come into being inside it, and their peak.

    ``peak`` is the most there were after any operator; a kernel's own scratch memory is not seen.
    Storages from before are known by appearing as an argument first, and are not counted.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and count the storages of its results that are new."""
        self._see((args, kwargs), count=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, count=True)
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, tree: Any, count: bool) -> None:
        for storage in [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]:
            key, size = storage._cdata, storage.nbytes() if count else 0
            if key not in self._known:
                self.live += size
                self._known[key] = weakref.ref(storage, lambda _, k=key, n=size: self._free(k, n))

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that were allocated at once during ``call``, beyond those before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        call()
    return memory.peak


def measure_memory(subject: Subject, cases: list[Case]) -> list[BenchRow]:
    """Return the peaks of prefills and passes, and how far looking lifts that of a pass.

    What is allocated where the plain pass needs little anyway lifts no peak, and costs nothing.
    Generations of more than a token are measured on a GPU, where it costs no time.
    """
    model, peaks = subject.model, dict[str, int]()
    counted = model.device.type == "cuda"
    cases = [case for case in cases if counted or not case.name.startswith("generate")]
    for case in cases:
        with _kernel(model, case.kernel):
            case.call()
            peaks[case.name] = peak_memory(case.call, model.device)

    def row(case: Case, over: str, unit: str, value: float | int, ratio: float) -> BenchRow:
        target, numbers = subject.targets.get((case.name, unit)), (value / 2**20, ratio, ratio)
        return BenchRow(subject.name, case.name, over, unit, *numbers, ratio, None, 1, target)

    rows = [
        row(case, case.over, "peak", peaks[case.name], peaks[case.name] / peaks[case.over])
        for case in cases
    ]
    whole = "output_attentions"
    if subject.keeps_patterns and whole in peaks:
        extra = {name: peak - peaks["forward"] for name, peak in peaks.items()}
        rows += [
            row(case, whole, "MiB", extra[case.name], extra[case.name] / extra[whole])
            for case in cases
            if case.name in ("trace_attention", whole)
        ]
    return rows
