import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.nst import NSTLoss, nst_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_feature_golden):
    maps = {
        role: [new_feature_golden.tensor(f"{role}_map_{n}").clone() for n in range(3)]
        for role in ("student", "teacher")
    }
    student = [one.requires_grad_() for one in maps["student"]]
    value = nst_loss(student, maps["teacher"])
    value.backward()
    new_feature_golden.check("nst", value, **{f"student_map_{n}": one.grad for n, one in enumerate(student)})


def test_by_hand():
    """One channel at one of two positions against two channels, one at each."""
    student = torch.tensor([[[[3.0, 0.0]]]])
    teacher = torch.tensor([[[[2.0, 0.0]], [[0.0, 5.0]]]])
    assert nst_loss([student], [teacher]).item() == pytest.approx(1 + 2 / 4 - 2 * 1 / 2)


def test_channels_may_be_scaled_permuted_and_doubled():
    feature_map = random(2, 3, 4, 4)
    same = torch.cat([2 * feature_map.flip(1), -feature_map], dim=1)
    assert nst_loss([same], [feature_map]).abs() < 1e-12
    assert nst_loss([feature_map.flip(2)], [feature_map]) > 1e-3


def test_gradcheck():
    student = [random(2, 3, 4, 4).requires_grad_(), random(2, 3, 2, 2, seed=1).requires_grad_()]
    teacher = [random(2, 5, 2, 2, seed=2), random(2, 4, 4, 4, seed=3)]
    assert gradcheck(lambda *maps: nst_loss(maps, teacher), student)


def test_channels_of_zeros_have_moderate_gradients():
    student, teacher = random(2, 3, 4, 4).float().requires_grad_(), random(2, 3, 4, 4, seed=1).float()
    with torch.no_grad():
        student[:, 0], teacher[:, 1] = 0, 0
    value = nst_loss([student], [teacher])
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 10


def test_half_precision_is_widened():
    student, teacher = random(2, 3, 4, 4).half() * 1e3, random(2, 3, 4, 4, seed=1).half() * 1e3
    value = nst_loss([student], [teacher])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, nst_loss([student.float()], [teacher.float()]))


def test_the_module_takes_its_layers_maps():
    logits, tokens, feature_map = random(2, 5), random(2, 1 + 9, 6), random(2, 3, 8, 8, seed=1)
    student, teacher = Outputs(logits, logits, {"block": tokens}), Outputs(logits, logits, {1: feature_map})
    loss = NSTLoss(["block"], [1])
    loss.setup(student, teacher)
    grid = tokens[:, 1:].transpose(1, 2).reshape(2, 6, 3, 3)
    assert loss(student, teacher, {}) == nst_loss([grid], [feature_map])
    assert loss.weight == 50 and not loss.reads_logits
    assert NSTLoss().student_layers is None and NSTLoss().teacher_layers is None


def test_clear_errors():
    feature_map = random(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"of one batch expected, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        nst_loss([feature_map], [feature_map[:1]])
    with pytest.raises(ValueError, match="zip"):
        nst_loss([feature_map], [feature_map] * 2)
    with pytest.raises(ValueError, match="give lists of equal length"):
        NSTLoss([0, 1], [1])
    with pytest.raises(ValueError, match="weight is -1"):
        NSTLoss(weight=-1.0)
