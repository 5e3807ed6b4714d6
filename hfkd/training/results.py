"""Results of a run: `results.json`, written after every evaluation so that a crash does not lose it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import HfkdError
from ..names import hub_id, public_name
from ..networks.headless import is_headless
from ..networks.teacher import Teacher, TeacherEnsemble
from ..recipe.config import DistillationConfig
from ..runs.finished import BY_TOP1, best_words
from ..runs.folder import RESULTS_NAME, environment
from ..runs.reading import read_results
from ..runs.writing import strict_json, write_whole
from ..teacher_cache.teacher import CachedTeacher
from .metrics import OWN, WITH_TEACHER, measured

# Figures that the best and the last row of the summary have in common with every run; the others are the user's own.
SUMMED_UP = {f"eval_{name}" for name in (*OWN, *WITH_TEACHER)}

logger = logging.get_logger(__name__)


class ResultsWriter(TrainerCallback):
    """Callback that adds a row to `<output_dir>/results.json` after every evaluation.

    A resumed run keeps the rows up to its checkpoint. Evaluations without the measure, which a user's own metrics give,
    add no row.

    Args:
        measure: figure that every row has: `eval_top1`, or `eval_loss` where there are no labels.

    Attributes:
        facts: facts of the run that are known before training: networks, losses, data set, published value, versions.
        rows: measurements, one row for each evaluation.
        first_set: name of the first of several evaluation sets, whose figures also stand without it; None for one set.
        recording: whether the next evaluation adds to the rows.
        planned_steps: number of steps of a run that is not stopped.
    """

    def __init__(self, measure: str = "eval_top1"):
        self.measure = measure
        self.facts: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.planned_steps = 0
        self.first_set: str | None = None
        self.recording = True
        self._started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir, RESULTS_NAME)
        if state.global_step == 0:  # a second training, from the weights of the first
            self.rows = [row for row in self.rows if row["step"] == 0]
        if state.global_step > 0 and path.is_file():
            self.rows = [row for row in _former_rows(path) if row["step"] <= state.global_step]
        self.planned_steps = state.max_steps
        self._started = time.perf_counter()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.recording:
            return
        metrics = measured(metrics)
        if self.first_set is not None:
            prefix = f"eval_{self.first_set}_"
            metrics |= {f"eval_{key.removeprefix(prefix)}": metrics[key] for key in metrics if key.startswith(prefix)}
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if self.measure not in metrics:
            for row in self.rows:
                if row["step"] == state.global_step:  # of the first set, which is evaluated before the others
                    row |= finite
            self._write_file(args, state)
            return
        if self.measure not in finite:  # the run has diverged
            return
        now = time.perf_counter()
        epoch = round(state.epoch or 0.0, 4)
        row = {"epoch": epoch, "step": state.global_step, "seconds": round(now - self._started, 2)}
        self._started = now
        training = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        row |= {key: value for key, value in training.items() if key not in ("epoch", "step") and value is not None}
        row |= finite  # also those of the user's functions
        self.rows = [other for other in self.rows if other["step"] != row["step"]] + [row]
        self._write_file(args, state)

    def write_for(self, args) -> None:
        """Write the file of a run without evaluations."""
        if args.should_save:
            self.write(Path(args.output_dir, RESULTS_NAME))

    def _write_file(self, args, state) -> None:
        if args.should_save and not state.is_hyper_param_search:  # a search stores its trials in its own database
            self.write(Path(args.output_dir, RESULTS_NAME))

    def text(self) -> str:
        """Return a sentence with the best and the last top-1, or loss."""
        best, last = self.best(), self.rows[-1]
        by = best_words(self._best_by)
        by_top1 = self.measure == "eval_top1"
        name, style = ("Top-1", ".2f") if by_top1 else ("Loss of the evaluation images", ".4g")
        at = "at its best" if by == ("the highest top-1" if by_top1 else "the lowest loss") else f"with {by}"
        shown = f"{best[self.measure]:{style}} {at} (epoch {best['epoch']:g}), {last[self.measure]:{style}} in the end."
        return f"{name}: {shown}"

    @property
    def _best_by(self) -> dict[str, Any]:
        return self.facts.get("best_by", BY_TOP1)

    def best(self) -> dict[str, Any]:
        """Return the row of the best epoch, the one whose checkpoint `load_best_model_at_end` takes."""
        key, sign = f"eval_{self._best_by['metric']}", 1 if self._best_by["greater_is_better"] else -1
        measured = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        return max(measured, key=lambda row: sign * row[key]) if measured else self.rows[-1]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: if it cannot be written; then the former file is unchanged.
        """
        summary = self.facts | {"planned_steps": self.planned_steps}
        if self.rows:
            summary |= {
                "best": _summary(self.best()),
                "last": _summary(self.rows[-1]),
                "seconds": round(sum(row["seconds"] for row in self.rows), 1),
                "images_per_second": _mean(
                    [row["images_per_second"] for row in self.rows if "images_per_second" in row]
                ),
            }
        lines = [f"  {strict_json(key)}: {strict_json(value)}" for key, value in summary.items()]
        rows = ",\n".join(f"    {strict_json(row)}" for row in self.rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "{\n" + ",\n".join(lines) + ',\n  "epochs": [\n' + rows + "\n  ]\n}\n")


def _former_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an interrupted run; none, with a warning, if the file is damaged: its checkpoints go on."""
    try:
        rows = read_results(path, ["epochs"])["epochs"]
        return [row for row in rows if isinstance(row["step"], int)]
    except (HfkdError, KeyError) as error:
        logger.warning(f"{error} The measurements before the checkpoint are lost; the run goes on without them.")
        return []


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("epoch", "step", "eval_top1", "eval_top5", "eval_agreement")
    keys += () if "eval_top1" in row else ("eval_loss",)
    summary = {key.removeprefix("eval_"): row[key] for key in keys if key in row}
    others = {key.removeprefix("eval_"): row[key] for key in row if key.startswith("eval_") and key not in SUMMED_UP}
    if others:
        summary["others"] = others
    return summary | {"checkpoint": f"checkpoint-{row['step']}"}


def _trained(student: nn.Module) -> int:
    return sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 1) if values else None


def run_facts(
    role: str,
    student: nn.Module,
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
    losses: nn.ModuleDict,
    args: DistillationConfig,
) -> dict[str, Any]:
    """Return the facts for `results.json` that are known before training; a command adds those of its recipe.

    Args:
        role: role of the trained network, "student" or "teacher".
    """
    name_or_path = getattr(student, "name_or_path", "")  # only models of transformers have it
    origins = [hub_id(name_or_path), *(member.hub_id for member in (teacher.members if teacher else []))]
    cached = {"teacher_cache": teacher.settings()} if isinstance(teacher, CachedTeacher) else {}
    backbone = {"has_classifier": False} if is_headless(student) else {}
    return {
        "role": role,
        "student": public_name(name_or_path, student),
        "teacher": teacher.name if teacher else None,
        "base_models": [origin for origin in dict.fromkeys(origins) if origin],
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        **({"trained_parameters": _trained(student)} if args.freeze else {}),
        "teacher_parameters": teacher.parameter_count() if teacher else None,
        **cached,
        **backbone,
        "losses": {name: loss.settings() for name, loss in losses.items()},
        "logit_standardization": args.logit_standardization,
        "ce_weight": args.ce_weight,
        **({"quantize": args.quantize} if args.quantize != "none" else {}),
        "published_top1": args.published_top1,
        "exported": "best" if args.load_best_model_at_end else "last",
        "best_by": {
            "metric": (args.metric_for_best_model or "top1").removeprefix("eval_"),
            "greater_is_better": args.greater_is_better is not False,
        },
        "devices": f"{args.world_size} x {args.device.type}",
        "seed": args.seed,
        **environment(),
    }
