"""DeepSpeed's ZeRO: with two CPU processes training, checkpoints and exports are those of one without it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import deepspeed_worker
import pytest
import torch
from helpers import ROOT, Plain, config
from safetensors.torch import load_file

from hfkd import DistillationTrainer
from hfkd.training.zero import check_zero


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, of each of two, and the folders of both."""
    pytest.importorskip("deepspeed")
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    deepspeed_worker.main(str(one), 1, "")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "deepspeed_worker.py"), str(two), "2", str(one)],
        cwd=two,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=900,  # the first time DeepSpeed compiles how CPU processes talk
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    load = lambda path: torch.load(path, weights_only=False)  # noqa: E731  (written by this test)
    return load(one / "rank0.pt"), load(two / "rank0.pt"), load(two / "rank1.pt"), one, two


@pytest.mark.parametrize("run, stage, tolerance", [("whole", 2, 1e-6), ("adamw", 1, 1e-5), ("bf16", 2, 1e-3)])
def test_as_one_process(runs, run, stage, tolerance):
    one, first, second = (results[run] for results in runs[:3])
    assert (one["stage"], first["stage"]) == (0, stage)
    assert first["share"] + second["share"] == pytest.approx(first["trained"], abs=8), "padded to a multiple of 4 each"
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(second["state"][name], first["state"][name], rtol=0, atol=0)
    assert first["rates"] == one["rates"]
    assert first["top1"] == second["top1"]
    # In bf16 an image of 26 may have two classes closer to each other than the two trainings are.
    assert first["top1"] == pytest.approx(one["top1"], abs=100.1 / 26 if run == "bf16" else 1e-6)
    assert first["loss"] == pytest.approx(one["loss"], rel=tolerance)


@pytest.mark.parametrize("run", ["whole", "adamw"])
def test_resumed_is_identical(runs, run):
    first = runs[1]
    for name, expected in first[run]["state"].items():
        torch.testing.assert_close(first[f"{run} resumed"]["state"][name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("run", ["whole", "adamw"])
def test_a_checkpoint_of_one_process(runs, run):
    one, first = runs[0][f"{run} resumed"], runs[1][f"{run} crossed"]
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ["whole", "adamw", "bf16"])
def test_the_export_is_the_best(runs, run):
    student = load_file(runs[4] / run / "student/model.safetensors")
    best = load_file(f"{runs[1][run]['best']}/model.safetensors")
    assert student.keys() == best.keys()
    assert all(torch.equal(student[name], best[name]) for name in best)
    assert {value.dtype for value in student.values()} == {torch.float32}


def test_a_checkpoint_is_that_of_any_other_run(runs):
    """Whole tensors in the same files."""
    folders = [folder / "adamw/checkpoint-6" for folder in runs[3:]]
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert names[0] ^ names[1] == {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    one, two = (torch.load(folder / "optimizer.pt") for folder in folders)
    assert [group["params"] for group in two["param_groups"]] == [group["params"] for group in one["param_groups"]]
    assert two["state"].keys() == one["state"].keys()
    for index, state in one["state"].items():
        for key, expected in state.items():
            torch.testing.assert_close(two["state"][index][key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "plugin, changes, message",
    [
        ({"zero_stage": 3}, {}, "zero_stage is 3: set it to 1 or 2.*fsdp.yaml"),
        ({"zero_stage": 0}, {}, "zero_stage is 0"),
        ({"offload_optimizer_device": "cpu"}, {}, "offload_optimizer_device is cpu"),
        ({}, {"torch_compile": True}, "torch_compile is not supported"),
        ({}, {"fp16": True}, "With fp16, DeepSpeed.*set bf16"),
    ],
)
def test_what_is_refused(plugin, changes, message):
    defaults = {"zero_stage": 2, "offload_optimizer_device": "none", "offload_param_device": "none"}
    args = SimpleNamespace(**{"fp16": False, "torch_compile": False} | changes)
    with pytest.raises(ValueError, match=message):
        check_zero(SimpleNamespace(**defaults | plugin), args)


def test_where_accelerate_drops_it(monkeypatch):
    """It would train on without a word."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="DeepSpeed was requested.*cpu"):
        DistillationTrainer(Plain(), Plain(), config(losses={"kd": {}}))
