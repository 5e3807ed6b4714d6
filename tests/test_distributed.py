"""Two CPU processes give the update of one process with the same global batch."""

import os
import subprocess
import sys

import distributed_worker
import pytest
import torch
from helpers import ROOT


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, and of each of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = str(ROOT / "tests" / "distributed_worker.py")
    process = subprocess.Popen(
        [*launch, worker, str(two), "2"],
        cwd=two,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    distributed_worker.main(str(one), 1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    load = lambda path: torch.load(path, weights_only=False)  # noqa: E731  (written by this test)
    return load(one / "rank0.pt"), load(two / "rank0.pt"), load(two / "rank1.pt"), two


@pytest.mark.parametrize("zscore", ["", "_zscore"])
@pytest.mark.parametrize("method", distributed_worker.MEANS)
def test_same_update(runs, method, zscore):
    one, first, second, _ = (run[method + zscore] if isinstance(run, dict) else run for run in runs)
    assert one["state"].keys() == first["state"].keys()
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(second["state"][name], first["state"][name], rtol=0, atol=0)
    for expected, given in zip(one["logs"], first["logs"], strict=True):
        for key in (key for key in expected if key.startswith("loss_")):
            assert given[key] == pytest.approx(expected[key], rel=1e-6), key


def test_evaluation_sees_every_image_once(runs):
    one, first, second, _ = (run["kd"] if isinstance(run, dict) else run for run in runs)
    for key in ("eval_loss", "eval_top1", "eval_top5", "eval_agreement", "eval_teacher_top1"):
        assert first["metrics"][key] == second["metrics"][key] == pytest.approx(one["metrics"][key])


def test_two_views_with_batchnorm(runs):
    """MLKD: two forwards a step through BatchNorm. All ranks hold the same weights, and evaluate as one."""
    _, first, second, _ = (run["mlkd"] if isinstance(run, dict) else run for run in runs)
    for name, value in first["state"].items():
        torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0, msg=name)
    assert first["metrics"]["eval_top1"] == second["metrics"]["eval_top1"]


def test_the_checkpoint_is_written_once(runs):
    folder = runs[3]
    files = sorted(path.name for path in (folder / "ctkd").glob("checkpoint-8/*"))
    assert files.count("model.safetensors") == files.count("losses.safetensors") == 1
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(files)
