import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.reviewkd import ReviewKDLoss, reviewkd_loss
from hfkd.networks.features import Outputs

LAYERS = [0, 1, 2, "embedding"]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def released_name(name):
    """`0.reduce.bn.weight` as the release calls it, from the deepest level on."""
    level, part, *rest = name.split(".")
    part = {"reduce": "conv1", "attention": "att_conv.0", "expand": "conv2"}[part]
    return ".".join([str(3 - int(level)), part, *({"conv": "0", "bn": "1"}.get(word, word) for word in rest)])


@pytest.fixture
def levels(new_feature_golden):
    """Student and teacher, and a float64 loss over their levels with the reference's weights."""
    outputs = []
    for role in ("student", "teacher"):
        names = [f"{role}_map_{number}" for number in range(3)] + [f"{role}_pooled"]
        features = {
            layer: new_feature_golden.tensor(name).clone().requires_grad_(role == "student")
            for layer, name in zip(LAYERS, names, strict=True)
        }
        outputs.append(Outputs(features["embedding"], features["embedding"], features))
    loss = ReviewKDLoss(LAYERS, LAYERS)
    loss.setup(*outputs)
    loss.double()
    with torch.no_grad():
        for name, parameter in loss.fusions.named_parameters():
            parameter.copy_(new_feature_golden.tensor(f"reviewkd/weights/{released_name(name)}"))
    return loss, *outputs


def test_golden(new_feature_golden, levels):
    loss, student, teacher = levels
    sizes = [teacher.features[n].shape[2:] for n in range(3)] + [torch.Size([1, 1])]
    for number, fused in enumerate(loss.fuse(loss.maps(student, teacher)[0], sizes)):
        expected = new_feature_golden.tensor(f"reviewkd/result_{number}")
        torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)
        value = reviewkd_loss([fused], [loss.maps(student, teacher)[1][number]])
        new_feature_golden.check(f"reviewkd/hcl_{number}", value)
    value = loss(student, teacher, {"progress": torch.tensor(20.0)})
    value.backward()
    gradients = {f"student_map_{n}": student.features[n].grad for n in range(3)}
    new_feature_golden.check("reviewkd", value, student_pooled=student.embedding.grad, **gradients)
    for name, parameter in loss.fusions.named_parameters():
        expected = new_feature_golden.tensor(f"reviewkd/grad_weights/{released_name(name)}")
        assert (parameter.grad - expected).abs().max() <= 1e-9 * expected.abs().max(), name


def test_the_warm_up_counts_epochs_from_1(levels):
    loss, student, teacher = levels
    values = [loss(student, teacher, {"progress": torch.tensor(epoch)}) for epoch in (4.5, 19.0, 100.0)]
    assert values[0].item() == pytest.approx(values[1].item() / 4) and values[1] == values[2]


def test_sizes_below_the_map_count():
    """Of a 4 x 4 map the averages of 2 x 2 and 1 x 1, of a 1 x 1 map none."""
    student, teacher = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    teacher[..., 0, 0] = 4
    expected = (1 + 0.5 * 0.25 + 0.25 * 0.0625) / 1.75
    assert reviewkd_loss([student], [teacher]).item() == pytest.approx(expected)
    assert reviewkd_loss([student[..., :1, :1]], [teacher[..., :1, :1]]).item() == 16


def test_gradcheck():
    student = [random(2, 3, 6, 6).requires_grad_(), random(2, 3, 1, 1, seed=1).requires_grad_()]
    teacher = [random(2, 3, 6, 6, seed=2), random(2, 3, 1, 1, seed=3)]
    assert gradcheck(lambda *maps: reviewkd_loss(maps, teacher), student)


def test_fused_maps_are_no_wider_than_max_channels():
    outputs = Outputs(random(2, 5), random(2, 5), {0: random(2, 3, 4, 4), 1: random(2, 6, 2, 2)})
    for limit, channels in ((4, 4), (512, 6)):
        loss = ReviewKDLoss([0, 1], [0, 1], max_channels=limit)
        loss.setup(outputs, outputs)
        assert [fuse.reduce.conv.out_channels for fuse in loss.fusions] == [channels] * 2


def test_clear_errors():
    assert not ReviewKDLoss.reads_logits and ReviewKDLoss().student_layers is None
    with pytest.raises(ValueError, match=r"one shape expected, got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        reviewkd_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)])
    with pytest.raises(ValueError, match="max_channels is 0: give a whole number, 1 or above"):
        ReviewKDLoss(max_channels=0)
    with pytest.raises(ValueError, match="give lists of equal length"):
        ReviewKDLoss([0, 1], [1])
