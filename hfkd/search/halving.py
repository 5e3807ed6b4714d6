"""Successive halving: many short trainings, then fewer and longer ones, then the best with several seeds.

Every training runs its whole schedule, so that all of a round are compared at their end. The last round is judged on
images on which nothing was chosen, because the best of many is partly lucky on those that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import HfkdError
from ..runs.reading import read_json
from ..runs.writing import strict_json, write_whole
from .candidates import ALONE, Candidate

FACTOR = 3  # from one round to the next: a third of the candidates, three times the steps
FINALISTS, SEEDS = 2, 3  # in the last round, beside the student alone
FEWEST_STEPS = 10  # of the shortest trainings; fewer say nothing
RESERVE = 0.9  # share of the time that is planned: some methods are slower than KD, by which a step is timed
TRIALS_NAME = "trials.json"


@dataclass(frozen=True)
class Trial:
    """A training and its measurement.

    Attributes:
        candidate: name of the way of teaching.
        steps: length.
        seed: of the initial weights.
        top1: in percent, on the images by which candidates are chosen; None if the training diverged.
        judged: a digit for each image on which nothing is chosen, 1 where the student is right.
        seconds: duration.
    """

    candidate: str
    steps: int
    seed: int
    top1: float | None
    judged: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Lengths of the rounds in steps; the final is the last one."""

    steps: tuple[int, ...]

    @staticmethod
    def fit(
        count: int,
        minutes: float,
        step: float,
        overhead: float,
        longest: int,
        spent: float = 0.0,
        teacher: float = 0.0,
        kinds: int = 1,
        inside: int = 0,
    ) -> Plan:
        """Return the longest rounds that fit into the time.

        Args:
            count: number of candidates.
            minutes: the time for the whole choice.
            step, overhead: seconds of a step, and of a training besides its steps.
            longest: steps of the recipe's own schedule, which no training exceeds.
            spent: minutes that have passed.
            teacher: seconds more of a step whose batch the teacher has not seen.
            kinds: how often it sees a batch, whose outputs are kept: once for the candidates that read logits, once
                for those that read the embedding too, and so on.
            inside: number of candidates that read more of the teacher than is kept. It runs in all of their steps, of
                which there are most where they are the best.

        Raises:
            HfkdError: if the time is too short; the message says how much is needed.
        """
        sizes = Plan.sizes(count)
        lengths = [FACTOR**number for number in range(len(sizes))]
        units = sum(size * length for size, length in zip(sizes, lengths, strict=True))
        left = RESERVE * 60 * (minutes - spent) - overhead * sum(sizes)
        running = [*(min(inside, size) for size in sizes[:-1]), min(inside, FINALISTS) * SEEDS]
        seen = kinds * lengths[-1] + sum(size * length for size, length in zip(running, lengths, strict=True))
        unit = units * step + seen * teacher
        base = min(left / unit, longest / lengths[-1])
        if base < min(FEWEST_STEPS, longest / lengths[-1]):
            needed = math.ceil((FEWEST_STEPS * unit + overhead * sum(sizes)) / RESERVE / 60 + spent)
            raise HfkdError(
                f"minutes: {minutes:.3g} are too few. {sum(sizes)} trainings take {step:.3g} s a step and "
                f"{overhead:.3g} s besides on this machine: give {needed} or more."
            )
        return Plan(tuple(max(1, math.floor(base * length)) for length in lengths))

    @staticmethod
    def sizes(count: int) -> list[int]:
        """Return the number of trainings in each round."""
        sizes = [count]
        while sizes[-1] > FACTOR * FINALISTS:
            sizes.append(math.ceil(sizes[-1] / FACTOR))
        return [*sizes, (FINALISTS + 1) * SEEDS]


class Journal:
    """File of the finished trainings, from which an interrupted choice goes on."""

    def __init__(self, path: Path):
        self.path = path
        self.plan: Plan | None = None
        self.candidates: list[str] = []  # names of those that can be trained, known with the plan
        self.trials: list[Trial] = []
        if path.is_file():
            content = read_json(path)
            try:
                self.plan = Plan(tuple(content["steps"]))
                self.candidates = content["candidates"]
                self.trials = [Trial(**each) for each in content["trials"]]
            except (KeyError, TypeError) as error:
                raise HfkdError(f"{path} is damaged ({error!r}): remove it to begin anew.") from error

    def find(self, candidate: Candidate, steps: int, seed: int) -> Trial | None:
        """Return a finished training; None if it is still to be run."""
        wanted = candidate.name, steps, seed
        return next((each for each in self.trials if (each.candidate, each.steps, each.seed) == wanted), None)

    def add(self, trial: Trial) -> None:
        """Write a training down."""
        self.trials.append(trial)
        self.write()

    def write(self) -> None:
        """Write the file."""
        assert self.plan is not None
        trials = [asdict(trial) for trial in self.trials]
        content = {"steps": list(self.plan.steps), "candidates": self.candidates, "trials": trials}
        write_whole(self.path, strict_json(content, indent=1) + "\n")


def halve(
    found: Sequence[Candidate], journal: Journal, train: Callable[[Candidate, int, int], Trial], seed: int
) -> list[list[Trial]]:
    """Run all rounds that are not in the journal yet.

    Args:
        found: the candidates, the student alone among them.
        train: trains a candidate for a number of steps with a seed.
        seed: of every training but those of the last round, which take this one and the next two.

    Returns:
        The trainings of each round, the best first; of the last round those of the student alone, of the best, and of
        the second.
    """
    assert journal.plan is not None
    rounds: list[list[Trial]] = []
    by_name = {candidate.name: candidate for candidate in found}
    left = list(found)

    def run(candidate: Candidate, steps: int, its_seed: int) -> Trial:
        trial = journal.find(candidate, steps, its_seed)
        if trial is None:
            trial = train(candidate, steps, its_seed)
            journal.add(trial)
        return trial

    *rounds_steps, last = journal.plan.steps
    sizes = [*Plan.sizes(len(found))[1:-1], FINALISTS]
    for steps, size in zip(rounds_steps, sizes, strict=True):
        ranked = sorted((run(candidate, steps, seed) for candidate in left), key=lambda trial: -_rank(trial))
        rounds.append(ranked)
        taught = [trial for trial in ranked if trial.candidate != ALONE]
        left = [by_name[trial.candidate] for trial in taught[:size]]
    finalists = [by_name[ALONE], *left]
    rounds.append([run(each, last, seed + number) for each in finalists for number in range(SEEDS)])
    return rounds


def _rank(trial: Trial) -> float:
    return -math.inf if trial.top1 is None else trial.top1
