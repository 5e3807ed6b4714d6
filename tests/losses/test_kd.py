import math
from types import SimpleNamespace

import pytest
import torch

from hfkd.losses import KDLoss, kd_loss, standardize


def test_golden(golden):
    for case, settings in golden.cases("kd"):
        student, teacher = golden.inputs()
        loss = KDLoss(temperature=settings["T"])
        loss.logit_standardization = bool(settings["zscore"])
        value = loss(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher, standardized=False), {})
        value.backward()
        golden.check(case, value, student=student.grad)


def test_two_classes_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2) at T = 2
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kd_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_temperature_as_number_tensor_or_one_a_sample():
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64)
    expected = kd_loss(student, teacher, 3.0)
    for temperature in (torch.tensor(3.0), torch.full((1,), 3.0), torch.full((4,), 3.0)):
        torch.testing.assert_close(kd_loss(student, teacher, temperature), expected)
    temperatures = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    rows = [kd_loss(student[i : i + 1], teacher[i : i + 1], temperatures[i].item()) for i in range(4)]
    torch.testing.assert_close(kd_loss(student, teacher, temperatures), torch.stack(rows).mean())


def test_gradcheck_of_logits_and_temperature():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    temperature = torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (student.clone(), teacher.clone(), temperature)]
    assert torch.autograd.gradcheck(kd_loss, leaves)


@pytest.mark.parametrize("logit_standardization", [False, True])
def test_module_equals_function(make_outputs, logit_standardization):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    loss = KDLoss(temperature=2.5, weight=9.0)
    loss.logit_standardization = logit_standardization
    prepare = standardize if logit_standardization else torch.clone
    expected = kd_loss(prepare(student.logits), prepare(teacher.logits), 2.5)
    torch.testing.assert_close(loss(student, teacher, {}), expected)
    assert loss.weight == 9.0
