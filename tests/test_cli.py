"""The command `hfkd`: what it explains, which errors it prints, and how it is started."""

import dataclasses
import functools
import importlib
import inspect
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import Plain
from transformers import TrainingArguments

import hfkd
from hfkd.cli import COMMANDS, main
from hfkd.losses import LOSSES
from hfkd.recipe.config import DistillationConfig
from hfkd.recipe.parser import to_argv
from hfkd.recipe.reading import ARGUMENT_CLASSES

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "train_split": "train[:64]",
    "eval_split": "test[:50]",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "disable_tqdm": True,
}
BESIDE_PYTHON = Path(sys.executable).parent


def recipe(**changes):
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return "r.yaml"


def failing(monkeypatch, error):
    """`hfkd distill` raises `error`, in this file."""

    def distill(argv):
        raise error

    monkeypatch.setattr("hfkd.commands.train.distill", distill)


def test_help_lists_the_commands(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for name, (path, description) in COMMANDS.items():
        assert re.search(rf"^  {name} +{description}$", printed, re.MULTILINE)
        module, function = path.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    main(["--version"])
    assert capsys.readouterr().out == f"hfkd {hfkd.__version__}\n"


def test_env_prints_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    main(["env"])
    printed = capsys.readouterr().out
    found = dict(re.split(r" {2,}", line, maxsplit=1) for line in printed.splitlines())
    assert found["hfkd"] == hfkd.__version__ and found["OMP_NUM_THREADS"] == "3" and "bf16" in found["CPU"]
    assert {"python", "torch", "transformers", "timm", "optuna", "commit of hfkd"} <= found.keys()
    assert "hf_secret" not in printed
    with pytest.raises(SystemExit) as ending:
        main(["env", "--verbose"])
    assert ending.value.code == 2 and "takes no arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "usage: hfkd COMMAND"),
        (["distil"], "hfkd: error: there is no command 'distil'. Did you mean 'distill'?"),
        (["train_teacher"], "Did you mean 'train-teacher'?"),
        (["quickly"], f"no command 'quickly'. Valid: {', '.join(COMMANDS)}"),
    ],
)
def test_no_such_command(argv, message, capsys):
    with pytest.raises(SystemExit) as ending:
        main(argv)
    printed = capsys.readouterr()
    assert ending.value.code == 2 and message in printed.err and not printed.out


def printed_help(capsys, *argv):
    with pytest.raises(SystemExit) as ending:
        main(list(argv))
    assert not ending.value.code
    return capsys.readouterr().out


def groups_of(printed):
    """The keys in each group of a help, by its title."""
    groups = re.split(r"^(?=[a-z].*:$)", printed, flags=re.MULTILINE)[1:]
    return {group.partition(":\n")[0]: re.findall(r"^  --(\w+)", group, re.MULTILINE) for group in groups}


def test_help_explains_every_key(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # each on one line
    printed = printed_help(capsys, "distill", "--help-all")
    assert printed.startswith("usage: hfkd distill RECIPE [--key value ...]\n")
    keys, methods = printed.split("\nmethods, ")
    explained = dict(re.findall(r"^  --(\w+)[ \n](.*?)\n(?=  --|\n|$)", keys, re.MULTILINE | re.DOTALL))
    fields = [field for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls) if field.init]
    assert sorted(explained) == sorted(field.name for field in fields)
    for field in fields:
        if field.name == "debug":  # whose default, an empty string, HfArgumentParser takes for none
            continue
        required = field.default is field.default_factory is dataclasses.MISSING
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        # transformers' own defaults are enumerations in part, which are shown by their value.
        default = "required" if required else f"default: {getattr(default, 'value', default)}"
        shown = " ".join(explained[field.name].split())
        assert re.search(rf"\w.* \({re.escape(default)}\)$", shown), shown
    for name, loss in LOSSES.items():
        (line,) = re.findall(rf"^  {name}: (.*)$", methods, re.MULTILINE)
        assert re.findall(r"(?:^|, )(\w+)", line) == list(inspect.signature(loss).parameters)


TRAINING = "training (transformers' TrainingArguments)"
METHODS = "methods, whose parameters are set by --losses.METHOD.PARAMETER VALUE"


@pytest.mark.parametrize(
    "command, first, last",
    [
        ("distill", [], [METHODS]),
        ("train-teacher", [], [METHODS]),
        ("search", ["search"], []),
        ("cache-teacher", ["cache"], []),
    ],
)
def test_help_leaves_the_keys_of_transformers_to_help_all(command, first, last, capsys):
    """A key that hfkd declares anew, with another default, is its own."""
    short = printed_help(capsys, command, "r.yaml", "--help")  # a recipe that need not be there
    whole = printed_help(capsys, command, "r.yaml", "--help-all")
    assert "`--help-all` explains them" in short.splitlines()[-1] and "`--help-all`" not in whole
    groups, all_groups = groups_of(short), groups_of(whole)
    assert list(groups) == ["options", *first, "model", "data", "distillation", *last]
    assert list(all_groups) == ["options", *first, "model", "data", "distillation", TRAINING, *last]
    ours, theirs = groups["distillation"], all_groups.pop(TRAINING)
    assert all_groups == groups
    inherited = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    assert theirs == [name for name in inherited if name not in ours]
    assert ours == list(inspect.get_annotations(DistillationConfig))
    assert {"losses", "ce_weight", "ema_decay", "output_dir"} <= set(ours)


def test_help_and_mistakes_wait_for_nothing_heavy(tmp_path):
    """What takes seconds to import is not imported before a recipe is found to be right."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    program = """
import sys
from hfkd.cli import main

for argv in (["distill", "--help"], ["distill", "r.yaml", "--sed", "1"]):
    try:
        main(argv)
    except SystemExit:
        pass
heavy = "timm datasets torchvision torch._dynamo transformers.modeling_utils transformers.image_utils".split()
print("imported:", [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "imported: []", done.stderr
    assert "Did you mean 'seed'?" in done.stderr


@pytest.mark.parametrize("command", ["train-teacher", "evaluate", "push"])
def test_each_command_has_help(command, capsys):
    printed = printed_help(capsys, command, "--help")
    assert printed.startswith(f"usage: hfkd {command} ") and "(default: " in printed


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], r"The first argument must be a recipe, got '': hfkd distill RECIPE \[--key value"),
        (["--seed", "1"], "must be a recipe, got '--seed'"),
        (["rr.yaml"], "no recipe at rr.yaml. Did you mean r.yaml?"),
        (["r.yaml", "--sed", "1"], "'sed' in the command line. Did you mean 'seed'?"),
        (["r.yaml", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["r.yaml", "--ce_weight", "-1"], "ce_weight must not be negative"),
        (["r.yaml", "--report_to", "tensorbored"], "report_to.*'tensorboard'"),
        (["r.yaml", "--student_name_or_path", "cifar_resnet9"], "'cifar_resnet9' is no timm"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(argv, message, capsys):
    recipe()
    with pytest.raises(SystemExit) as ending:
        main(["distill", *argv])
    printed = capsys.readouterr()
    assert ending.value.code == 2 and not printed.out
    assert re.search(f"^hfkd distill: error: .*{message}", printed.err) and "Traceback" not in printed.err


def test_what_went_wrong_later_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr("hfkd.commands.train.distill", lambda argv: hfkd.Teacher(Plain(), "plain").model.train())
    with pytest.raises(SystemExit) as ending:
        main(["distill"])
    assert ending.value.code == 1 and "error: A teacher stays in eval mode" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("of a library"), FileNotFoundError("of a library"), SystemExit(143)])
def test_errors_of_others_stay_as_they_are(error, monkeypatch, capsys):
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        main(["distill"])
    assert raised.value is error and not capsys.readouterr().err


def test_a_mistake_in_hfkd_keeps_its_traceback(monkeypatch):
    """It happens in this package, but nobody has raised it."""
    monkeypatch.setattr("hfkd.commands.train.distill", lambda argv: to_argv({"seed": [1]}, parser=None))
    with pytest.raises(AttributeError):
        main(["distill"])


def test_another_process_waits_but_speaks(monkeypatch, capsys):
    """Its error may be its own; if it is everybody's, the launcher ends it while it waits."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            main(["distill", "nowhere.yaml"])
        assert "no recipe at nowhere.yaml" in capsys.readouterr().err
        assert len(waited) == int(rank)


def test_the_token_leaves_the_command_line(monkeypatch):
    """Which W&B records and shows; the command itself gets it."""
    words = "distill r.yaml --hub_token secret --seed 1 --hub-token=secret --hub_token".split()
    seen = []
    monkeypatch.setattr("hfkd.commands.train.distill", lambda argv: seen.append((argv, list(sys.argv))))
    monkeypatch.setattr(sys, "argv", ["hfkd", *words])
    main()
    ((given, recorded),) = seen
    assert given == words[1:] and "secret" not in str(recorded)
    assert recorded[:3] + recorded[5:7] == ["hfkd", "distill", "r.yaml", "--seed", "1"]


def test_the_installed_command_and_ctrl_c():
    """A run that is under way is interrupted."""
    process = subprocess.Popen(
        [BESIDE_PYTHON / "hfkd", "distill", recipe(num_train_epochs=10_000)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell it would inherit that Ctrl-C is ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        give_up = time.monotonic() + 120
        while not Path("runs/r/results.json").is_file() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Ctrl-C: checkpoint-" in errors and "--resume_from_checkpoint true" in errors and "Traceback" not in errors
