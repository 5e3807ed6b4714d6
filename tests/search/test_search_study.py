"""Trials through Trainer's own search: what they find, and that no interruption and no second process changes it."""

import math
import os
import signal
from types import SimpleNamespace

import optuna
import pytest
import torch
from filelock import FileLock
from helpers import Plain, config, images
from interrupting import end, in_child, start
from transformers import TrainerCallback, TrainerState

from hfkd import DistillationTrainer
from hfkd.errors import RunError
from hfkd.search import study as search_study
from hfkd.search.results import best_of, trials_csv, trials_markdown
from hfkd.search.space import Parameter
from hfkd.search.study import EarlyMedianPruner, run_trials

TEMPERATURE, RATE = "losses.kd.temperature", "learning_rate"
SPACE = [Parameter(TEMPERATURE, 2.0, 0.5, 16.0, log=True), Parameter(RATE, 0.05, choices=(0.025, 0.05, 0.1))]


def planted(args):
    """Accuracy, in percent, of a temperature and a learning rate: the best are 6 and 0.1."""
    distance = math.log(args.losses["kd"]["temperature"] / 6) ** 2 + math.log(args.learning_rate / 0.1) ** 2
    return 90 - 10 * distance


def trainer_of(folder, accuracy=planted, callbacks=(), **changes):
    """Two steps an epoch."""
    settings = {"losses": {"kd": {"temperature": 2.0}}, "eval_strategy": "epoch", "logging_strategy": "no"}
    args = config(folder, **(settings | changes))
    return DistillationTrainer(
        None,
        Plain(),
        args,
        train_dataset=images(16),
        eval_dataset=images(10, seed=1, augment=False),
        model_init=lambda: Plain(),
        compute_metrics=lambda prediction: {"top1": accuracy(args)},
        callbacks=list(callbacks),
    )


def search(folder, n_trials, **changes):
    folder.mkdir(exist_ok=True)
    return run_trials(trainer_of(folder, **changes), SPACE, folder, FileLock(folder / "study.lock"), n_trials)


def states(folder):
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{folder}/study.db")
    return [(trial.state.name, trial.params) for trial in study.trials]


def test_a_planted_optimum_is_found(tmp_path):
    trials = search(tmp_path / "s", 20)
    first, best = trials[0], max(trials, key=lambda trial: trial.top1)
    assert first.is_recipe and first.values == {TEMPERATURE: 2.0, RATE: 0.05} and sum(t.is_recipe for t in trials) == 1
    assert 4.5 < best.values[TEMPERATURE] < 8 and best.values[RATE] == 0.1
    late, early = (sum(trial.top1 for trial in part) for part in (trials[13:], trials[1:8]))
    assert late > early  # it looks where it was good
    assert not any(trial.pruned for trial in trials) and len(trials) == 20
    left = {path.name for path in (tmp_path / "s").iterdir()}
    assert left == {"study.db", "study.lock"}


def test_the_same_command_goes_on(tmp_path):
    begun = search(tmp_path / "s", 3)
    trials = search(tmp_path / "s", 5)
    assert trials[:3] == begun and len(trials) == 5 and len({str(trial.values) for trial in trials}) == 5
    assert search(tmp_path / "s", 5) == trials
    assert [trial.values for trial in search(tmp_path / "whole", 5)] == [trial.values for trial in trials]


def test_what_falls_behind_is_stopped(tmp_path):
    """Not in the first epoch, not after the last, and never the recipe's own values, here the worst of all."""

    def accuracy(args):
        worst = args.losses["kd"]["temperature"] == 2.0
        return trainer.state.epoch * 10 + (-100 if worst else planted(args))

    folder = tmp_path / "s"
    folder.mkdir()
    trainer = trainer_of(folder, accuracy, num_train_epochs=4)
    trials = run_trials(trainer, SPACE, folder, FileLock(folder / "lock"), 10)
    stopped = [trial for trial in trials if trial.pruned]
    assert stopped and {trial.step for trial in stopped} == {4}
    assert not trials[0].pruned and {trial.step for trial in trials if not trial.pruned} == {8}
    finished = [trial.top1 for trial in trials if not trial.pruned]
    assert max(trial.top1 for trial in stopped) + 20 < max(finished)


class At(TrainerCallback):
    """Does something in the middle of a training."""

    def __init__(self, training, act):
        self.training, self.act = training, act

    def on_train_begin(self, *args, **kwargs):
        self.training -= 1

    def on_step_end(self, *args, **kwargs):
        if self.training == 0:
            self.act()


def sent(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trial_is_begun_again(tmp_path, monkeypatch, number):
    folder = tmp_path / "s"
    assert in_child(lambda: search(folder, 5, callbacks=[At(3, sent(number))])) == -number
    assert [state for state, _ in states(folder)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    monkeypatch.setattr(search_study, "GRACE_SECONDS", 1)
    trials = search(folder, 4)
    done = states(folder)
    assert sorted(state for state, _ in done) == ["COMPLETE"] * 4 + ["FAIL"] and done[2][0] == "FAIL"
    assert done[2][1] in [trial.values for trial in trials] and len(trials) == 4
    assert {path.name for path in folder.iterdir()} == {"study.db", "study.lock"}


def test_the_recipes_values_are_begun_again(tmp_path, monkeypatch):
    folder = tmp_path / "s"

    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        search(folder, 2, callbacks=[At(1, fail)])
    trials = search(folder, 2)
    assert [trial.is_recipe for trial in trials] == [True, False] and states(folder)[0][0] == "FAIL"


def test_processes_share_the_trials(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()

    def run():
        trials = search(folder, 9)
        assert len(trials) == 9 and sum(trial.is_recipe for trial in trials) == 1
        torch.save(trials, f"{os.getpid()}.pt")

    children = [start(run) for _ in range(2)]
    assert [end(child) for child in children] == [0, 0]
    one, other = (torch.load(f"{child}.pt", weights_only=False) for child in children)
    assert one == other and len({str(trial.values) for trial in one}) == 9


class Diverge(TrainerCallback):
    """Makes a weight NaN in the second epoch of the trials with some learning rates."""

    def __init__(self, rates):
        self.rates = rates

    def on_step_end(self, args, state, control, model, **kwargs):
        if args.learning_rate in self.rates and state.global_step == 3:
            with torch.no_grad():
                model.fc.weight[0, 0] = math.nan


def test_a_trial_that_diverges_is_stopped_and_never_the_best(tmp_path, capsys):
    callbacks = [Diverge([0.1])]  # the best of `planted`
    trials = search(tmp_path / "s", 8, num_train_epochs=3, callbacks=callbacks)
    diverged = [trial for trial in trials if trial.values[RATE] == 0.1]
    assert diverged and all(trial.diverged and trial.pruned and trial.step == 4 for trial in diverged)
    assert not any(trial.diverged for trial in trials if trial not in diverged)
    assert "diverged: the logits of an evaluation are not finite at step 4" in capsys.readouterr().out
    assert best_of(trials).values[RATE] != 0.1 and trials_markdown(trials, SPACE).count("diverged") == len(diverged)
    assert "nan" not in trials_csv(trials, SPACE)
    every = search(tmp_path / "all", 2, num_train_epochs=3, callbacks=[Diverge([0.025, 0.05, 0.1])])
    with pytest.raises(RunError, match="No trial was trained to the end: 2 of 2 diverged"):
        best_of(every)


@pytest.mark.parametrize(
    "epoch, step, marks, reason, stops",
    [
        (2.0, 4, {}, None, True),
        (1.0, 2, {}, None, False),
        (1.0, 2, {}, "loss is nan", True),
        (4.0, 8, {}, None, False),
        (2.0, 4, {"recipe": True}, None, False),
        (2.0, 4, {"recipe": True}, "loss is nan", True),
    ],
)
def test_when_a_trial_may_be_stopped(epoch, step, marks, reason, stops):
    study = optuna.create_study(direction="maximize")
    for _ in range(4):
        study.add_trial(optuna.create_trial(value=50, intermediate_values={2: 50, 4: 50, 8: 50}))
    behind = optuna.create_trial(value=10, intermediate_values={step: 10}, user_attrs=marks)
    state, divergence = TrainerState(epoch=epoch, global_step=step, max_steps=8), SimpleNamespace(reason=reason)
    trainer = SimpleNamespace(state=state, divergence=divergence)
    assert EarlyMedianPruner(trainer).prune(study, behind) == stops
