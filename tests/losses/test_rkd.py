import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.rkd import RKDLoss, rkd_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_feature_golden):
    for case, settings in new_feature_golden.cases("rkd"):
        student = new_feature_golden.tensor("student_pooled").clone().requires_grad_()
        teacher = new_feature_golden.tensor("teacher_pooled")
        value = rkd_loss(student, teacher, settings["distance"], settings["angle"], bool(settings["squared"]))
        value.backward()
        new_feature_golden.check(case, value, student_pooled=student.grad)


def test_distances_by_hand():
    """Distances 1, 1, 2 on a line, of mean 4/3, against three equal ones."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    teacher = torch.eye(3)
    gaps = [(3 / 4 - 1) ** 2 / 2, (3 / 4 - 1) ** 2 / 2, (3 / 2 - 1) ** 2 / 2]
    assert rkd_loss(student, teacher, 1.0, 0.0).item() == pytest.approx(2 * sum(gaps) / 9)


def test_angles_by_hand():
    """A right angle and two of 45 degrees against three of 60 degrees; each is met twice."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    gaps = [0.5**2 / 2, (0.5**0.5 - 0.5) ** 2 / 2, (0.5**0.5 - 0.5) ** 2 / 2]
    assert rkd_loss(student, torch.eye(3), 0.0, 1.0).item() == pytest.approx(2 * sum(gaps) / 27)


def test_turning_shifting_and_scaling_change_nothing():
    embedding = random(5, 4)
    turned = 3 * embedding @ torch.linalg.qr(random(4, 4, seed=1))[0] + 7
    assert rkd_loss(turned, embedding, 25.0, 50.0) < 1e-20


@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(squared):
    teacher = random(4, 5, seed=1)
    assert gradcheck(lambda student: rkd_loss(student, teacher, 25.0, 50.0, squared), random(4, 3).requires_grad_())


@pytest.mark.parametrize("images", [1, 2, 4])
def test_equal_embeddings_have_moderate_gradients(images):
    for student in (torch.zeros(images, 6), torch.ones(images, 6), random(images, 6).float()):
        student = student.requires_grad_()
        teacher = random(images, 8, seed=1).float()
        with torch.no_grad():
            student[-1] = student[0]
        value = rkd_loss(student, teacher, 25.0, 50.0)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 1e3


def test_half_precision_is_widened():
    student, teacher = random(4, 6).half() * 1e3, random(4, 8, seed=1).half() * 1e3
    value = rkd_loss(student, teacher, 25.0, 50.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, rkd_loss(student.float(), teacher.float(), 25.0, 50.0))


def test_the_module_takes_the_embeddings():
    logits, embeddings = random(4, 5), (random(4, 6), random(4, 8, seed=1))
    student, teacher = (Outputs(logits, logits, {"embedding": embedding}) for embedding in embeddings)
    loss = RKDLoss(distance=2.0, angle=3.0, squared=True)
    assert loss(student, teacher, {}) == rkd_loss(*embeddings, 2.0, 3.0, True)
    assert loss.weight == 1 and not loss.reads_logits and loss.student_layers == loss.teacher_layers == ["embedding"]


def test_clear_errors():
    with pytest.raises(ValueError, match=r"of one batch expected, got \(4, 6\) and \(1, 6\)"):
        rkd_loss(random(4, 6), random(1, 6), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"embeddings \(B, D\) .*got \(4, 6, 1\)"):
        rkd_loss(random(4, 6, 1), random(4, 6), 1.0, 1.0)
    with pytest.raises(ValueError, match="distance is -1"):
        RKDLoss(distance=-1.0)
