import pytest
import timm
import torch
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.at import ATLoss, at_loss
from hfkd.networks.features import Outputs
from hfkd.networks.wrapping import wrap_timm

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(**features):
    logits = random(2, 5)
    return Outputs(logits, logits, features)


def test_golden(feature_golden):
    student, teacher = feature_golden.maps("student"), feature_golden.maps("teacher")
    for pair in range(3):
        value = at_loss([student[pair]], [teacher[pair]]).item()
        assert value == pytest.approx(feature_golden.values[f"at/pair_{pair}"], rel=1e-9, abs=0)
    gradients = {f"student_map_{number}": feature_map for number, feature_map in enumerate(student)}
    feature_golden.check("at/sum_over_pairs", at_loss(student, teacher), **gradients)


def test_gradcheck():
    """The student's map larger in one pair, the teacher's in the other."""
    student = [random(2, 3, 4, 4).requires_grad_(), random(2, 3, 2, 2, seed=1).requires_grad_()]
    teacher = [random(2, 5, 2, 2, seed=2), random(2, 4, 4, 4, seed=3)]
    assert gradcheck(lambda *maps: at_loss(maps, teacher), student)


def test_only_where_the_energy_is_counts():
    feature_map = random(2, 3, 4, 4)
    assert at_loss([feature_map], [feature_map]) == 0
    torch.testing.assert_close(at_loss([feature_map], [-3 * feature_map.flip(1)]), torch.zeros(()).double())
    assert at_loss([feature_map], [feature_map.flip(2)]) > 1e-3


def test_maps_of_zeros_have_finite_gradients():
    student, teacher = random(4, 3, 4, 4).float().requires_grad_(), random(4, 3, 4, 4, seed=1).float()
    with torch.no_grad():
        student[:2] = 0
        teacher[1:3] = 0
    value = at_loss([student], [teacher])
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    assert (gradient[:2] == 0).all() and (gradient[3] != 0).any()


def test_half_precision_is_widened():
    student, teacher = random(2, 3, 4, 4).half() * 1e3, random(2, 3, 4, 4, seed=1).half() * 1e3  # squares overflow
    value = at_loss([student], [teacher])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, at_loss([student.float()], [teacher.float()]))


def test_the_module_takes_its_layers_maps():
    loss = ATLoss(["block", "last"], ["early", "late"])
    student = outputs(block=random(2, 1 + 9, 6), last=random(2, 5, 2, 2, seed=1))
    teacher = outputs(early=random(2, 3, 8, 8, seed=2), late=random(2, 7, 4, 4, seed=3))
    loss.setup(student, teacher)
    grid = student.features["block"][:, 1:].transpose(1, 2).reshape(2, 6, 3, 3)
    pairs = [grid, student.features["last"]], [teacher.features["early"], teacher.features["late"]]
    assert loss(student, teacher, {}) == at_loss(*pairs)
    assert loss.weight == 1000 and not loss.reads_logits
    assert ATLoss().student_layers is None and ATLoss().teacher_layers is None


def test_clear_errors():
    feature_map = random(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"of one batch expected, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        at_loss([feature_map], [feature_map[:1]])
    with pytest.raises(ValueError, match=r"maps \(B, C, H, W\) .*got \(2, 48\)"):
        at_loss([feature_map.flatten(1)], [feature_map])
    with pytest.raises(ValueError, match="zip"):
        at_loss([feature_map], [feature_map] * 2)
    with pytest.raises(ValueError, match="lists of equal length"):
        ATLoss([0, 1], [1])
    with pytest.raises(ValueError, match="weight is -1"):
        ATLoss(weight=-1.0)
    student = timm.create_model("cifar_vgg8", num_classes=10)  # has a stage more
    with pytest.raises(ValueError, match="losses.at: .*lists of equal length"):
        teacher = load_student("cifar_resnet8", num_classes=10)
        DistillationTrainer(student, teacher, config(), train_dataset=images(), losses={"at": ATLoss()})


def test_a_transformer_learns_from_a_convolutional_teacher(tmp_path):
    torch.manual_seed(0)
    student = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), list("0123456789"), TINY)
    teacher = load_student("cifar_resnet8", num_classes=10)
    trainer = DistillationTrainer(
        student,
        teacher,
        config(tmp_path, ce_weight=0.0, num_train_epochs=6, optim="adamw_torch", optim_args=None, learning_rate=1e-3),
        train_dataset=images(8, augment=False),  # one batch, so that the terms can be compared
        losses={"at": ATLoss([0, 1], [2, 3])},
    )
    trainer.train()
    terms = [entry["loss_at"] for entry in train_logs(trainer)]
    assert terms[-1] < 0.9 * terms[0]
