"""`hfkd choose`: successive halving on held-out images, and a verdict that tells a gain from chance."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from hfkd.cli import main
from hfkd.search.candidates import ALONE, Candidate, candidates
from hfkd.search.halving import FINALISTS, SEEDS, Journal, Plan, Trial, halve
from hfkd.search.verdict import gains, page


def simulated(quality, images=2000, noise=1.5):
    """Stand in for trainings: a candidate's accuracy is its quality, other seeds and images scatter around it."""
    calls = []

    def train(candidate, steps, seed):
        calls.append((candidate.name, steps, seed))
        draws = np.random.default_rng([len(candidate.name), steps, seed, 7])
        share = (quality(candidate) + noise * draws.standard_normal()) / 100
        right = draws.random(images) < share
        return Trial(candidate.name, steps, seed, 100 * share, "".join("01"[int(each)] for each in right), 1.0)

    return train, calls


def chosen(tmp_path, quality, seed=0, **scatter):
    journal = Journal(tmp_path / f"trials-{seed}.json")
    journal.plan = Plan((10, 30, 90))
    train, calls = simulated(quality, **scatter)
    rounds = halve(candidates(), journal, train, seed)
    return rounds, calls


def test_rounds_have_a_third_of_the_candidates_and_three_times_the_steps(tmp_path):
    rounds, calls = chosen(tmp_path, lambda candidate: 60.0)
    count = len(candidates())
    assert [len(trials) for trials in rounds] == Plan.sizes(count) == [count, 6, (FINALISTS + 1) * SEEDS]
    assert [trials[0].steps for trials in rounds] == [10, 30, 90]
    assert [trial.candidate for trial in rounds[-1][:SEEDS]] == [ALONE] * SEEDS
    assert {trial.seed for trial in rounds[-1]} == {0, 1, 2}
    assert len(set(calls)) == len(calls) == sum(Plan.sizes(count))


def test_a_planted_gain_is_found_and_said_to_be_sure(tmp_path):
    best = candidates()[7].name
    rounds, _ = chosen(tmp_path, lambda candidate: 70.0 if candidate.name == best else 60.0)
    gain = gains(rounds[-1])[0]
    assert gain.candidate == best and gain.is_sure and gain.low < 10 < gain.high
    text = page(rounds, "2,000 images", "hfkd distill best.yaml")
    assert text.startswith(f"# Take {best}\n") and f"{gain.mean:+.2f} points" in text


def test_where_distillation_gives_nothing_it_says_so(tmp_path):
    verdicts = [chosen(tmp_path, lambda candidate: 60.0, seed=seed)[0] for seed in range(16)]
    claimed = [gains(rounds[-1])[0].is_sure for rounds in verdicts]
    assert sum(claimed) <= 1, "the better of two finalists, at 95 %"
    text = page(verdicts[claimed.index(False)], "2,000 images", "hfkd distill best.yaml")
    assert text.startswith("# Take the student alone\n")
    assert chosen(tmp_path, lambda candidate: 60.0 if candidate.name == ALONE else 40.0, seed=99)[0][-1]


def test_an_interrupted_choice_goes_on(tmp_path):
    journal = Journal(tmp_path / "trials.json")
    journal.plan = Plan((10, 30, 90))
    train, _ = simulated(lambda candidate: 60.0)

    def interrupted(candidate, steps, seed):
        if len(journal.trials) == 20:
            raise KeyboardInterrupt
        return train(candidate, steps, seed)

    with pytest.raises(KeyboardInterrupt):
        halve(candidates(), journal, interrupted, 0)
    again, calls = simulated(lambda candidate: 60.0)
    resumed = Journal(tmp_path / "trials.json")
    assert halve(candidates(), resumed, again, 0) == chosen(tmp_path, lambda candidate: 60.0)[0]
    assert len(calls) == sum(Plan.sizes(len(candidates()))) - 20


def test_a_plan_fits_into_the_time_and_short_times_are_refused():
    plan = Plan.fit(18, minutes=10, step=0.05, overhead=1.0, longest=10**6)
    sizes = Plan.sizes(18)
    seconds = sum(size * (1.0 + 0.05 * steps) for size, steps in zip(sizes, plan.steps, strict=True))
    assert 0.8 * 600 < seconds <= 0.9 * 600
    assert Plan.fit(18, 10**6, 0.05, 1.0, longest=900).steps == (100, 300, 900), "no longer than the recipe"
    slow = Plan.fit(18, minutes=10, step=0.05, overhead=1.0, longest=10**6, teacher=1.0, kinds=2)
    seen = 2 * slow.steps[-1]  # steps whose batch is the teacher's to compute
    seconds = sum(size * (1.0 + 0.05 * steps) for size, steps in zip(sizes, slow.steps, strict=True)) + 1.0 * seen
    assert 0.8 * 600 < seconds <= 0.9 * 600
    inside = Plan.fit(18, minutes=10, step=0.05, overhead=1.0, longest=10**6, teacher=0.1, kinds=3, inside=2)
    # Two candidates, which are trained in all rounds and have three seeds in the last one.
    seen = 3 * inside.steps[-1] + sum(number * steps for number, steps in zip((2, 2, 6), inside.steps, strict=True))
    seconds = sum(size * (1.0 + 0.05 * steps) for size, steps in zip(sizes, inside.steps, strict=True)) + 0.1 * seen
    assert 0.8 * 600 < seconds <= 0.9 * 600
    with pytest.raises(ValueError, match="minutes: 0.5 are too few. .* give 2 or more"):
        Plan.fit(18, minutes=0.5, step=0.05, overhead=1.0, longest=10**6)
    with pytest.raises(ValueError, match="minutes: 2 are too few. .* give 5 or more"):
        Plan.fit(18, minutes=2, step=0.05, overhead=1.0, longest=10**6, spent=3.0)


def test_the_own_losses_are_a_candidate_unless_they_are_listed():
    assert candidates(Candidate("own", {"at": {"weight": 1.0}}))[1].name == "own"
    listed = candidates()[3]
    assert candidates(Candidate("own", listed.losses, listed.ce_weight, listed.logit_standardization)) == candidates()


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    """With few candidates: real trainings of the digits, from the plan to the recipe that is then trained.

    Several teachers have no features in common, which one of the candidates reads.
    """
    few = [each for each in candidates() if each.name == ALONE or set(each.losses) == {"kd"}][:4]
    few.append(next(each for each in candidates() if each.name == "KD and PKT"))
    monkeypatch.setattr("hfkd.commands.choose.candidates", lambda own: few)
    data = ["--dataset_name", "digits", "--num_train_epochs", "0.2", "--learning_rate", "0.02", "--bf16", "false"]
    main(["train-teacher", "digits/teacher", *data, "--output_dir", "teacher", "--student", "cifar_resnet8"])
    words = ["digits/kd_zscore", *data, "--student", "cifar_resnet8", "--teacher", "teacher/teacher", "teacher/teacher"]
    words += ["--early_stopping_patience", "1"]
    main(["choose", *words, "--minutes", "5", "--choose_dir", "choice"])
    told = capsys.readouterr().out
    assert "train_runtime" not in told and "training-" not in told
    assert told.count("\ncache     ") == 1
    kept = Path(datasets.config.HF_DATASETS_CACHE).glob("hfkd_teacher_outputs/*")
    assert len(list(kept)) == 2, "one for all candidates with Z-scores, which several teachers average, one without"
    text = (tmp_path / "choice/choice.md").read_text()
    assert "KD and PKT is left out. Losses read the teacher's layers" in told
    assert text in told and "training images that were held out" in text
    trials = json.loads((tmp_path / "choice/trials.json").read_text())["trials"]
    assert len(trials) == sum(Plan.sizes(4)) and {len(trial["judged"]) for trial in trials} == {144}
    assert not list((tmp_path / "choice").glob("training-*"))
    with monkeypatch.context() as patch:
        patch.setattr("hfkd.commands.choose.DistillationTrainer", None)
        main(["choose", *words, "--minutes", "5", "--choose_dir", "choice"])
    assert text in capsys.readouterr().out, "nothing is trained or built twice"
    with pytest.raises(SystemExit):
        main(["choose", *words, "--learning_rate", "0.03", "--choose_dir", "choice"])
    assert "holds another choice" in capsys.readouterr().err
    best = yaml.safe_load((tmp_path / "choice/best.yaml").read_text())
    assert best["output_dir"] == "choice/best" and "max_steps" not in best and "early_stopping_patience" not in best
    main(["distill", "choice/best.yaml", "--max_steps", "1"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--minutes", "0"], "minutes must be above 0"),
        (["--held_out", "1"], "held_out is a share, above 0 and below 1"),
        (["--output_dir", "x"], "give --choose_dir"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["choose", "digits/kd_zscore", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err
