import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch import nn
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.fitnet import FitNetLoss, fitnet_loss, regressor
from hfkd.networks.features import Outputs
from hfkd.networks.wrapping import wrap_timm

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(*maps):
    logits = random(2, 5)
    return Outputs(logits, logits, dict(enumerate(maps)))


def ready(student, teacher, **settings):
    """A float64 loss over all the maps given."""
    layers = list(range(len(student.features)))
    loss = FitNetLoss(layers, layers, **settings).double()
    loss.setup(student, teacher)
    return loss.double()


def kernels(regress):
    return [parameter for parameter in regress.parameters() if parameter.ndim == 4]


@pytest.mark.parametrize("number, kind", [(1, nn.ConvTranspose2d), (2, nn.Conv2d)])
def test_golden(feature_golden, number, kind):
    """Sides doubled, and equal sides."""
    own, other = feature_golden.maps("student")[number], feature_golden.maps("teacher")[number]
    student, teacher = outputs(own), outputs(other)
    loss = ready(student, teacher)
    assert type(loss.regressors[0].conv) is kind
    loss.regressors[0].load_state_dict(feature_golden.weights(f"fitnet/map_{number}"))
    feature_golden.check(f"fitnet/map_{number}", loss(student, teacher, {}), **{f"student_map_{number}": own})


def test_the_sum_over_pairs(feature_golden):
    student, teacher = (outputs(*feature_golden.maps(role)[1:]) for role in ("student", "teacher"))
    loss = ready(student, teacher)
    for number in (0, 1):
        loss.regressors[number].load_state_dict(feature_golden.weights(f"fitnet/map_{number + 1}"))
    expected = sum(feature_golden.values[f"fitnet/map_{number}"] for number in (1, 2))
    assert loss(student, teacher, {}).item() == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    "own, other, kernel, result",
    [
        ((8, 8), (4, 4), (3, 3), (4, 4)),
        ((4, 6), (8, 12), (4, 4), (8, 12)),
        ((5, 5), (5, 5), (1, 1), (5, 5)),
        ((4, 4), (14, 14), (3, 3), (4, 4)),  # the teacher's is averaged down to the student's
        ((56, 56), (14, 14), (3, 3), (14, 14)),  # the student's first to the teacher's
        ((8, 4), (4, 8), (3, 3), (4, 4)),  # each on one axis
    ],
)
def test_the_regressor_fits_any_two_sizes(own, other, kernel, result):
    torch.manual_seed(0)
    student, teacher = random(2, 3, *own), random(2, 4, *other, seed=1)
    regress = regressor(student, teacher).double()
    assert [tuple(weight.shape[2:]) for weight in kernels(regress)] == [kernel]
    regressed = regress(student)
    assert regressed.shape == (2, 4, *result)
    expected = (regressed - F.adaptive_avg_pool2d(teacher, result)).pow(2).mean()
    torch.testing.assert_close(fitnet_loss([regressed], [teacher]), expected)


def test_gradcheck():
    regressed = [random(2, 3, 4, 4).requires_grad_(), random(2, 2, 2, 2, seed=1).requires_grad_()]
    teacher = [random(2, 3, 4, 4, seed=2), random(2, 2, 4, 4, seed=3)]
    assert gradcheck(lambda *maps: fitnet_loss(maps, teacher), regressed)


def test_every_learnable_part_moves():
    """But for the convolutions' biases, which BatchNorm takes out again: weight decay alone acts on them."""
    torch.manual_seed(0)
    student, teacher = outputs(random(4, 3, 8, 8)), outputs(random(4, 4, 4, 4, seed=1))
    loss = ready(student, teacher)
    loss(student, teacher, {}).backward()
    moved = {name: parameter.grad.abs().max() > 1e-6 for name, parameter in loss.named_parameters()}
    bias = "regressors.0.conv.bias"
    assert moved == {name: name != bias for name in moved}
    assert loss.regressors[0].conv.bias.grad is not None  # DDP waits for it


def test_projectors_run_in_the_precision_of_the_run_and_the_loss_in_float32():
    student, teacher = outputs(random(4, 3, 8, 8).float()), outputs(random(4, 4, 4, 4, seed=1).float())
    loss = ready(student, teacher).float()
    loss.autocast_dtype = torch.bfloat16
    seen = []
    loss.regressors[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert loss(student, teacher, {}).dtype == torch.float32 and seen == [torch.bfloat16]


def test_a_transformer_learns_from_a_convolutional_network():
    torch.manual_seed(0)
    student = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), list("0123456789"), TINY)
    teacher = load_student("cifar_resnet8", num_classes=10)
    loss = FitNetLoss([0, 1], [3, 2])  # 4 x 4 tokens; maps of 8 x 8 and of 16 x 16
    trainer = DistillationTrainer(
        student, teacher, config(max_steps=2), train_dataset=images(16), losses={"fitnet": loss}
    )
    assert [type(regress.conv) for regress in loss.regressors] == [nn.ConvTranspose2d, nn.Sequential]
    learnt = [parameter for regress in loss.regressors for parameter in (*regress.bn.parameters(), *kernels(regress))]
    kept = [parameter.detach().clone() for parameter in learnt]
    trainer.train()
    assert all((parameter != start).any() for parameter, start in zip(learnt, kept, strict=True))
    logged = [entry["loss_fitnet"] for entry in train_logs(trainer)]
    assert len(logged) == 2 and logged[1] < logged[0]


def test_layers_and_weight_are_the_published_ones():
    loss = FitNetLoss()
    assert (loss.student_layers, loss.teacher_layers, loss.weight, loss.reads_logits) == ([1], [1], 100.0, False)


def test_clear_errors():
    with pytest.raises(ValueError, match="lists of equal length"):
        FitNetLoss([1, 2])
    with pytest.raises(ValueError, match="teacher_layers is 'layer2': give a list"):
        FitNetLoss(teacher_layers="layer2")
    with pytest.raises(ValueError, match="weight is -1"):
        FitNetLoss(weight=-1)
    with pytest.raises(ValueError, match=r"same \(B, C\), got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        fitnet_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)])
    with pytest.raises(ValueError, match=r"gives \(2, 5\); expected a map"):
        ready(outputs(random(2, 5)), outputs(random(2, 3, 4, 4)))
