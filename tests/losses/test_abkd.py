import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses import kd_loss
from hfkd.losses.abkd import ABKDLoss, abkd_loss

EXPONENTS = [(0.8, 0.3), (1.2, -0.4), (-0.3, -0.2), (0, 0.5), (0.5, 0), (0, 0), (0.5, -0.5), (1, 0), (0, 1)]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("abkd"):
        new_golden.check_loss(case, ABKDLoss(settings["alpha"], settings["beta"], settings["T"]), settings["zscore"])


def test_golden_of_the_release_with_z_scores(new_golden):
    """The released code multiplies by T^2 with Z-scores only."""

    class Released(ABKDLoss):
        def forward(self, student, teacher, batch):
            return self.temperature**2 * super().forward(student, teacher, batch)

    for case, settings in new_golden.cases("abkd_ls"):
        new_golden.check_loss(case, Released(settings["alpha"], settings["beta"], settings["T"]), True)


def test_the_formula():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    terms = p**0.8 * q**0.3 - 0.8 / 1.1 * p**1.1 - 0.3 / 1.1 * q**1.1
    torch.testing.assert_close(abkd_loss(student, teacher, 0.8, 0.3, 2.0), -terms.sum(1).mean() / 0.24)


def test_alpha_one_and_beta_zero_is_the_divergence_of_kd():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    torch.testing.assert_close(16 * abkd_loss(student, teacher, 1.0, 0.0, 4.0), kd_loss(student, teacher, 4.0))


@pytest.mark.parametrize(
    ("limit", "near", "factor"),
    [((0, 0.5), (1e-9, 0.5), 0.5), ((0.5, 0), (0.5, 1e-7), 0.5), ((0.5, -0.5), (0.5, 1e-9 - 0.5), 0.5)],
)
def test_the_formula_tends_to_its_limits(limit, near, factor):
    """Up to the factor that the release leaves out."""
    student, teacher = random(3, 5), random(3, 5, seed=1)
    expected = factor * abkd_loss(student, teacher, *near, 2.0)
    torch.testing.assert_close(abkd_loss(student, teacher, *limit, 2.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_gradcheck(alpha, beta):
    """Also where the networks agree, on all classes or on some."""
    teacher = random(3, 5, seed=1)
    for student in (random(3, 5), teacher.clone()):
        logits = student.requires_grad_()
        assert gradcheck(lambda logits: abkd_loss(logits, teacher, alpha, beta, 2.0), logits)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_no_divergence_is_below_zero(alpha, beta):
    for scale in (1e-6, 1.0, 30.0):
        student, teacher = scale * random(4, 10), scale * random(4, 10, seed=1)
        assert abkd_loss(student, teacher, alpha, beta, 1.0) > 0


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e7])
def test_huge_logits_leave_value_and_gradient_finite(alpha, beta, scale):
    student, teacher = (scale * random(4, 1000, seed=seed).float() for seed in (0, 1))
    for own, other in ((student, teacher), (student, -student), (student, student), (0 * student, teacher)):
        logits = own.clone().requires_grad_()
        value = abkd_loss(logits, other, alpha, beta, 1.0)
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all()


def test_what_is_no_finite_number_is_refused():
    for value in (float("nan"), float("inf"), "1", None):
        with pytest.raises(ValueError, match=f"alpha is {value!r}: give a finite number"):
            ABKDLoss(alpha=value)
        with pytest.raises(ValueError, match=f"beta is {value!r}: give a finite number"):
            ABKDLoss(beta=value)
