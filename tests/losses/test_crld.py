from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses import kd_loss
from hfkd.losses.crld import CRLDLoss, crld_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VIEWS = [random(4, 5, seed=seed) for seed in range(4)]


def total(terms):
    return sum(terms.values())


def test_golden(new_golden):
    for case, settings in new_golden.cases("crld"):
        views = [new_golden.tensor(name).clone().requires_grad_() for name in ("student", "student_strong")]
        student = SimpleNamespace(logits=views[0], strong=SimpleNamespace(logits=views[1]))
        strong = SimpleNamespace(logits=new_golden.tensor("teacher_strong"))
        teacher = SimpleNamespace(logits=new_golden.tensor("teacher"), strong=strong)
        loss = CRLDLoss(settings["wv"], settings["cv"], settings["T"], settings["tau_w"], settings["tau_s"])
        loss.logit_standardization = bool(settings["zscore"])
        value = total(loss(student, teacher, {}))
        value.backward()
        new_golden.check(case, value, student=views[0].grad, student_strong=views[1].grad)


def test_without_thresholds_it_is_kd_of_all_pairs_of_views():
    student, teacher, student_strong, teacher_strong = VIEWS
    terms = crld_loss(*VIEWS, 2.0, 0.0, 0.0)
    within = kd_loss(student, teacher, 2.0) + kd_loss(student_strong, teacher_strong, 2.0)
    cross = kd_loss(student_strong, teacher, 2.0) + kd_loss(student, teacher_strong, 2.0)
    torch.testing.assert_close(terms["within_view"], within)
    torch.testing.assert_close(terms["cross_view"], cross)


def test_unsure_images_are_left_out_but_counted_in_the_mean():
    student, teacher, student_strong, teacher_strong = (view.clone() for view in VIEWS)
    teacher[0, 0], teacher_strong[:2, 0] = 50, 50  # the others stay below 0.99
    terms = crld_loss(student, teacher, student_strong, teacher_strong, 2.0, 0.99, 0.99)
    first, two = slice(0, 1), slice(0, 2)
    within = kd_loss(student[first], teacher[first], 2.0) + kd_loss(student_strong[first], teacher_strong[first], 2.0)
    cross = kd_loss(student_strong[two], teacher[two], 2.0) + kd_loss(student[two], teacher_strong[two], 2.0)
    torch.testing.assert_close(terms["within_view"], within / 4)
    torch.testing.assert_close(terms["cross_view"], cross / 2)


def test_gradcheck():
    student, teacher, student_strong, teacher_strong = (view.clone() for view in VIEWS)
    loss = lambda weak, strong: total(crld_loss(weak, teacher, strong, teacher_strong, 2.0, 0.3, 0.2))  # noqa: E731
    assert gradcheck(loss, [student.requires_grad_(), student_strong.requires_grad_()])


def test_clear_errors(make_outputs, make_batch):
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(4, 6\)"):
        crld_loss(random(4, 5), random(4, 5), random(4, 5), random(4, 6), 2.0, 0.3, 0.2)
    for key in ("weak_threshold", "strong_threshold"):
        for value in (-0.1, 1.1, float("nan"), "0.5"):
            with pytest.raises(ValueError, match=f"{key} is {value!r}: give a finite number from 0 to 1"):
                CRLDLoss(**{key: value})
    outputs = make_outputs()
    outputs.strong = None
    with pytest.raises(ValueError, match="crld reads two views"):
        CRLDLoss()(outputs, make_outputs(), make_batch())
