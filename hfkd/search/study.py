"""Trials of a search in an Optuna database, shared by several processes and continued by later ones."""

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
from sqlalchemy.exc import DatabaseError

from ..errors import HfkdError
from ..training.trainer import DistillationTrainer
from .results import DATABASE_NAME, SearchedTrial
from .space import Parameter, settings, text

STUDY_NAME = "search"
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60  # without a heartbeat for the grace period, a trial's process has died
WAITING_SECONDS = 1  # between two checks of other processes' trials
STARTUP_TRIALS = 4  # trials before any is stopped early, and before the sampler uses the measurements
RECIPE = "recipe"  # user attribute of the trial of the recipe's own values


class EarlyMedianPruner(optuna.pruners.MedianPruner):
    """Median pruner that spares the first epoch, the last step and the trial of the recipe's own values.

    After the last step nothing is saved by stopping. The recipe's own values are the baseline of the other trials. A
    trial that has diverged is always stopped.
    """

    def __init__(self, trainer: DistillationTrainer):
        super().__init__(n_startup_trials=STARTUP_TRIALS)
        self.trainer = trainer

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return True if a trial is to be stopped."""
        if self.trainer.divergence.reason is not None:
            return True
        state = self.trainer.state
        if state.epoch <= 1 or state.global_step >= state.max_steps or RECIPE in trial.user_attrs:
            return False
        return super().prune(study, trial)


def run_trials(
    trainer: DistillationTrainer, space: Sequence[Parameter], folder: Path, lock: FileLock, n_trials: int
) -> list[SearchedTrial]:
    """Run trials until the database holds `n_trials` that were not interrupted, including other processes' trials.

    The first trial has the recipe's own values. A trial whose process has died is run again.

    Args:
        lock: lock that all processes sharing the folder take. It is held from counting the trials until the next one is
            in the database, so that two processes never start the same one.

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
                known = study.get_trials(deepcopy=False)  # once: a trial that ends between two readings is in neither
                trials = [trial for trial in known if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
                running = sum(trial.state == TrialState.RUNNING for trial in known)
                if len(trials) >= n_trials:
                    return [_searched_trial(trial) for trial in trials]
                if len(trials) + running < n_trials:
                    _run_trial(trainer, study, storage, space, held.close)
                    continue
            if not waiting:
                print(f"{len(trials)} of {n_trials} trials are done; other processes are running {running}.")
            waiting = True
            time.sleep(WAITING_SECONDS)


def _open_study(folder: Path, space: Sequence[Parameter]) -> tuple[optuna.Study, optuna.storages.RDBStorage]:
    """Open or create the study, and enqueue the trial of the recipe's own values if there is none."""
    path = folder / DATABASE_NAME
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path.absolute()}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize", load_if_exists=True)
    except (DatabaseError, RuntimeError, AssertionError) as error:
        raise HfkdError(
            f"{path} is damaged ({str(error).splitlines()[0]}): remove it, and with it the trials that it holds, or "
            "give another --search_dir."
        ) from error
    alive = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    if not any(RECIPE in trial.user_attrs for trial in alive):
        study.enqueue_trial({parameter.key: parameter.default for parameter in space}, user_attrs={RECIPE: True})
    return study, storage


def _run_trial(
    trainer: DistillationTrainer,
    study: optuna.Study,
    storage: optuna.storages.RDBStorage,
    space: Sequence[Parameter],
    entered: Callable[[], None],
) -> None:
    """Run one trial with Trainer's hyper-parameter search.

    Args:
        entered: function called once the trial is in the database with its values.
    """
    losses = trainer.args.losses

    def hp_space(trial: optuna.Trial) -> dict[str, Any]:
        values = {parameter.key: parameter.suggest(trial) for parameter in space}
        entered()
        print(f"trial {trial.number + 1}: {text(values, space)}", flush=True)
        return settings(values, losses)

    # Each trial has its own seed. With a common one, the samplers of all processes would suggest the same values.
    seed = trainer.args.seed + len(study.get_trials(deepcopy=False))
    try:
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
    except ValueError:
        if trainer.divergence.reason is None:  # else Trainer asks for the best trial, and there may be none yet
            raise
    stopped = ", stopped early" if trainer.state.global_step < trainer.state.max_steps else ""
    reason = trainer.divergence.reason
    print(f"diverged: {reason}" if reason else f"top-1 {trainer.objective:.2f}{stopped}", flush=True)


def _searched_trial(trial: FrozenTrial) -> SearchedTrial:
    """Return a trial of Optuna as a `SearchedTrial`."""
    return SearchedTrial(
        number=trial.number + 1,  # Optuna counts from 0; figure and tables from 1
        values=trial.params,
        top1=trial.intermediate_values[trial.last_step],
        step=trial.last_step,
        pruned=trial.state == TrialState.PRUNED,
        is_recipe=RECIPE in trial.user_attrs,
        seconds=trial.duration.total_seconds(),
    )
