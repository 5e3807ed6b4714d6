"""A run that is ended at any moment, by SIGTERM or by kill -9, and resumed comes to what the undisturbed one does."""

import contextlib
import fcntl
import functools
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest
from interrupting import (
    Moments,
    build,
    differences,
    end,
    end_of,
    in_child,
    in_two_processes,
    kill_at_write,
    left_in,
    start,
    write_recipe,
)

from hfkd.cli import main
from hfkd.runs.checkpoints import checkpoints, defect, last_checkpoint

SETTINGS = {
    "saved by epoch": {},
    "saved never, log of many epochs": {"save_strategy": "no", "logging_strategy": "steps", "logging_steps": 5},
    "saved by steps, best exported": {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    },
    "saved by steps, evaluated by epoch": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    "saved when best": {"save_strategy": "best", "load_best_model_at_end": True},
    "average": {"ema_decay": 0.7, "load_best_model_at_end": True, "save_total_limit": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "logging_strategy": "steps", "logging_steps": 2},
    "ends within an epoch": {"max_steps": 5, "lr_milestones": [1], "mixup": 0.8, "dataloader_drop_last": True},
}


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


def assert_stopped_and_resumed(whole, folder, trainer, moment, slack=1):
    """After a training that SIGTERM has ended: is the step in hand saved, and does a resumed run end as the whole?"""
    _, step = moment
    stopped_at = trainer.state.global_step
    assert last_checkpoint(folder) == f"{folder}/checkpoint-{stopped_at}", moment
    assert step <= stopped_at <= step + slack, moment
    resumed = build(folder, **whole.settings)
    resumed.train(resume_from_checkpoint=True)
    expected, given = end_of(whole), end_of(resumed)
    if stopped_at == whole.state.global_step:  # nothing was left to draw
        given["random"] = expected["random"]
    assert differences(expected, given) == [], moment


@pytest.mark.parametrize("name", SETTINGS)
def test_sigterm_at_any_moment(name):
    whole = build("whole", **SETTINGS[name])
    whole.train()
    moments = whole.moments.passed
    last_asked = max(at for at, (event, _) in enumerate(moments) if event == "epoch_end")
    for at, moment in enumerate(moments):
        trainer = build(f"at-{at}", Moments(at), **SETTINGS[name])
        if at > last_asked:  # training is over but for its last evaluation or checkpoint
            trainer.train()
            assert differences(end_of(whole), end_of(trainer)) == [], moment
        else:
            with pytest.raises(SystemExit) as end:
                trainer.train()
            assert end.value.code == 143
            assert_stopped_and_resumed(whole, f"at-{at}", trainer, moment)


def at_any_moment_in_one_of_two(rank):
    settings = {
        "per_device_train_batch_size": 4,
        "ema_decay": 0.7,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    whole = build("whole", **settings)
    whole.train()
    for at, moment in list(enumerate(whole.moments.passed))[::3]:
        trainer = build(f"at-{at}", Moments(at if rank == 1 else None), **settings)
        try:
            trainer.train()
        except SystemExit as end:
            assert end.code == 143
            assert_stopped_and_resumed(whole, f"at-{at}", trainer, moment, slack=2)
        else:
            assert moment[1] == whole.state.global_step and differences(end_of(whole), end_of(trainer)) == []


def test_sigterm_to_one_of_two_processes():
    """Both end after the same step, or SystemExit would leave the other waiting for ever."""
    assert in_two_processes(at_any_moment_in_one_of_two) == [0, 0]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_whole_job(number, code):
    """Clusters signal every process of a job, and so does Ctrl-C: the workers that load images as well."""
    settings = {"dataloader_num_workers": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}

    def run():
        os.setsid()
        at = next(at for at, moment in enumerate(whole.moments.passed) if moment == ("step_end", 3))
        build("cut", Moments(at, lambda: os.killpg(0, number)), **settings).train()

    whole = build("whole", **settings)
    whole.train()
    assert in_child(run) == code
    resumed = build("cut", **settings)
    resumed.train(resume_from_checkpoint="cut/checkpoint-3")
    assert differences(end_of(whole), end_of(resumed)) == []


def test_a_closed_terminal():
    """Writing to it is an error from then on, and the run writes a line a step."""
    settings = {"save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1}

    def run():
        terminal, own = os.openpty()
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup, if it runs the tests, has them ignore
        fcntl.ioctl(own, termios.TIOCSCTTY, 0)
        for descriptor in (own, 1, 2):
            os.dup2(own, descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        at = next(at for at, moment in enumerate(whole.moments.passed) if moment == ("step_end", 2))
        build("cut", Moments(at, lambda: os.close(terminal)), **settings).train()

    whole = build("whole", **settings)
    whole.train()
    assert in_child(run) == 129
    resumed = build("cut", **settings)
    resumed.train(resume_from_checkpoint="cut/checkpoint-2")
    assert differences(end_of(whole), end_of(resumed)) == []


def test_ctrl_c_says_how_to_go_on_and_twice_ends_at_once(capfd, caplog):
    def press(times):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as ended:
        build("once", Moments(3, lambda: press(1))).train()
    assert ended.value.code == 130 and "Press it again to end at once" in capfd.readouterr().err
    assert "Ctrl-C: checkpoint-2 was written, and training ends here. The same command goes on with" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        build("twice", Moments(3, lambda: press(2))).train()
    assert not checkpoints("twice") and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = build("run", Moments(3, lambda: os.kill(os.getpid(), signal.SIGHUP)))
        trainer.train()
        assert trainer.state.global_step == 6 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_handler_is_given_back():
    """Also after an error, and to whom it belonged; a trainer outside the main thread leaves it alone."""
    mine = lambda number, frame: None  # noqa: E731
    former = signal.signal(signal.SIGTERM, mine)

    def fail():
        assert signal.getsignal(signal.SIGTERM) not in (mine, former)
        raise ValueError("mine")

    try:
        build("run", Moments(3, lambda: os.kill(os.getpid(), signal.SIGTERM))).train()
    except SystemExit:
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(ValueError, match="mine"):
            build("run", Moments(3, fail)).train()
        assert signal.getsignal(signal.SIGTERM) is mine
        seen = []
        trainer = build("run", Moments(3, lambda: seen.append(signal.getsignal(signal.SIGTERM))))
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
        assert seen == [mine] and trainer.state.global_step == 6
    finally:
        assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, former)


def test_a_trainer_goes_on_after_it_was_stopped():
    trainer = build("run", Moments(3))
    with pytest.raises(SystemExit):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and not trainer.stop_on_sigterm.stopped


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def trained(output_dir, **changes):
    """As `hfkd distill`: goes on from the last whole checkpoint, if there is one."""
    trainer = build(output_dir, **changes)
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    trainer.export()
    return trainer


def test_kill_9_before_any_write(monkeypatch):
    """Before every other file that a run opens, renames or removes, from its first checkpoint to its export."""
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)  # its figure takes long
    settings = {"ema_decay": 0.7, "save_total_limit": 1, "save_strategy": "steps", "save_steps": 2}
    expected, left = end_of(trained("whole", **settings)), left_in("whole")

    def run_to_write(number):
        kill_at_write(number)
        trained("cut", **settings)

    half_written = 0
    for number in itertools.count(1, 2):
        shutil.rmtree("cut", ignore_errors=True)
        if in_child(functools.partial(run_to_write, number)) == 0:
            break
        half_written += any(defect(folder) for folder in checkpoints("cut"))
        finished = last_checkpoint("cut") == "cut/checkpoint-6"
        given = end_of(trained("cut", **settings)) | ({"random": expected["random"]} if finished else {})
        assert differences(expected, given) == [], number
        assert differences(left, left_in("cut")) == [], number
    assert half_written > 10


# ---- Real processes: from the command line, killed at some moment ----------------------------------------------------


@pytest.fixture
def recipe(monkeypatch):
    write_recipe(monkeypatch)


def command(output_dir, *options):
    return ["distill", "recipe.yaml", "--output_dir", output_dir, *options]


def resumed(output_dir):
    return command(output_dir, "--resume_from_checkpoint", "true")


def await_checkpoint(running):
    """Until the first checkpoint is there, or the process has ended without."""
    while not Path("cut/checkpoint-6/checkpoint.json").exists() and running():
        time.sleep(0.01)


def test_sigterm_to_the_command(recipe):
    process = start(lambda: main(command("cut")))
    await_checkpoint(lambda: psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    os.kill(process, signal.SIGTERM)
    assert end(process) == 143
    assert int(last_checkpoint("cut").rpartition("-")[2]) % 40 > 0 and not Path("cut/student").exists()
    main(resumed("cut"))
    main(command("whole"))
    assert differences(left_in("whole"), left_in("cut")) == []


def test_sigterm_to_one_worker_of_torchrun(recipe):
    """A new Python each: what the launcher says of their exit codes is what a shell would say."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*torchrun, "-m", "hfkd", *command("cut")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        await_checkpoint(lambda: process.poll() is None)
        workers = psutil.Process(process.pid).children(recursive=True)
        next(worker for worker in workers if worker.environ().get("RANK") == "1").send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and re.search(r"exitcode *: 143", output), output[-4000:]
    assert "training ends here" in output
    assert len(list(Path(last_checkpoint("cut")).glob("rng_state_?.pth"))) == 2 and not Path("cut/student").exists()
    assert in_two_processes(lambda rank: main(resumed("cut"))) == [0, 0]
    assert in_two_processes(lambda rank: main(command("whole"))) == [0, 0]
    assert differences(left_in("whole"), left_in("cut")) == []


def test_kill_9_at_random_moments(recipe):
    begun = time.monotonic()
    assert in_child(lambda: main(command("whole"))) == 0
    duration = time.monotonic() - begun
    moments, codes = random.Random(0), []
    for attempt in range(8):
        process = start(lambda: main(resumed("cut")))
        time.sleep(moments.uniform(0.1, 0.2 + 0.1 * attempt) * duration)
        os.kill(process, signal.SIGKILL)
        codes.append(end(process))
    assert set(codes) <= {-9, 0} and codes.count(-9) > 1  # 0: it had ended just before
    main(resumed("cut"))
    assert differences(left_in("whole"), left_in("cut")) == []
