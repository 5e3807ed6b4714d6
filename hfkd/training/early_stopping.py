"""Early stopping: a run ends when its metric has not improved for some evaluations."""

from __future__ import annotations

from transformers import EarlyStoppingCallback

from ..recipe.config import DistillationConfig
from .results import ResultsWriter


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which also goes on counting in a resumed run.

    A run that it has ended counts as whole, and is not trained further when it is resumed. It must come before the
    callbacks that read how many steps are planned.
    """

    def __init__(self, args: DistillationConfig, results: ResultsWriter):
        super().__init__(args.early_stopping_patience, args.early_stopping_threshold)
        self.results = results

    def on_train_begin(self, args, state, control, **kwargs):
        stored = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.early_stopping_patience_counter = stored.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if self.is_over:
            state.max_steps = state.global_step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        name = args.metric_for_best_model.removeprefix("eval_")
        if f"eval_{name}" not in metrics:  # of another evaluation set, or between two probes
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if not self.is_over:
            return
        self.results.planned_steps = state.global_step
        if state.is_world_process_zero:
            print(f"Training ends: {name} has not improved for {self.early_stopping_patience} evaluations.", flush=True)

    @property
    def is_over(self) -> bool:
        """True once the metric has not improved for as many evaluations as the patience."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience
