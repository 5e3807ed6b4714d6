import pytest
import timm
import torch
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.sp import SPLoss, sp_loss
from hfkd.networks.features import Outputs
from hfkd.networks.teacher import Teacher

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(features):
    logits = random(2, 5)
    return Outputs(logits, logits, features)


def test_golden(feature_golden):
    student, teacher = feature_golden.maps("student")[2], feature_golden.maps("teacher")[2]
    feature_golden.check("sp/last_map", sp_loss([student], [teacher]), student_map_2=student)


def test_gradcheck_of_two_pairs():
    student = [random(3, 2, 2, 2).requires_grad_(), random(3, 4, 1, 1, seed=1).requires_grad_()]
    teacher = [random(3, 5, 3, 3, seed=2), random(3, 2, 2, 2, seed=3)]
    assert gradcheck(lambda *maps: sp_loss(maps, teacher), student)
    separately = sp_loss(student[:1], teacher[:1]) + sp_loss(student[1:], teacher[1:])
    torch.testing.assert_close(sp_loss(student, teacher), separately)


def test_by_hand():
    """Two orthogonal images against two equal ones: every row is off by (1 - 1/sqrt 2, 1/sqrt 2)."""
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).reshape(2, 2, 1, 1)
    teacher = torch.ones(2, 5, 2, 2)
    expected = ((1 - 0.5**0.5) ** 2 + 0.5) / 2
    assert sp_loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-6)


def test_maps_of_zeros_have_moderate_gradients():
    student, teacher = random(4, 3, 2, 2).float().requires_grad_(), random(4, 3, 2, 2, seed=1).float()
    with torch.no_grad():
        student[0] = 0
        teacher[1] = 0
    value = sp_loss([student], [teacher])
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    assert 0 < gradient[0].abs().max() < 10 and (gradient[2] != 0).any()
    (gradient,) = torch.autograd.grad(sp_loss([student * 0], [teacher]), student)
    assert (gradient == 0).all()


def test_half_precision_is_widened():
    student, teacher = random(4, 3, 4, 4).half() * 1e3, random(4, 3, 2, 2, seed=1).half() * 1e3  # products overflow
    value = sp_loss([student], [teacher])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sp_loss([student.float()], [teacher.float()]))


def test_the_module_takes_the_deepest_maps():
    loss = SPLoss()
    assert loss.student_layers == loss.teacher_layers == [-1]
    assert loss.weight == 3000 and not loss.reads_logits
    student, teacher = outputs({-1: random(2, 1 + 9, 6)}), outputs({-1: random(2, 3, 8, 8, seed=2)})
    loss.setup(student, teacher)
    torch.testing.assert_close(
        loss(student, teacher, {}), sp_loss([student.features[-1][:, 1:]], [teacher.features[-1]])
    )
    assert SPLoss(["block"], [2]).student_layers == ["block"]


def test_clear_errors():
    feature_map = random(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"of one batch expected, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        sp_loss([feature_map], [feature_map[:1]])
    with pytest.raises(ValueError, match="zip"):
        sp_loss([feature_map], [feature_map] * 2)
    with pytest.raises(ValueError, match="lists of equal length"):
        SPLoss([0, 1])
    with pytest.raises(ValueError, match=r"student_layers is \[\]: give a list"):
        SPLoss([])
    with pytest.raises(ValueError, match="weight is -1"):
        SPLoss(weight=-1.0)
    with pytest.raises(ValueError, match="expected a map"):
        SPLoss().setup(outputs({-1: random(2, 6)}), outputs({-1: feature_map}))


def test_a_convolutional_student_learns_from_a_transformer(tmp_path):
    torch.manual_seed(0)
    teacher = Teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY))
    trainer = DistillationTrainer(
        load_student("cifar_resnet8", num_classes=10),
        teacher,
        config(tmp_path, ce_weight=0.0, num_train_epochs=6, optim="adamw_torch", optim_args=None, learning_rate=1e-3),
        train_dataset=images(8, augment=False),  # one batch, so that the terms can be compared
        losses={"sp": SPLoss()},
    )
    trainer.train()
    terms = [entry["loss_sp"] for entry in train_logs(trainer)]
    assert terms[-1] < 0.9 * terms[0]
