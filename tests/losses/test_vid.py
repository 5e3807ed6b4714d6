import math

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.vid import VIDLoss, vid_loss
from hfkd.networks.features import Outputs
from hfkd.networks.teacher import Teacher

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(maps):
    logits = random(2, 5)
    return Outputs(logits, logits, dict(enumerate(maps)))


def ready(student, teacher):
    """A float64 loss over all the maps given."""
    layers = list(range(len(student.features)))
    loss = VIDLoss(layers, layers)
    loss.setup(student, teacher)
    return loss.double()


def load(loss, position, weights):
    """The weights of one pair, under the reference's names."""
    weights = dict(weights)
    loss.log_scales[position].data.copy_(weights.pop("log_scale"))
    loss.regressors[position].load_state_dict(
        {name.removeprefix("regressor."): weight for name, weight in weights.items()}
    )


def test_golden(feature_golden):
    """Alone and summed; the second pair's teacher map is the larger."""
    own, other = feature_golden.maps("student"), feature_golden.maps("teacher")
    for number in range(3):
        student, teacher = outputs([own[number]]), outputs([other[number]])
        loss = ready(student, teacher)
        load(loss, 0, feature_golden.weights(f"vid/pair_{number}"))
        expected = feature_golden.values[f"vid/pair_{number}"]
        assert loss(student, teacher, {}).item() == pytest.approx(expected, rel=1e-9, abs=0)

    student, teacher = outputs(own), outputs(other)
    loss = ready(student, teacher)
    for number in range(3):
        load(loss, number, feature_golden.weights(f"vid/pair_{number}"))
    inputs = {f"student_map_{number}": one for number, one in enumerate(own)}
    feature_golden.check("vid/sum_over_pairs", loss(student, teacher, {}), **inputs)


def test_the_scales_start_at_the_published_variance(feature_golden):
    loss = ready(outputs([random(2, 3, 4, 4)]), outputs([random(2, 8, 4, 4)]))
    expected = feature_golden.weights("vid/pair_0")["log_scale"]
    torch.testing.assert_close(loss.log_scales[0].detach(), expected, rtol=1e-6, atol=0)  # made in float32
    assert F.softplus(loss.log_scales[0])[0].item() + 1e-5 == pytest.approx(5, rel=1e-6)


def test_by_hand():
    """Variance 2 in the first channel, 3 in the second."""
    scales = torch.tensor([math.log(math.expm1(2 - 1e-5)), math.log(math.expm1(3 - 1e-5))], dtype=torch.float64)
    predicted, teacher = random(2, 2, 3, 3), random(2, 2, 3, 3, seed=1)
    squares = (predicted - teacher) ** 2
    expected = (squares[:, 0] / 2 + math.log(2)).mean() / 4 + (squares[:, 1] / 3 + math.log(3)).mean() / 4
    torch.testing.assert_close(vid_loss([predicted], [scales], [teacher]), expected)


def test_the_larger_student_map_is_averaged_down_before_its_regressor():
    torch.manual_seed(0)
    own, other = random(2, 3, 8, 8), random(2, 4, 4, 2, seed=1)
    student, teacher = outputs([own]), outputs([other])
    loss = ready(student, teacher)
    predicted = loss.regressors[0](F.adaptive_avg_pool2d(own, (4, 2)))
    torch.testing.assert_close(loss(student, teacher, {}), vid_loss([predicted], loss.log_scales, [other]))


def test_gradcheck():
    teacher = [random(2, 3, 4, 4)]
    inputs = random(2, 3, 2, 2, seed=1).requires_grad_(), random(3, seed=2).requires_grad_()
    assert gradcheck(lambda predicted, scale: vid_loss([predicted], [scale], teacher), inputs)


def test_every_learnable_part_moves():
    torch.manual_seed(0)
    student = outputs([random(2, 3, 8, 8), random(2, 4, 4, 4)])
    teacher = outputs([random(2, 4, 4, 4, seed=1), random(2, 3, 8, 8, seed=2)])
    loss = ready(student, teacher)
    loss(student, teacher, {}).backward()
    assert len(list(loss.parameters())) == 2 * 4
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in loss.parameters())


def test_the_regressors_run_in_the_precision_of_the_run_and_the_loss_in_float32():
    student, teacher = outputs([random(2, 3, 4, 4).float()]), outputs([random(2, 4, 4, 4).float()])
    loss = ready(student, teacher).float()
    loss.autocast_dtype = torch.bfloat16
    seen = []
    loss.regressors[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert loss(student, teacher, {}).dtype == torch.float32 and seen == [torch.bfloat16]


def test_the_optimizer_trains_the_scales():
    """With a convolutional student of a transformer, without weight decay, so that only the loss can move them."""
    torch.manual_seed(0)
    teacher = Teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY))
    loss = VIDLoss([-2, -1], [0, 1])
    args = config(max_steps=2, weight_decay=0.0)
    student = load_student("cifar_resnet8", num_classes=10)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=images(16), losses={"vid": loss})
    kept = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    assert {"log_scales.0", "log_scales.1"} <= kept.keys()
    trainer.train()
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert all(id(parameter) in trained for parameter in loss.parameters())
    assert all((parameter != kept[name]).any() for name, parameter in loss.named_parameters())
    logged = [entry["loss_vid"] for entry in train_logs(trainer)]
    assert len(logged) == 2 and logged[1] < logged[0]


def test_clear_errors():
    assert VIDLoss().weight == 1 and VIDLoss().student_layers is None
    with pytest.raises(ValueError, match="lists of equal length"):
        VIDLoss([1, 2], [1])
    with pytest.raises(ValueError, match=r"log_scales of shape \(4,\) expected, got \(3,\)"):
        vid_loss([random(2, 4, 4, 4)], [random(3)], [random(2, 4, 4, 4)])
    with pytest.raises(ValueError, match=r"same \(B, C\), got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        vid_loss([random(2, 3, 4, 4)], [random(4)], [random(2, 4, 4, 4)])
    # vgg8 has a stage more than resnet8: layers left open do not pair up
    student, teacher = (timm.create_model(f"cifar_{name}", num_classes=10) for name in ("vgg8", "resnet8"))
    with pytest.raises(ValueError, match="losses.vid: student_layers is .*give lists"):
        DistillationTrainer(student, teacher, config(), train_dataset=images(8), losses={"vid": VIDLoss()})
