"""The trials of a search in Optuna's database, which several processes may share and a later one goes on with."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from ..training.trainer import DistillationTrainer
from .results import SearchedTrial
from .space import Parameter, settings, text

STUDY_NAME = "search"
DATABASE_NAME = "study.db"
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60  # a trial that was silent so long was that of a process that is gone
WAITING_SECONDS = 1  # between looks at what other processes do
STARTUP_TRIALS = 4  # before those that fall behind are stopped, and before guesses are guided by what was measured
RECIPE = "recipe"  # marks the trial of the recipe's own values


class EarlyMedianPruner(optuna.pruners.MedianPruner):
    """Stops what falls behind the median of the finished trials, but not in the first epoch, not after the last step,
    where nothing is saved by it, and never the recipe's own values, which the others are compared with."""

    def __init__(self, trainer: DistillationTrainer):
        super().__init__(n_startup_trials=STARTUP_TRIALS)
        self.trainer = trainer

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        state = self.trainer.state
        if state.epoch <= 1 or state.global_step >= state.max_steps or RECIPE in trial.user_attrs:
            return False
        return super().prune(study, trial)


def run_trials(
    trainer: DistillationTrainer, space: Sequence[Parameter], folder: Path, lock: FileLock, n_trials: int
) -> list[SearchedTrial]:
    """Trials until the database in a folder holds so many that were not cut off, those of other processes included.

    The first has the recipe's own values. A trial whose process is gone is begun again.

    Args:
        lock: that all processes which share the folder take; held from a look at the trials until the next is entered
            among them.

    Returns:
        The trials, in the order in which they were begun.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    waiting = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        with lock:
            study, storage = _open_study(folder, space)
        while True:
            with contextlib.ExitStack() as held:
                held.enter_context(lock)
                optuna.storages.fail_stale_trials(study)
                trials = _trials(study, TrialState.COMPLETE, TrialState.PRUNED)
                running = len(_trials(study, TrialState.RUNNING))
                if len(trials) >= n_trials:
                    return [_searched(trial) for trial in trials]
                if len(trials) + running < n_trials:
                    _run_trial(trainer, study, storage, space, held.close)
                    continue
            if not waiting:
                print(f"{len(trials)} of {n_trials} trials are done; waiting for {running} of other processes.")
            waiting = True
            time.sleep(WAITING_SECONDS)


def _open_study(folder: Path, space: Sequence[Parameter]) -> tuple[optuna.Study, optuna.storages.RDBStorage]:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(folder / DATABASE_NAME).absolute()}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
    )
    study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize", load_if_exists=True)
    alive = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    if not any(RECIPE in trial.user_attrs for trial in alive):
        study.enqueue_trial({parameter.key: parameter.default for parameter in space}, user_attrs={RECIPE: True})
    return study, storage


def _trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _run_trial(
    trainer: DistillationTrainer,
    study: optuna.Study,
    storage: optuna.storages.RDBStorage,
    space: Sequence[Parameter],
    entered: Callable[[], None],
) -> None:
    """One trial of Trainer's search.

    Args:
        entered: called once the trial is in the database with its values.
    """
    losses = trainer.args.losses

    def hp_space(trial: optuna.Trial) -> dict[str, Any]:
        values = {parameter.key: parameter.suggest(trial) for parameter in space}
        entered()
        print(f"trial {trial.number}: {text(values, space)}", flush=True)
        return settings(values, losses)

    # Another seed for each trial: with one for all, each process, and each that goes on, would guess the same again.
    seed = trainer.args.seed + len(study.get_trials(deepcopy=False))
    trainer.hyperparameter_search(
        hp_space,
        compute_objective=lambda metrics: metrics["eval_top1"],
        n_trials=1,
        direction="maximize",
        backend="optuna",
        study_name=STUDY_NAME,
        storage=storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=seed
        ),
        pruner=EarlyMedianPruner(trainer),
    )
    stopped = ", stopped early" if trainer.state.global_step < trainer.state.max_steps else ""
    print(f"top-1 {trainer.objective:.2f}{stopped}", flush=True)


def _searched(trial: FrozenTrial) -> SearchedTrial:
    return SearchedTrial(
        number=trial.number,
        values=trial.params,
        top1=trial.intermediate_values[trial.last_step],
        step=trial.last_step,
        pruned=trial.state == TrialState.PRUNED,
        is_recipe=RECIPE in trial.user_attrs,
        seconds=trial.duration.total_seconds(),
    )
