import math
from types import SimpleNamespace

import pytest
import torch

from hfkd.losses import DKDLoss, dkd_loss, kd_loss, standardize


def test_golden(golden):
    labels = golden.tensor("labels")
    for case, settings in golden.cases("dkd"):
        student, teacher = golden.inputs()
        loss = DKDLoss(settings["alpha"], settings["beta"], settings["T"], warmup_epochs=0)
        loss.logit_standardization = bool(settings["zscore"])
        batch = {"labels": labels, "progress": torch.tensor(0.0)}
        value = loss(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher, standardized=False), batch)
        value.backward()
        golden.check(case, value, student=student.grad)


def test_three_classes_by_hand():
    teacher, student = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.4, 0.4]]).log()
    labels = torch.tensor([0])
    tckd = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    nckd = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert dkd_loss(student, teacher, labels, 1.0, 0.0, 1.0).item() == pytest.approx(tckd, rel=1e-5)
    assert dkd_loss(student, teacher, labels, 0.0, 1.0, 1.0).item() == pytest.approx(nckd, rel=1e-5)


def test_beta_equal_to_the_teachers_doubt_gives_kd():
    student, teacher = torch.randn(2, 1, 9, dtype=torch.float64)
    labels = torch.tensor([4])
    doubt = 1 - (teacher / 3).softmax(1)[0, 4].item()
    torch.testing.assert_close(dkd_loss(student, teacher, labels, 1.0, doubt, 3.0), kd_loss(student, teacher, 3.0))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_the_label_is_left_out_whatever_the_level_of_the_logits(shift):
    """A mask at a fixed level, such as -1000, would count as a class beside logits that lie below it."""
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    labels = torch.tensor([0, 8, 3, 3])
    expected = dkd_loss(student, teacher, labels, 1.0, 8.0, 4.0)
    torch.testing.assert_close(dkd_loss(student + shift, teacher + shift, labels, 1.0, 8.0, 4.0), expected)


def test_gradcheck():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(
        lambda logits: dkd_loss(logits, teacher, labels, 1.0, 8.0, 4.0), student.clone().requires_grad_()
    )


@pytest.mark.parametrize("logit_standardization", [False, True])
def test_module_equals_function(make_outputs, make_batch, logit_standardization):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(progress=30.0)
    loss = DKDLoss(alpha=0.5, beta=6.0, temperature=3.0, weight=2.0)
    loss.logit_standardization = logit_standardization
    prepare = standardize if logit_standardization else torch.clone
    expected = dkd_loss(prepare(student.logits), prepare(teacher.logits), batch["labels"], 0.5, 6.0, 3.0)
    torch.testing.assert_close(loss(student, teacher, batch), expected)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 0.05), (0.99, 0.05), (1.0, 0.1), (18.5, 0.95), (19.5, 1), (20.0, 1), (25.0, 1)],
)
def test_warmup_counts_epochs_from_one(make_outputs, make_batch, progress, factor):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    full = DKDLoss(warmup_epochs=0)(student, teacher, make_batch(progress))
    warm = DKDLoss(warmup_epochs=20)(student, teacher, make_batch(progress))
    torch.testing.assert_close(warm, factor * full)


def test_without_warmup_the_first_step_is_whole(make_outputs, make_batch):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(0.0)
    expected = dkd_loss(student.logits, teacher.logits, batch["labels"], 1.0, 8.0, 4.0)
    torch.testing.assert_close(DKDLoss(warmup_epochs=0)(student, teacher, batch), expected)
    torch.testing.assert_close(DKDLoss(warmup_epochs=1)(student, teacher, batch), expected)


def test_labels_must_be_one_a_row():
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*got \(4, 10\)"):
        dkd_loss(torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(4, 10), 1.0, 8.0, 4.0)
