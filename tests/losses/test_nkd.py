import math

import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.nkd import NKDLoss, nkd_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("nkd"):
        new_golden.check_loss(case, NKDLoss(settings["gamma"], settings["T"]), settings["zscore"])


def test_three_classes_by_hand():
    teacher, student = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.6, 0.2]]).log()
    labels = torch.tensor([0])
    target = -0.5 * math.log(0.2)
    others = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25))
    assert nkd_loss(student, teacher, labels, 0.0, 1.0).item() == pytest.approx(target, rel=1e-5)
    assert nkd_loss(student, teacher, labels, 3.0, 1.0).item() == pytest.approx(target + 3 * others, rel=1e-5)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_the_label_is_left_out_at_any_level_of_the_logits(shift):
    student, teacher, labels = random(4, 9), random(4, 9, seed=1), torch.tensor([0, 8, 3, 3])
    expected = nkd_loss(student, teacher, labels, 1.5, 2.0)
    torch.testing.assert_close(nkd_loss(student + shift, teacher + shift, labels, 1.5, 2.0), expected)


def test_gradcheck():
    teacher, labels = random(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    assert gradcheck(lambda logits: nkd_loss(logits, teacher, labels, 1.5, 2.0), random(4, 5).requires_grad_())


def test_a_mixed_image_has_the_label_of_its_largest_share(make_outputs, make_batch):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch()
    expected = NKDLoss()(student, teacher, batch)
    shares = torch.nn.functional.one_hot(batch["labels"], 10) * 0.6 + 0.04
    assert NKDLoss()(student, teacher, {"labels": shares}) == expected


def test_the_teacher_is_read_at_one_temperature_where_both_are_equal():
    assert NKDLoss().teacher_temperature == 1 and NKDLoss(temperature=2.0).teacher_temperature is None


def test_labels_must_be_one_a_row():
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*got \(4, 10\)"):
        nkd_loss(torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(4, 10), 1.5, 1.0)
