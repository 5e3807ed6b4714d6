"""Meters of time and memory, and the tables that the benchmark prints."""

import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Meter:
    """Images/s of each round of one contender, and on CUDA its memory. The first round is a warm-up."""

    def __init__(self):
        self.rates: list[float] = []
        self.peak_bytes = 0

    def start(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._bytes_before = torch.cuda.memory_allocated()
        self._clock = time.perf_counter()

    def stop(self, images: int) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.rates.append(images / (time.perf_counter() - self._clock))
        if DEVICE.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - self._bytes_before)

    @property
    def measured(self) -> np.ndarray:
        return np.array(self.rates[1:])


class StepClock:
    """Clock of the parts of a step. While one part runs inside another, the clock of the outer part stops.

    Args:
        rest: name of the time in which no part runs.
    """

    def __init__(self, rest: str):
        self._running = [rest]
        self._seconds: dict[str, float] = {rest: 0.0}
        self._since = time.perf_counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """Return the function, wrapped so that its calls count for the part."""
        self._seconds[part] = 0.0

        @functools.wraps(function)
        def call(*args, **kwargs):
            self._book()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._book()
                self._running.pop()

        return call

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        self._book()
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return seconds

    def _book(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now


class LiveTensors(TorchDispatchMode):
    """Context that counts the bytes of all living tensors that operations have read or made, and their peak.

    It does not see memory that an operation allocates for itself, and does not depend on the device or its allocator.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, results)):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return results

    def _see(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.bytes += size

    def _forget(self, key: int, size: int) -> None:
        del self._storages[key]
        self.bytes -= size


def step_bytes(steps: Iterator[None]) -> int:
    """Return the peak bytes of one step's tensors, including parameters, buffers and optimizer."""
    with LiveTensors() as tensors:
        next(steps)  # sees the tensors that live on from step to step
        tensors.peak_bytes = tensors.bytes
        next(steps)
    return tensors.peak_bytes


def alternate(ours: Iterator[None], theirs: Iterator[None], rounds: int, steps: int, images: int) -> list[Meter]:
    """Measure rounds of `steps` steps of one contender and of the other in turns.

    Args:
        images: images of a round.
    """
    meters = [Meter(), Meter()]
    for _ in range(rounds):
        for contender, meter in zip((ours, theirs), meters, strict=True):
            meter.start()
            for _ in itertools.islice(contender, steps):
                pass
            meter.stop(images)
    return meters


@dataclass
class Row:
    """Row of the first table: our rounds, their rounds, and the ratio that hfkd aims at."""

    name: str
    ours: Meter
    against: str
    theirs: Meter
    target: str = ""

    header = ("", "images/s", "against", "images/s", "ratio", "quartiles", "target", "peak MiB")
    numbers = {1, 3, 4}

    def cells(self) -> tuple[str, ...]:
        ours, theirs = self.ours.measured, self.theirs.measured
        peaks = (self.ours.peak_bytes, self.theirs.peak_bytes)
        return (
            self.name,
            f"{np.median(ours):,.0f}",
            self.against,
            f"{np.median(theirs):,.0f}",
            *_quartiles(ours / theirs),
            self.target,
            " / ".join(f"{peak / 2**20:,.0f}" for peak in peaks) if any(peaks) else "-",
        )


@dataclass
class MethodRow:
    """Row of the second table: cost of a step of `batch_size` images with a method, and with KD alone."""

    name: str
    method: Meter
    alone: Meter
    batch_size: int
    step_bytes: int
    alone_bytes: int

    header = ("method", "ms a step", "KD alone", "times as long", "quartiles", "peak MiB of a step", "over KD")
    numbers = {1, 2, 3, 5, 6}

    def cells(self) -> tuple[str, ...]:
        method, alone = (self.batch_size / meter.measured for meter in (self.method, self.alone))
        times = (f"{1000 * np.median(seconds):,.1f}" for seconds in (method, alone))
        memory = (f"{size / 2**20:,.1f}" for size in (self.step_bytes, self.step_bytes - self.alone_bytes))
        return (self.name, *times, *_quartiles(method / alone), *memory)


@dataclass
class ShareRow:
    """Row of the third table: a part of a step, and its share (0 to 1) of each step's time."""

    name: str
    shares: Sequence[float]

    header = ("part of a step", "share in %", "quartiles")
    numbers = {1}

    def median(self) -> float:
        return float(np.median(self.shares))

    def cells(self) -> tuple[str, ...]:
        low, middle, high = 100 * np.quantile(self.shares, (0.25, 0.5, 0.75))
        return (self.name, f"{middle:.1f}", f"{low:.1f} .. {high:.1f}")


def _quartiles(ratios: np.ndarray) -> tuple[str, str]:
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f}", f"{low:.2f} .. {high:.2f}"


def record(row: Row | MethodRow | ShareRow) -> dict[str, Any]:
    """Return a row as JSON holds it, with the images/s of every round in place of a meter."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value.measured.tolist() if isinstance(value, Meter) else value for name, value in values.items()}


def print_table(rows: Sequence[Row] | Sequence[MethodRow] | Sequence[ShareRow]) -> None:
    lines = [rows[0].header, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = rows[0].numbers
    rule = ["-" * (width - 1) + ":" if column in numbers else "-" * width for column, width in enumerate(widths)]
    for line in (lines[0], rule, *lines[1:]):
        padded = (f"{cell:{'>' if column in numbers else '<'}{widths[column]}}" for column, cell in enumerate(line))
        print(f"| {' | '.join(padded)} |")
