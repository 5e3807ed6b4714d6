import torch
from torch.autograd import gradcheck

from hfkd.losses.hard import HardLoss, hard_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("deit_hard"):
        new_golden.check_loss(case, HardLoss(), settings["zscore"])


def test_only_the_first_choice_of_the_teacher_counts():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    expected = -student.log_softmax(1)[torch.arange(4), teacher.argmax(1)].mean()
    torch.testing.assert_close(hard_loss(student, teacher), expected)
    assert hard_loss(student, teacher) == hard_loss(student, 9 * teacher + 5)


def test_gradcheck():
    assert gradcheck(lambda logits: hard_loss(logits, random(4, 5, seed=1)), random(4, 5).requires_grad_())


def test_the_weight_is_kept():
    assert HardLoss(weight=0.5).weight == 0.5
