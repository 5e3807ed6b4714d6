"""`torch_compile: auto`: the first steps of a run measure whether compiling pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..networks.teacher import Teacher
from ..recipe.config import DistillationConfig
from .results import ResultsWriter

WARM_UP, MEASURED = 5, 20  # steps
LEAST_SECONDS = 300.0  # of training left: compiling takes up to a minute, and saves a tenth to a half of the rest
FACT = "torch_compile"


class CompileChoice(TrainerCallback, ExportableState):
    """Callback that trains eager steps, then compiled ones, and goes on with what ends the run sooner.

    All of them are steps of the training; the two kinds round differently. Nothing waits for the device but the end of
    each kind's steps. Evaluations and checkpoints between two steps make one of the times long, not their median.
    A resumed run takes the choice from its checkpoint, and measures if that is from before the choice.

    Args:
        teacher: compiled together with the rest; None where there is none.
        mean: returns the mean (N,) over all processes, so that they choose alike.

    Attributes:
        compiled: whether steps are compiled now.
    """

    def __init__(
        self,
        teacher: Any,
        args: DistillationConfig,
        results: ResultsWriter,
        mean: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.teacher, self.args, self.results, self.mean = teacher, args, results, mean
        self.compiled = False
        self.choice: dict[str, Any] | None = None
        self._marks: list[Any] = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"choice": self.choice}}

    def network(self, prepared: nn.Module) -> nn.Module:
        """Return the network that the next step calls: the compiled one as it is prepared, or the one within."""
        return prepared if self.compiled else getattr(prepared, "_orig_mod", prepared)

    def on_train_begin(self, args, state, control, **kwargs):
        stored = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.choice = stored.get("attributes", {}).get("choice")
        self._use(self.choice is not None and self.choice["compiled"])
        self.results.facts[FACT] = self.choice

    def on_step_end(self, args, state, control, **kwargs):
        if self.choice is not None:
            return
        self._marks.append(_mark(args.device))
        if len(self._marks) <= WARM_UP + MEASURED:
            return
        times = self.mean(torch.tensor(_seconds_between(self._marks), device=args.device)).tolist()
        step, left = median(times[WARM_UP:]), state.max_steps - state.global_step
        if self.compiled:
            compiling = max(0.0, sum(times[:WARM_UP]) - WARM_UP * step)
            self._choose(state, self._eager_seconds, left, compiled_seconds=step, compiling_seconds=compiling)
        elif step * left < LEAST_SECONDS:
            self._choose(state, step, left)
        else:
            self._eager_seconds, before = step, self._marks[-1]
            self._use(True)
            self._marks = [before]  # the next step begins here, and compiles first

    def _use(self, compiled: bool) -> None:
        """Have the next steps compiled, or not, and measure from here on."""
        self.compiled, self._marks = compiled, []
        for member in [] if self.teacher is None else self.teacher.members:
            if compiled:
                member.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
            elif isinstance(member, Teacher):
                member.uncompile()

    def _choose(self, state: Any, eager_seconds: float, left: int, **measured: float) -> None:
        pays = False
        if measured:  # what compiling took is asked for again: a smaller last batch is compiled once more
            saved = (eager_seconds - measured["compiled_seconds"]) * left
            pays = saved > measured["compiling_seconds"]
            measured["saved_seconds"] = saved
        figures = {"eager_seconds": eager_seconds, **measured}
        self.choice = {"compiled": pays} | {name: float(f"{value:.4g}") for name, value in figures.items()}
        self.results.facts[FACT] = self.choice
        if not pays:
            self._use(False)
        if state.is_world_process_zero:
            print(f"torch_compile auto: {described(self.choice, left)}", flush=True)


def described(choice: dict[str, Any], left: int) -> str:
    """Return a choice as a sentence.

    Args:
        left: steps left.
    """
    eager = f"a step takes {1000 * choice['eager_seconds']:,.1f} ms eager"
    if "compiled_seconds" not in choice:
        return f"{eager}, and {left:,} are left: too few for compiling to pay. Training goes on eager."
    saved, goes_on = choice["saved_seconds"], "compiled" if choice["compiled"] else "eager"
    return (
        f"{eager} and {1000 * choice['compiled_seconds']:,.1f} ms compiled. Compiling took "
        f"{choice['compiling_seconds']:,.0f} s, and saves {saved:,.0f} s over the {left:,} steps left. "
        f"Training goes on {goes_on}."
    )


def _mark(device: torch.device) -> Any:
    """Return this moment of the device's work, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(marks: Sequence[Any]) -> list[float]:
    """Return the seconds from each mark to the next, after waiting for the last one."""
    pairs = zip(marks, marks[1:], strict=False)
    if isinstance(marks[0], float):
        return [end - start for start, end in pairs]
    marks[-1].synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]
