import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hfkd.losses.wsld import WSLDLoss, wsld_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 4, 2, 2])


def weights(student, teacher):
    ratio = F.cross_entropy(student, LABELS, reduction="none") / F.cross_entropy(teacher, LABELS, reduction="none")
    return 1 - (-ratio).exp()


def test_golden(new_golden):
    for case, settings in new_golden.cases("wsld"):
        new_golden.check_loss(case, WSLDLoss(settings["T"], settings["alpha"]), settings["zscore"])


def test_each_image_is_weighed_by_its_cross_entropies():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    entropies = -((teacher / 3).softmax(1) * (student / 3).log_softmax(1)).sum(1)
    expected = 2.5 * 9 * (weights(student, teacher) * entropies).mean()
    torch.testing.assert_close(wsld_loss(student, teacher, LABELS, 3.0, 2.5), expected, rtol=1e-6, atol=0)


def test_the_gradient_is_that_of_kd_with_weights_held():
    student, teacher = random(4, 5).requires_grad_(), random(4, 5, seed=1)
    (gradient,) = torch.autograd.grad(wsld_loss(student, teacher, LABELS, 3.0, 1.0), student)
    difference = (student / 3).softmax(1) - (teacher / 3).softmax(1)
    expected = 3 / 4 * weights(student, teacher)[:, None] * difference
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)


def test_gradcheck_where_the_weights_do_not_change():
    """A teacher that is right beyond doubt leaves every weight at 1."""
    teacher = 100 * F.one_hot(LABELS, 5).double()
    assert gradcheck(lambda logits: wsld_loss(logits, teacher, LABELS, 3.0, 1.0), random(4, 5).requires_grad_())


def test_labels_may_be_shares():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    hard = wsld_loss(student, teacher, LABELS, 4.0, 1.0)
    torch.testing.assert_close(wsld_loss(student, teacher, F.one_hot(LABELS, 5).float(), 4.0, 1.0), hard)
    mixed = wsld_loss(student, teacher, torch.full((4, 5), 0.2), 4.0, 1.0)
    assert mixed > 0 and mixed != hard


def test_the_teacher_is_read_at_one_temperature_where_both_are_equal():
    assert WSLDLoss(temperature=1.0).teacher_temperature == 1 and WSLDLoss().teacher_temperature is None


def test_labels_must_fit_the_logits():
    with pytest.raises(ValueError, match=r"\(4,\), class indices, or \(4, 5\), shares .*got \(3,\)"):
        wsld_loss(random(4, 5), random(4, 5), LABELS[:3], 4.0, 1.0)
