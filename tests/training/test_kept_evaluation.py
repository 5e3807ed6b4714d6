"""The teacher's evaluation is kept from one run to the next, and believed only where it is the same teacher's."""

import datasets
import pytest
import torch
from helpers import Plain, config, images

from hfkd import DistillationTrainer
from hfkd.training import evaluation


@pytest.fixture(autouse=True)
def probing_four_images(monkeypatch):
    monkeypatch.setattr(evaluation, "PROBE_IMAGES", 4)


class Counting(Plain):
    """Counts the evaluation images that it is shown, and may answer as another network with the same weights would."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift, self.seen = shift, 0

    def forward(self, pixel_values):
        self.seen += 0 if self.training else len(pixel_values)
        return super().forward(pixel_values).roll(self.shift, dims=1)


def evaluated(shift=0, seed=0, count=10, **changes):
    """Evaluate a teacher before a training: its top-1, its choices and the number of images that it was shown."""
    torch.manual_seed(seed)
    teacher, settings = Counting(shift), {"losses": {"kd": {}}, "per_device_eval_batch_size": 4} | changes
    data = {"train_dataset": images(8), "eval_dataset": images(count, augment=False)}
    torch.manual_seed(1)
    trainer = DistillationTrainer(Plain(), teacher, config(**settings), **data)
    before = trainer.teacher.model.seen
    return trainer.teacher_top1(), trainer.teacher_memory.current.tolist(), trainer.teacher.model.seen - before


def kept():
    return list(datasets.config.HF_DATASETS_CACHE.glob("hfkd_teachers/*"))


def test_a_second_run_shows_the_teacher_a_few_images():
    top1, choices, seen = evaluated()
    assert seen == 10 and len(kept()) == 1
    assert evaluated() == (top1, choices, 4)


@pytest.mark.parametrize("other", [{"seed": 3}, {"count": 12}, {"channels_last": False}, {"shift": 1}])
def test_another_teacher_data_set_or_arithmetic_is_evaluated(other):
    evaluated()
    top1, choices, seen = evaluated(**other)
    assert seen == other.get("count", 10) + (4 if "shift" in other else 0)  # the first four of the same weights
    assert evaluated(**other, keep_teacher_evaluation=False)[:2] == (top1, choices)


def test_it_may_be_switched_off_and_a_damaged_file_is_written_anew():
    expected = evaluated(keep_teacher_evaluation=False)
    assert not kept() and evaluated() == expected
    (path,) = kept()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert evaluated() == expected
    assert evaluated() == (*expected[:2], 4)


def test_where_nothing_can_be_written_the_teacher_is_asked_again():
    datasets.config.HF_DATASETS_CACHE.write_text("no folder")
    assert evaluated() == evaluated()
