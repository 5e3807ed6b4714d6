"""FSDP: what is shared out among two CPU processes is trained, saved, resumed and exported as what is not."""

import os
from types import SimpleNamespace

import fsdp_worker
import pytest
import timm
import torch
from helpers import Plain, config
from interrupting import in_processes
from safetensors.torch import load_file

from hfkd import DistillationTrainer
from hfkd.training.fsdp import check_fsdp


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, of each of two, and the folders of both."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    fsdp_worker.main(str(one), 1, "")

    def sharded(rank):
        os.environ.update({"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
        fsdp_worker.main(str(two), 2, str(one))

    assert in_processes(2, sharded) == [0, 0]
    load = lambda path: torch.load(path, weights_only=False)  # noqa: E731  (written by this test)
    return load(one / "rank0.pt"), load(two / "rank0.pt"), load(two / "rank1.pt"), one, two


@pytest.mark.parametrize(
    "run, tolerance", [("whole", 1e-5), ("resumed", 1e-5), ("bf16", 1e-2), ("partly", 1e-5), ("taught", 1e-5)]
)
def test_as_one_process(runs, run, tolerance):
    one, first, second = (results[run] for results in runs[:3])
    assert one["sharded"] == 0 and first["sharded"] == second["sharded"] == first["parameters"]
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(second["state"][name], first["state"][name], rtol=0, atol=0)
    assert first["top1"] == second["top1"]
    # In bf16 an image or two of 26 may have two classes closer to each other than the two trainings are.
    assert first["top1"] == pytest.approx(one["top1"], abs=200.1 / 26 if run == "bf16" else 1e-6)
    assert first["loss"] == pytest.approx(one["loss"], rel=10 * tolerance)


def test_frozen_parts_stay(runs):
    state = runs[1]["partly"]["state"]
    start = {f"student.{name}": value for name, value in fsdp_worker.vit(0, 32).state_dict().items()}
    moved = {name for name, value in start.items() if not torch.equal(value, state[name])}
    assert moved == {name for name in start if "patch_embed" not in name and "blocks.0." not in name}


def test_resumed_is_identical(runs):
    first = runs[1]
    for name, expected in first["whole"]["state"].items():
        torch.testing.assert_close(first["resumed"]["state"][name], expected, rtol=0, atol=0)


def test_a_checkpoint_of_one_process(runs):
    one, first = runs[0]["resumed"], runs[1]["crossed"]
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-5, atol=1e-5)


def test_the_export_is_the_best(runs):
    one, two = runs[3:]
    student = load_file(two / "whole/student/model.safetensors")
    best = load_file(f"{runs[1]['best']}/model.safetensors")
    assert student.keys() == best.keys() == load_file(one / "whole/student/model.safetensors").keys()
    assert all(torch.equal(student[name], best[name]) for name in best)
    folder = two / "whole"
    names = [sorted(path.name for path in (root / "checkpoint-6").iterdir()) for root in (one / "whole", folder)]
    assert set(names[1]) - set(names[0]) == {"rng_state_0.pth", "rng_state_1.pth"}
    model = timm.create_model(f"local-dir:{folder}/student", pretrained=True, img_size=32)
    assert torch.equal(model.head.weight, best["head.weight"])


def test_a_teacher_shared_out(runs):
    one, first, second = (results["taught"] for results in runs[:3])
    assert first["held"] + second["held"] == one["held"] == one["whole"] == first["whole"]
    assert first["held"] == pytest.approx(one["whole"] / 2, rel=0.05)
    for results in (first, second):
        for dtype, expected in one["logits"].items():
            torch.testing.assert_close(results["logits"][dtype], expected, rtol=0, atol=0)
        assert results["measured"] == one["measured"], "also where one process asks it and the other need not"


def test_shard_teacher_without_fsdp():
    with pytest.raises(ValueError, match="shard_teacher goes with FSDP.*fsdp.yaml"):
        DistillationTrainer(Plain(), Plain(), config(losses={"kd": {}}, shard_teacher=True))


@pytest.mark.parametrize(
    "plugin, changes, message",
    [
        ({"fsdp_version": 1}, {}, "fsdp_version is 1: set it to 2"),
        ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading.*set it to false"),
        ({}, {"ema_decay": 0.9}, "ema_decay needs the whole student"),
        ({}, {"torch_compile": True}, "torch_compile is not supported"),
    ],
)
def test_what_is_refused(plugin, changes, message):
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False} | plugin)
    with pytest.raises(ValueError, match=message):
        check_fsdp(plugin, config(**changes))


def test_where_accelerate_drops_it(monkeypatch):
    """It would train unsharded without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="FSDP was requested.*1 process.*cpu"):
        DistillationTrainer(Plain(), Plain(), config(losses={"kd": {}}))
