import pytest
import torch
from helpers import config, images
from torch import nn
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.ofd import OFDLoss, ofd_loss, ofd_margin
from hfkd.networks.features import Outputs

NUMBERS = range(3)
NORMS = [f"bn{number}" for number in NUMBERS]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_feature_golden):
    golden = new_feature_golden.tensor
    student = {number: golden(f"student_map_{number}").clone().requires_grad_() for number in NUMBERS}
    teacher = {number: golden(f"teacher_map_{number}") for number in NUMBERS}
    for number, norm in enumerate(NORMS):
        affine = torch.stack([golden(f"ofd/teacher_bn_{name}_{number}") for name in ("weight", "bias")])
        teacher[f"{norm}:affine"] = affine
    logits = random(6, 10)
    outputs = Outputs(logits, logits, student), Outputs(logits, logits, teacher)
    loss = OFDLoss([*NUMBERS], [*NUMBERS], NORMS)
    loss.setup(*outputs)
    for number in NUMBERS:
        margin = loss.get_buffer(f"margin_{number}")
        assert margin.dtype == torch.float32
        torch.testing.assert_close(margin, golden(f"ofd/margin_{number}").flatten().float(), rtol=1e-7, atol=0)
    loss.connectors.double()
    names = {"conv.weight": "0.weight", "bn.weight": "1.weight", "bn.bias": "1.bias"}
    parameters = {
        f"connectors.{n}.{names[name]}": p for n in NUMBERS for name, p in loss.connectors[n].named_parameters()
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(golden(f"ofd/weights/{name}"))
    value = loss(*outputs, {})
    value.backward()
    new_feature_golden.check("ofd", value, **{f"student_map_{n}": student[n].grad for n in NUMBERS})
    for name, parameter in parameters.items():
        expected = golden(f"ofd/grad_weights/{name}")
        assert (parameter.grad - expected).abs().max() <= 1e-9 * expected.abs().max(), name


def test_what_counts_by_hand():
    """Positive targets from both sides; of the others what lies above the target, or above the margin."""
    teacher = torch.tensor([2.0, 2.0, -1.0, -1.0, -5.0, -5.0, -5.0])
    student = torch.tensor([1.0, 4.0, 0.0, -2.0, -2.0, -4.0, -6.0])
    expected = 1 + 4 + 1 + 0 + 1 + 0 + 0
    maps = [one.reshape(1, 1, 1, 7) for one in (student, teacher)]
    assert ofd_loss([maps[0]], [maps[1]], [torch.tensor([-3.0])]).item() == expected
    assert ofd_loss([maps[0]] * 2, [maps[1]] * 2, [torch.tensor([-3.0])] * 2).item() == 1.5 * expected


def test_the_margin_is_the_mean_of_what_is_negative():
    weight, bias = torch.tensor([2.0, -0.5, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.25, 5.0, -0.3, 0.3])
    drawn = random(400_000)
    margin = ofd_margin(weight, bias)
    for channel in (0, 1):
        response = drawn * weight[channel] + bias[channel]
        assert margin[channel].item() == pytest.approx(response[response < 0].mean().item(), rel=0.01)
    assert margin[2] == -3 and margin[3].item() == pytest.approx(-0.3) and margin[4] == 0


def test_gradcheck():
    student = [random(2, 3, 4, 4).requires_grad_(), random(2, 3, 2, 2, seed=1).requires_grad_()]
    teacher = [random(2, 3, 8, 8, seed=2), random(2, 3, 2, 2, seed=3)]
    margins = [torch.full((3,), -0.5), torch.full((3,), -0.2)]
    assert gradcheck(lambda *maps: ofd_loss(maps, teacher, margins), student)


def test_the_teachers_norms_give_the_margins():
    student, teacher = (load_student("cifar_resnet8", num_classes=10) for _ in range(2))
    nn.init.uniform_(teacher.timm_model.layer3[0].bn2.bias, -1, 1)
    layers = ["layer3.0.act2:input"]
    args = config(
        max_steps=1,
        losses={"ofd": {"student_layers": layers, "teacher_layers": layers, "teacher_norms": ["layer3.0.bn2"]}},
    )
    loss = DistillationTrainer(student, teacher, args, train_dataset=images(8)).distiller.losses["ofd"]
    norm = teacher.timm_model.layer3[0].bn2
    assert torch.equal(loss.margin_0, ofd_margin(norm.weight, norm.bias)) and loss.margin_0.std() > 0
    for norms, message in (
        (["layer3.0.act2"], "'layer3.0.act2' is no norm with a learnt scale and shift"),
        (["layer2.0.bn2"], "teacher_norms: 'layer2.0.bn2' has 32 channels and the map of 'layer3.0.act2:input' 64"),
        (["layer9"], "no layer 'layer9'"),
    ):
        args.losses["ofd"]["teacher_norms"] = norms
        with pytest.raises(ValueError, match=message):
            DistillationTrainer(student, teacher, args, train_dataset=images(8))


def test_clear_errors():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        ofd_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)], [torch.zeros(4)])
    with pytest.raises(ValueError, match="teacher_norms is .'a', 'b'. and teacher_layers .0.: give lists of equal"):
        OFDLoss([0], [0], ["a", "b"])
    with pytest.raises(ValueError, match="teacher_norms is 3: give a list of module paths"):
        OFDLoss([0], [0], 3)
    with pytest.raises(ValueError, match="student_layers is 0: give a list"):
        OFDLoss(0, [0], ["a"])
