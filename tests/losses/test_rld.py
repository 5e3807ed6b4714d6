import math

import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses import kd_loss
from hfkd.losses.rld import RLDLoss, rld_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("rld"):
        loss = RLDLoss(settings["alpha"], settings["beta"], settings["T"], settings["aT"])
        new_golden.check_loss(case, loss, settings["zscore"])


def test_four_classes_by_hand():
    """The teacher ranks the label second, before two others."""
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double().log()
    student = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).double().log()
    labels = torch.tensor([1])
    confidence = 0.4 * math.log(0.4 / 0.4) + 0.6 * math.log(0.6 / 0.6)
    ranking = 2 / 3 * math.log(2 / 3 / 0.4) + 1 / 3 * math.log(1 / 3 / 0.6)
    assert rld_loss(student, teacher, labels, 1.0, 0.0, 1.0, 1.0).item() == pytest.approx(confidence, abs=1e-12)
    assert rld_loss(student, teacher, labels, 1.0, 2.0, 1.0, 1.0).item() == pytest.approx(2 * ranking)


def test_a_label_that_the_teacher_ranks_first_gives_kd_of_the_two_parts():
    student, teacher = random(1, 6), random(1, 6, seed=1)
    labels = teacher.argmax(1)
    others = [index for index in range(6) if index != labels]
    expected = kd_loss(student[:, others], teacher[:, others], 3.0)
    torch.testing.assert_close(rld_loss(student, teacher, labels, 0.0, 1.0, 3.0, 1.0), expected)


def test_a_label_that_the_teacher_ranks_last_has_no_ranking():
    student, teacher = random(1, 6).requires_grad_(), random(1, 6, seed=1)
    value = rld_loss(student, teacher, teacher.argmin(1), 0.0, 1.0, 3.0, 1.0)
    value.backward()
    assert value == 0 and (student.grad == 0).all()


def test_gradcheck():
    teacher, labels = random(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    loss = lambda logits: rld_loss(logits, teacher, labels, 1.0, 8.0, 4.0, 2.0)  # noqa: E731
    assert gradcheck(loss, random(4, 5).requires_grad_())


@pytest.mark.parametrize(
    ("warmup_epochs", "progress", "factor"),
    [(20, 0.0, 0.05), (20, 18.5, 0.95), (20, 25.0, 1), (0, 0.0, 1), (1, 0.0, 1)],
)
def test_warmup_counts_epochs_from_one(make_outputs, make_batch, warmup_epochs, progress, factor):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(progress)
    expected = rld_loss(student.logits, teacher.logits, batch["labels"], 1.0, 8.0, 4.0, 1.0)
    torch.testing.assert_close(RLDLoss(warmup_epochs=warmup_epochs)(student, teacher, batch), factor * expected)


def test_labels_must_be_one_a_row():
    assert not RLDLoss.takes_mixed_labels
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*got \(4, 10\)"):
        rld_loss(torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(4, 10), 1.0, 8.0, 4.0, 1.0)
