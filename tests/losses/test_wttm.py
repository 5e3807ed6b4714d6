import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.ttm import ttm_loss
from hfkd.losses.wttm import WTTMLoss, wttm_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("wttm"):
        new_golden.check_loss(case, WTTMLoss(settings["l"]), settings["zscore"])


def test_each_image_is_weighed_by_the_sum_of_its_powers():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    weights = (teacher.softmax(1) ** 0.3).sum(1)
    rows = torch.stack([ttm_loss(student[[i]], teacher[[i]], 0.3) for i in range(3)])
    torch.testing.assert_close(wttm_loss(student, teacher, 0.3), (weights * rows).mean())


def test_an_unsure_teacher_weighs_more():
    student = random(1, 8)
    sure, unsure = torch.zeros(1, 8).double(), torch.zeros(1, 8).double()
    sure[0, 2], unsure[0, 2] = 1000, 1e-9
    assert wttm_loss(student, sure, 0.5) == pytest.approx(ttm_loss(student, sure, 0.5).item())
    assert wttm_loss(student, unsure, 0.5) == pytest.approx(8**0.5 * ttm_loss(student, unsure, 0.5).item())


def test_gradcheck():
    assert gradcheck(lambda logits: wttm_loss(logits, random(3, 5, seed=1), 0.3), random(3, 5).requires_grad_())


def test_the_teacher_is_read_at_several_temperatures():
    assert WTTMLoss(0.5).teacher_temperature is None
