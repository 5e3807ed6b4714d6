from types import SimpleNamespace

import pytest
import torch

from hfkd.losses import MLKDLoss, kd_loss, mlkd_loss, standardize

TERMS = {"loss_kd": "kd", "loss_cc": "class_correlation", "loss_bc": "batch_correlation"}


def logits_of(*seeds, batch_size=6, classes=10):
    shape = (batch_size, classes)
    return [3 * torch.randn(*shape, generator=torch.manual_seed(seed), dtype=torch.float64) for seed in seeds]


def test_golden(golden):
    """The weight multiplies all three terms; the cross-entropy, on both views, completes the total."""
    labels = golden.tensor("labels")
    for case, settings in golden.cases("mlkd"):
        weak, teacher = golden.inputs()
        strong = golden.tensor("student_strong").clone().requires_grad_()
        loss = MLKDLoss(settings["T"], weight=settings["kd"])
        loss.logit_standardization = bool(settings["zscore"])
        terms = loss(
            SimpleNamespace(logits=weak, strong=SimpleNamespace(logits=strong)),
            SimpleNamespace(logits=teacher, strong=SimpleNamespace(logits=golden.tensor("teacher_strong"))),
            {},
        )
        cross_entropy = torch.nn.functional.cross_entropy
        ce = settings["ce"] * (cross_entropy(weak, labels) + cross_entropy(strong, labels))
        wanted = case.rsplit("/", 1)[1]
        if wanted == "total":
            value = ce + loss.weight * sum(terms.values())
        elif wanted == "loss_ce":
            value = ce
        else:
            value = loss.weight * terms[TERMS[wanted]]
        value.backward()
        gradients = {"student": weak.grad}
        if wanted in ("loss_cc", "loss_bc"):
            assert strong.grad is None, "the correlations read the weak view only"
        else:
            gradients["student_strong"] = strong.grad
        golden.check(case, value, **gradients)


def test_the_divergences_of_the_strong_view_at_2_and_6_read_the_weak_one():
    weak, teacher, strong, teacher_strong = logits_of(1, 2, 3, 4)
    expected = 0.5 * sum(kd_loss(weak, teacher, t) for t in (4.0, 3.0, 5.0, 2.0, 6.0))
    expected += sum(kd_loss(strong, teacher_strong, t) for t in (4.0, 3.0, 5.0))
    expected += sum(kd_loss(weak, teacher, t) for t in (2.0, 6.0))
    terms = mlkd_loss(weak, teacher, strong, teacher_strong, 4.0)
    torch.testing.assert_close(terms["kd"], expected)


@pytest.mark.parametrize(("batch_size", "classes"), [(6, 10), (12, 4)])
def test_correlations_are_distances_between_products_of_probabilities(batch_size, classes):
    weak, teacher, strong, teacher_strong = logits_of(1, 2, 3, 4, batch_size=batch_size, classes=classes)
    by_class = by_sample = 0
    for temperature in (4.0, 3.0, 5.0, 2.0, 6.0):
        s, t = (weak / temperature).softmax(1), (teacher / temperature).softmax(1)
        by_class += (t.T @ t - s.T @ s).square().sum() / classes
        by_sample += (t @ t.T - s @ s.T).square().sum() / batch_size
    for standardized in (False, True):
        terms = mlkd_loss(weak, teacher, strong, teacher_strong, 4.0, standardized)
        torch.testing.assert_close(terms["class_correlation"], by_class / 2)
        torch.testing.assert_close(terms["batch_correlation"], by_sample / 2)


def test_standardization_reaches_the_divergences_only():
    weak, teacher, strong, teacher_strong = logits = logits_of(1, 2, 3, 4)
    plain = mlkd_loss(*logits, 2.0)
    switched = mlkd_loss(*logits, 2.0, logit_standardization=True)
    standardized = mlkd_loss(*map(standardize, logits), 2.0)
    torch.testing.assert_close(switched["kd"], standardized["kd"])
    assert not torch.isclose(switched["kd"], plain["kd"])
    for term in ("class_correlation", "batch_correlation"):
        torch.testing.assert_close(switched[term], plain[term])


def test_a_sharp_teacher_masks_no_sample():
    """Confidences that tie at 1 all lie at the median: the shares are 1 of the samples, half the classes."""
    weak, _, strong, _ = logits_of(1, 2, 3, 4, batch_size=5)
    teacher = 1000 * torch.eye(10, dtype=torch.float64)[[0, 1, 2, 3, 3]]
    terms = mlkd_loss(weak, teacher, strong, strong, 4.0)
    expected = sum(kd_loss(weak, teacher, t) for t in (4.0, 3.0, 5.0, 2.0, 6.0))
    expected += sum(kd_loss(weak, teacher, t) for t in (2.0, 6.0))
    torch.testing.assert_close(terms["kd"], expected)
    s, t = [(logits / torch.tensor([4.0, 3, 5, 2, 6]).reshape(-1, 1, 1)).softmax(2) for logits in (weak, teacher)]
    by_sample = (t @ t.mT - s @ s.mT).square().sum() / 5
    by_class = (t.mT @ t - s.mT @ s).square().sum() / 10
    torch.testing.assert_close(terms["batch_correlation"], by_sample)
    # Six of the ten classes have no probability at all, which is the median.
    torch.testing.assert_close(terms["class_correlation"], 0.6 * by_class)


def test_gradcheck():
    weak, teacher, strong, teacher_strong = logits_of(1, 2, 3, 4, batch_size=3, classes=4)
    leaves = [weak.requires_grad_(), strong.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda weak, strong: tuple(mlkd_loss(weak, teacher, strong, teacher_strong, 4.0, True).values()),
        leaves,
    )


@pytest.mark.parametrize("logit_standardization", [False, True])
def test_module_equals_function(make_outputs, logit_standardization):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    loss = MLKDLoss(temperature=2.0, weight=3.0)
    loss.logit_standardization = logit_standardization
    expected = mlkd_loss(
        student.logits,
        teacher.logits,
        student.strong.logits,
        teacher.strong.logits,
        2.0,
        logit_standardization,
    )
    torch.testing.assert_close(loss(student, teacher, {}), expected)
    assert loss.views == 2


def test_asks_for_the_strong_view(make_outputs):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    teacher.strong = None
    with pytest.raises(ValueError, match="strong view"):
        MLKDLoss()(student, teacher, {})
