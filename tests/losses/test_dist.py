import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.dist import DISTLoss, dist_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("dist"):
        loss = DISTLoss(settings["beta"], settings["gamma"], settings["tau"])
        new_golden.check_loss(case, loss, settings["zscore"])


@pytest.mark.parametrize(("term", "beta", "gamma"), [("dist_inter", 1.0, 0.0), ("dist_intra", 0.0, 1.0)])
def test_golden_of_one_term(new_golden, term, beta, gamma):
    for case, settings in new_golden.cases(term):
        new_golden.check_loss(case, DISTLoss(beta, gamma, settings["tau"]), settings["zscore"])


def test_correlations_are_those_of_numpy():
    student, teacher = random(4, 6), random(4, 6, seed=1)
    probs = [(logits / 2).softmax(1).numpy() for logits in (student, teacher)]
    images = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(*probs, strict=True)])
    classes = np.mean([1 - np.corrcoef(*columns)[0, 1] for columns in zip(*(p.T for p in probs), strict=True)])
    assert dist_loss(student, teacher, 3.0, 0.5, 2.0).item() == pytest.approx(4 * (3 * images + classes / 2), rel=1e-6)


def test_a_batch_of_one_has_no_correlation_of_classes():
    student, teacher = random(1, 6).requires_grad_(), random(1, 6, seed=1)
    classes = dist_loss(student, teacher, 0.0, 1.0, 1.0)
    classes.backward()
    assert classes == 1 and (student.grad == 0).all()


def test_gradcheck():
    teacher = random(4, 5, seed=1)
    assert gradcheck(lambda logits: dist_loss(logits, teacher, 2.0, 0.5, 2.0), random(4, 5).requires_grad_())
