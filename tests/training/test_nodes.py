"""One run on several machines, which torchrun starts: here two of its agents on one machine.

Also what is said where machines, processes or checkpoints are not those that a run needs.
"""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import ROOT, Plain, config, images
from interrupting import RECIPE, build, differences, end, in_child, in_processes, left_in, start, write_recipe
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from hfkd import DistillationTrainer
from hfkd.cli import main
from hfkd.recipe.reading import parse_recipe
from hfkd.runs.checkpoints import last_checkpoint

LIMIT = 200  # seconds, after which a process that waits for another gives up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- A node is lost --------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch):
    # 11 test images do not divide among two processes.
    write_recipe(monkeypatch, eval_split="test[:11]", num_train_epochs=3)


def command(output_dir, *options):
    return ["distill", "recipe.yaml", "--output_dir", output_dir, "--resume_from_checkpoint", "true", *options]


def work(argv):
    """`hfkd distill`, which notes that it was started, and ends if it waits for ever."""
    signal.alarm(LIMIT)
    with open("starts.txt", "a") as starts:
        starts.write(f"{os.environ['GROUP_RANK']}:{os.environ['TORCHELASTIC_RESTART_COUNT']}\n")
    main(argv)


class Node:
    """What one machine runs: torchrun's agent and its one process.

    Both are forked from this one, which has imported everything. All else is as `torchrun` does it.
    """

    def __init__(self, hosts_rendezvous, port):
        self.hosts_rendezvous, self.port = hosts_rendezvous, port
        self.code = None
        self.process = start(self._run)

    def _run(self):
        signal.alarm(LIMIT)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        options = (
            "--nnodes 2 --nproc_per_node 1 --max_restarts 3 --start_method fork --rdzv_backend c10d --rdzv_id run "
            f"--rdzv_endpoint 127.0.0.1:{self.port} --rdzv_conf is_host={self.hosts_rendezvous} -m hfkd"
        )
        torchrun = parse_args([*options.split(), *command("cut")])
        settings, _, _ = config_from_args(torchrun)
        elastic_launch(settings, work)(torchrun.training_script_args)

    def wait(self):
        self.code = end(self.process)
        return self.code

    def lose(self):
        """kill -9 to all, as where the power fails."""
        if self.code is None:
            agent = psutil.Process(self.process)
            for process in [*agent.children(recursive=True), agent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.wait()


def test_a_lost_node_comes_back(recipe, capfd):
    """The other one waits for it, and both go on from the last checkpoint to the weights of an undisturbed run."""
    port, give_up = free_port(), time.monotonic() + LIMIT
    nodes = [Node(True, port), Node(False, port)]
    try:
        while not Path("cut/checkpoint-6/checkpoint.json").exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        nodes[1].lose()
        stood_at = int(last_checkpoint("cut").rpartition("-")[2])
        nodes.append(Node(False, port))
        codes = [nodes[number].wait() for number in (0, 2)]
    finally:
        for node in nodes:
            node.lose()
    printed = capfd.readouterr()
    assert codes == [0, 0], printed.err[-4000:]
    assert stood_at < 60
    # The new agent's first start is the other one's second.
    assert sorted(Path("starts.txt").read_text().split()) == ["0:0", "0:1", "1:0", "1:0"]
    assert printed.out.count("cut/student holds the last.") == 1  # one process speaks and writes for all
    assert in_processes(2, lambda rank: main(command("whole"))) == [0, 0]
    assert differences(left_in("whole"), left_in("cut")) == []
    files = [{path.relative_to(run) for path in Path(run).rglob("*")} for run in ("whole", "cut")]
    assert files[0] == files[1] and Path("checkpoint-60/rng_state_1.pth") in files[0]


# ---- A node that never comes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, found", [(0, "1/2 clients joined"), (1, "127.0.0.1")])
def test_a_process_that_never_comes(rank, found, capfd):
    """The first one waits for the others, and the others for the first one."""
    port = free_port()
    here = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def alone():
        os.environ.update({key: str(value) for key, value in here.items()})
        signal.alarm(LIMIT)
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        main(command("cut", "--ddp_timeout", "1"))

    assert in_child(alone) == 1
    printed = capfd.readouterr().err
    expected = f"hfkd distill: error: Process {rank} of 2 waited for the others at 127.0.0.1:{port} for 1 s"
    assert expected in printed and found in printed and "Wait longer with --ddp_timeout SECONDS" in printed
    assert "Traceback" not in printed and not Path("cut").exists()


# ---- Other processes than before -------------------------------------------------------------------------------------

EACH_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_strategy": "steps",
    "per_device_train_batch_size": 4,
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of a run of two processes, three steps an epoch, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert in_processes(2, lambda rank: build("run", **EACH_STEP).train()) == [0, 0]
    return folder / "run"


def resumed(checkpoint, **changes):
    trainer = build("run", **EACH_STEP | changes)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.parametrize("step, epoch, here", [(4, "1.333", "0.6667"), (3, "1", "0.5"), (1, "0.3333", "0.1667")])
def test_another_number_of_images_a_step(of_two, step, epoch, here):
    """Trainer would go on in another epoch, and end earlier or later, whatever may change of the recipe."""
    checkpoint = of_two / f"checkpoint-{step}"
    message = (
        f"checkpoint-{step} was written by 2 processes, and this run has 1. It stands at epoch {epoch}, and its {step} "
        f"steps would be {here} epochs here. Keep the 8 images a batch by --per_device_train_batch_size 8 "
        "--allow_recipe_change true"
    )
    with pytest.raises(ValueError, match=message):
        resumed(checkpoint)
    with pytest.raises(ValueError, match="Keep gradient_accumulation_steps and the training images as they were"):
        resumed(checkpoint, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=message):
        resumed(checkpoint, allow_recipe_change=True)


def test_as_many_images_a_step(of_two, caplog):
    """One process goes on as two would have, but for rounding."""
    whole = torch.load(of_two / "checkpoint-6/optimizer.pt")
    trainer = resumed(of_two / "checkpoint-4", per_device_train_batch_size=8)
    assert trainer.state.global_step == 6 and "its random numbers will differ" in caplog.text
    for expected, given in zip(whole["state"].values(), trainer.optimizer.state_dict()["state"].values(), strict=True):
        torch.testing.assert_close(given["momentum_buffer"], expected["momentum_buffer"], rtol=1e-4, atol=1e-6)


def test_processes_that_do_not_divide(of_two):
    """What a batch was cannot be shared out; an epoch and an evaluation can."""

    def run(rank):
        with pytest.raises(ValueError, match="A batch of 8 images cannot be divided among 3 processes"):
            resumed(of_two / "checkpoint-4")
        data = {"train_dataset": images(32), "eval_dataset": images(26, seed=1, augment=False)}
        trainer = DistillationTrainer(Plain(), None, config(per_device_train_batch_size=4), **data)
        trainer.train()
        assert trainer.state.global_step == 3 and trainer.state.epoch == 1  # the last step has four images again
        right = trainer.evaluate()["eval_top1"] * 26 / 100
        assert right == pytest.approx(round(right))
        with pytest.raises(ValueError, match="10 training images do not fill a batch of 4 for each of 3 process"):
            data["train_dataset"] = images(10)
            DistillationTrainer(Plain(), None, config(dataloader_drop_last=True, per_device_train_batch_size=4), **data)

    assert in_processes(3, run) == [0, 0, 0]


def test_folders_that_are_not_the_same(of_two, capfd):
    """A machine that does not see the others' files would start from the first step, with others' weights."""

    def run(rank):
        where = of_two if rank == 0 else "elsewhere"
        build(where, **EACH_STEP).train(resume_from_checkpoint=last_checkpoint(where))

    assert in_processes(2, run) == [1, 1]
    message = (
        "Process 0 would resume from checkpoint-6 and process 1 from none: all machines must see the same files in "
    )
    assert capfd.readouterr().err.count(message) == 2


# ---- Slurm -----------------------------------------------------------------------------------------------------------

STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> scontrol.txt; fi',
    # The arguments, and a step that goes on until it is signalled or, as the test says, ends by itself.
    "srun": 'printf "%s\\n" "$@" > srun.txt; echo $$ > srun.pid; trap "exit $AT_SIGTERM" TERM\n'
    'for i in $(seq $TENTHS); do sleep 0.1; done; exit "$CODE"',
    "scancel": 'echo "$@" > scancel.txt; kill -TERM "$(cat srun.pid)"',
}


def start_job(tenths=600, code=0, at_sigterm=1):
    Path("bin").mkdir()
    for name, lines in STUBS.items():
        Path("bin", name).write_text(f"#!/bin/bash\n{lines}\n")
        Path("bin", name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "PATH": f"{Path('bin').absolute()}:{os.environ['PATH']}"}
    ends = {"TENTHS": str(tenths), "CODE": str(code), "AT_SIGTERM": str(at_sigterm)}
    script = [str(ROOT / "recipes/slurm/distill.sbatch"), str(ROOT / "recipes/digits/kd.yaml"), "--seed", "3"]
    return subprocess.Popen(["bash", *script], env=os.environ | job | ends)


@pytest.mark.parametrize("code", [0, 7])
def test_slurm_starts_torchrun(code):
    assert start_job(tenths=1, code=code).wait(timeout=30) == code
    option, torchrun, *arguments = Path("srun.txt").read_text().splitlines()
    assert option == "--kill-on-bad-exit=1" and torchrun == "torchrun" and not Path("scontrol.txt").exists()
    parsed = parse_args(arguments)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "4", 3)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id) == ("c10d", "node7:24242", "4242.0")
    assert parsed.module and parsed.training_script == "hfkd"
    command, *rest = parsed.training_script_args
    _, _, args, _ = parse_recipe(rest)
    assert command == "distill" and args.resume_from_checkpoint == "true" and args.seed == 3


@pytest.mark.parametrize("at_sigterm, requeued", [(1, True), (0, False)])
def test_slurm_ends_and_requeues(at_sigterm, requeued):
    """Before its time is up, unless the run ends in the meantime."""
    job = start_job(at_sigterm=at_sigterm)
    give_up = time.monotonic() + LIMIT
    while not Path("srun.pid").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    time.sleep(0.1)  # `trap` is the next line of each
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == at_sigterm
    assert Path("scancel.txt").read_text() == "--signal=TERM 4242\n"
    assert Path("scontrol.txt").exists() == requeued
    assert not requeued or Path("scontrol.txt").read_text() == "requeue 4242\n"
