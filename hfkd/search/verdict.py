"""Verdict of a choice: whether distillation gains more than chance, and the page that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runs.tables import markdown_table
from .candidates import ALONE
from .halving import SEEDS, Trial

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gain:
    """Gain of a candidate over the student alone, in points of top-1, on images on which nothing was chosen.

    Attributes:
        candidate: its name.
        top1, alone: means over the seeds.
        mean, low, high: the gain, and the ends of its 95 % interval.
    """

    candidate: str
    top1: float
    alone: float
    mean: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """True if the whole interval lies above 0."""
        return self.low > 0


def gain_of(candidate: Sequence[Trial], alone: Sequence[Trial]) -> Gain:
    """Return the gain, with an interval that covers other seeds and other images.

    The variance is the sum of both kinds: of the means between seeds, and of the difference between images, each image
    compared with itself. Seeds enter the second kind as well, so the interval is a little too wide rather than too
    narrow. Student's t has the degrees of freedom of the seeds.
    """
    from scipy.stats import t as student_t  # takes a second to import

    taught, plain = _right(candidate), _right(alone)
    differences = taught.mean(axis=0) - plain.mean(axis=0)
    seeds = sum(each.mean(axis=1).var(ddof=1) / len(each) for each in (taught, plain))
    error = float(np.sqrt(seeds + differences.var(ddof=1) / differences.size))
    width = student_t.ppf((1 + CONFIDENCE) / 2, len(taught) + len(plain) - 2) * error
    mean = float(differences.mean())
    ends = [100 * value for value in (taught.mean(), plain.mean(), mean, mean - width, mean + width)]
    return Gain(candidate[0].candidate, *map(float, ends))


def gains(final: Sequence[Trial]) -> list[Gain]:
    """Return the gains of the candidates of the last round, the best first."""
    groups = [final[start : start + SEEDS] for start in range(0, len(final), SEEDS)]
    found = [gain_of(group, groups[0]) for group in groups[1:]]
    return sorted(found, key=lambda gain: -gain.mean)


def page(rounds: Sequence[Sequence[Trial]], judged_on: str, command: str) -> str:
    """Return the page: what to take, how sure that is, and every training.

    Args:
        judged_on: the images of the verdict, in words.
        command: trains the choice.
    """
    best, *others = gains(rounds[-1])
    steps = rounds[-1][0].steps
    measured = f"{SEEDS} seeds each, {steps:,} steps, on {judged_on}"
    interval = f"{best.mean:+.2f} points (95 % interval {best.low:+.2f} to {best.high:+.2f})"
    if best.is_sure:
        lines = [f"# Take {best.candidate}", f"It gains {interval} over the student alone: {measured}."]
    else:
        lines = ["# Take the student alone", f"No way of distilling gained more than chance explains: {measured}."]
        lines.append(f"The best was {best.candidate}: {interval}. More minutes or more images could tell more.")
    lines.append(f"    {command}")
    rows = [[ALONE, f"{best.alone:.2f}", "", ""]]
    for gain in (best, *others):
        rows.append([gain.candidate, f"{gain.top1:.2f}", f"{gain.mean:+.2f}", f"{gain.low:+.2f} to {gain.high:+.2f}"])
    lines.append(markdown_table(["last round", "top-1", "gain", "95 % interval"], rows, padded=True))
    for number, trials in enumerate(rounds[:-1], 1):
        rows = [[trial.candidate, _measured(trial), f"{trial.seconds:.0f}"] for trial in trials]
        title = f"round {number}: {trials[0].steps:,} steps"
        lines.append(markdown_table([title, "top-1", "seconds"], rows, padded=True))
    lines.append(
        "Top-1 in percent. The rounds compare on other images than the last table. A longer schedule may rank the "
        "candidates in another order."
    )
    return "\n\n".join(lines) + "\n"


def _measured(trial: Trial) -> str:
    return "diverged" if trial.top1 is None else f"{trial.top1:.2f}"


def _right(trials: Sequence[Trial]) -> np.ndarray:
    """Return whether each image is recognised in each trial, (trials, images)."""
    return np.array([[digit == "1" for digit in trial.judged] for trial in trials], dtype=np.float64)
