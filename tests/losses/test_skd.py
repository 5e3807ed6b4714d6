import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses import standardize
from hfkd.losses.skd import SKDLoss, skd_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("term", ["instance", "direction"])
def test_golden(new_golden, term):
    for case, settings in new_golden.cases(f"skd_{term}"):
        student, teacher = new_golden.inputs()
        logits = (standardize(student), standardize(teacher)) if settings["zscore"] else (student, teacher)
        value = skd_loss(*logits, settings.get("T", 4.0), settings.get("lambda", 0.1))[term]
        value.backward()
        new_golden.check(case, value, student=student.grad)


def test_two_images_by_hand():
    """The student sees both alike, the teacher at a right angle."""
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # Rows (0, 1) and (1, 0), so the covariance is 0.5 and -0.5; damped by 0.5 it is (1, -0.5), its inverse (4, 2) / 3.
    expected = (4 / 3) ** 0.5
    assert skd_loss(student, teacher, 4.0, 0.5)["direction"].item() == pytest.approx(expected, rel=1e-6)


def test_directions_do_not_see_the_scale_of_a_row():
    student, teacher = random(5, 6), random(5, 6, seed=1)
    expected = skd_loss(student, teacher, 4.0, 0.1)["direction"]
    for scale in (1e-200, 7.0, 1e200):
        torch.testing.assert_close(skd_loss(scale * student, teacher, 4.0, 0.1)["direction"], expected)


def test_gradcheck():
    teacher = random(4, 5, seed=1)
    assert gradcheck(lambda logits: tuple(skd_loss(logits, teacher, 2.0, 0.1).values()), random(4, 5).requires_grad_())


def test_the_factors_of_the_terms(make_outputs, make_batch):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    both = SKDLoss()(student, teacher, make_batch())
    scaled = SKDLoss(instance=3.0, direction=0.5)(student, teacher, make_batch())
    assert scaled["instance"] == 3 * both["instance"] and scaled["direction"] == 0.5 * both["direction"]


def test_one_image_has_no_direction():
    student = random(1, 5).requires_grad_()
    value = skd_loss(student, random(1, 5, seed=1), 4.0, 0.1)["direction"]
    value.backward()
    assert value < 1e-12 and student.grad.abs().max() < 1e-12
