"""Two CPU processes give the update of one process with the same global batch, or that of their two batches."""

import re

import datasets
import distributed_worker
import numpy as np
import pytest
import torch
from filelock import FileLock
from interrupting import end, start_processes
from PIL import Image

from hfkd.losses import LOSSES, CRDLoss


def train_in_one_and_in_two(folder):
    one, two, data = (folder / name for name in ("one", "two", "data"))
    for path in (one, two, data):
        path.mkdir(parents=True)
    for split, rows in (("train", 40), ("test", 9)):
        pixels = np.random.default_rng(rows).integers(0, 255, (rows, 20, 24, 3), dtype=np.uint8)
        columns = {"image": [Image.fromarray(picture) for picture in pixels], "label": [i % 10 for i in range(rows)]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        table = datasets.Dataset.from_dict(columns, features=features)
        for shard in range(3):
            table.shard(3, shard).to_parquet(str(data / f"{split}-{shard}-of-3.parquet"))
    processes = start_processes(2, lambda rank: distributed_worker.main(str(two), 2, str(data)))
    try:
        distributed_worker.main(str(one), 1, str(data))
    finally:
        codes = [end(process) for process in processes]
    assert codes == [0, 0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, worker_id):
    """Results of one process, and of each of two.

    The first of pytest's workers that needs them makes them, the others wait: they take a minute of all cores.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            train_in_one_and_in_two(folder)
    load = lambda path: torch.load(path, weights_only=False)  # noqa: E731  (written by this test)
    one, two = folder / "one", folder / "two"
    return load(one / "rank0.pt"), load(two / "rank0.pt"), load(two / "rank1.pt"), two


def named(runs):
    """With those of the methods whose logits are standardized."""
    return [*runs, *(f"{name}_zscore" for name in runs if name in distributed_worker.READ_LOGITS)]


def largest_difference(one, other, names):
    return max((one[name] - other[name]).abs().max().item() for name in names)


def assert_same_update(expected, first, second):
    """In both processes, to what float64 rounds."""
    assert expected["state"].keys() == first["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(second["state"][name], first["state"][name], rtol=0, atol=0)
    for wanted, given in zip(expected["logs"], first["logs"], strict=True):
        for key in (key for key in wanted if key.startswith("loss_")):
            assert given[key] == pytest.approx(wanted[key], rel=1e-6), key


def test_every_method_is_a_mean_or_coupled():
    means, coupled = (
        {method for losses in runs.values() for method in losses}
        for runs in (distributed_worker.MEANS, distributed_worker.COUPLED)
    )
    assert means | coupled == set(LOSSES), "say of a new method what several processes make of it"
    assert not means & coupled


@pytest.mark.parametrize("name", named(distributed_worker.MEANS))
def test_a_mean_is_that_of_one_process(runs, name):
    one, first, second = (run[name] for run in runs[:3])
    assert_same_update(one, first, second)


@pytest.mark.parametrize("name", named(distributed_worker.COUPLED))
def test_a_coupled_loss_compares_the_images_of_one_process(runs, name):
    """As one process does that accumulates the gradients of two batches; in one batch each has more to compare with."""
    one, first, second = (run[name] for run in runs[:3])
    assert_same_update(runs[0][f"{name}_accumulated"], first, second)
    assert largest_difference(one["state"], first["state"], one["state"]) > 1e-5


def test_batch_norm_sees_the_images_of_one_process(runs):
    """As above, in both views of MLKD. Of the running statistics, which are the first process's, no update is made."""
    accumulated, first, second = (run["batch_norm"] for run in runs[:3])
    weights = [name for name in first["state"] if not re.search("running_|num_batches", name)]
    assert largest_difference(accumulated["state"], first["state"], weights) < 1e-9
    assert set(weights) < set(first["state"])
    assert largest_difference(first["state"], second["state"], first["state"]) == 0
    assert first["metrics"]["eval_top1"] == second["metrics"]["eval_top1"]


def test_ranges_of_int8_are_those_of_the_first_process(runs):
    one, first, second = (run["int8"] for run in runs[:3])
    assert sum(name.endswith(".range") for name in first["state"]) > 10
    assert largest_difference(first["state"], second["state"], first["state"]) == 0
    for key in ("eval_loss", "eval_top1"):
        assert first["metrics"][key] == second["metrics"][key]
    # The first loss is that of one process: the first ranges are those of the same images.
    assert first["logs"][0]["loss_kd"] == pytest.approx(one["logs"][0]["loss_kd"], rel=0.05)
    assert largest_difference(one["state"], first["state"], first["state"]) > 0


def test_evaluation_sees_every_image_once(runs):
    one, first, second = (run["kd"] for run in runs[:3])
    for key in ("eval_loss", "eval_top1", "eval_top5", "eval_agreement", "eval_teacher_top1", "eval_knn"):
        assert first["metrics"][key] == second["metrics"][key] == pytest.approx(one["metrics"][key])


def test_an_evaluation_without_labels_is_that_of_one_process(runs):
    one, first, second = (run["unlabelled"]["metrics"] for run in runs[:3])
    for key in ("eval_loss", "eval_loss_kd", "eval_loss_token_mse", "eval_agreement"):
        assert first[key] == second[key] == pytest.approx(one[key], rel=1e-5)


def test_all_processes_hold_the_same_memories(runs):
    """CRD: every row has moved in both, each of which has seen half of the images of an epoch."""
    _, first, second, _ = (run["memories"] if isinstance(run, dict) else run for run in runs)
    for name, value in first["state"].items():
        torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0, msg=name)
    untrained = CRDLoss(dimension=4)
    untrained.setup_rows(torch.arange(32) % 10)
    for name in ("student_memory", "teacher_memory"):
        assert (first["state"][f"losses.crd.{name}"] != untrained.get_buffer(name)).any(dim=1).all()
    assert first["state"]["losses.crd.log_normalizers"].isfinite().all()


@pytest.mark.parametrize("name", distributed_worker.LEARNT)
def test_learnt_parts_are_the_same_in_both(runs, name):
    """DDP sums their gradients as the student's, and would wait for ever for one that does not come."""
    _, first, second, _ = (run[name] if isinstance(run, dict) else run for run in runs)
    parameters = [key for key in first["state"] if not re.search("running_|num_batches", key)]
    assert any(key.startswith("losses.") for key in parameters) or name == "learnt_simkd"
    for key in parameters:
        torch.testing.assert_close(second["state"][key], first["state"][key], rtol=0, atol=0, msg=key)


def test_the_checkpoint_is_written_once(runs):
    folder = runs[3]
    files = sorted(path.name for path in (folder / "features").glob("checkpoint-8/*"))
    assert files.count("model.safetensors") == files.count("losses.safetensors") == 1
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(files)


def test_a_stream_gives_every_image_once_an_epoch(runs):
    one, first, second, _ = (run["stream"] if isinstance(run, dict) else run for run in runs)
    for epoch in (0, 1):
        assert sorted(one["rows"][epoch]) == list(range(40))
        assert sorted(first["rows"][epoch] + second["rows"][epoch]) == list(range(40))
        assert len(first["rows"][epoch]) == len(second["rows"][epoch])
    assert first["rows"][0] != first["rows"][1]
    for name, value in first["state"].items():
        torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0, msg=name)


def test_a_streamed_evaluation_counts_every_image_once(runs):
    """Nine images for two processes: the tenth is padding."""
    _, first, second, _ = (run["stream"] if isinstance(run, dict) else run for run in runs)
    assert first["metrics"]["eval_top1"] == second["metrics"]["eval_top1"]
    assert (first["metrics"]["eval_top1"] * 9 / 100) == pytest.approx(round(first["metrics"]["eval_top1"] * 9 / 100))


def test_a_resumed_stream_goes_on_with_the_next_batch(runs):
    """Each process sees the rest of the epoch that was cut short, and ends with the same weights."""
    for run, batches in zip(runs[:3], (6, 3, 3), strict=True):
        whole, resumed = run["stream"], run["resumed"]
        assert resumed["rows"][0] == whole["rows"][0][4 * batches :]
        assert resumed["rows"][1] == whole["rows"][1]
        assert [name for name, value in whole["state"].items() if not torch.equal(value, resumed["state"][name])] == []


def test_the_rest_of_a_streamed_epoch_needs_as_many_processes(runs):
    folder = runs[3]
    checkpoint = str(folder / "stream" / "checkpoint-3")
    with pytest.raises(ValueError, match="written by 2 processes in the middle of an epoch, and this run has 1"):
        distributed_worker.stream(str(folder.parent / "data"), 1, "other", resume_from_checkpoint=checkpoint)
