import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hfkd.losses import LocalityGuidanceLoss, build_losses, locality_guidance_loss
from hfkd.losses.feature_maps import as_map
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(**features):
    logits = random(2, 5)
    return Outputs(logits, logits, features)


def test_by_hand():
    """One pair of the same size, one where the student's map is the smaller, one where the teacher's is."""
    student = [random(2, 3, 4, 4), random(2, 3, 2, 2, seed=1), random(2, 3, 8, 8, seed=2)]
    teacher = [random(2, 3, 4, 4, seed=3), random(2, 3, 4, 4, seed=4), random(2, 3, 4, 4, seed=5)]
    larger = F.interpolate(student[1], (4, 4), mode="bilinear")
    expected = (student[0] - teacher[0]).pow(2).mean() + (larger - teacher[1]).pow(2).mean()
    expected = expected + (student[2] - F.interpolate(teacher[2], (8, 8), mode="bilinear")).pow(2).mean()
    torch.testing.assert_close(locality_guidance_loss(student, teacher), expected)
    assert locality_guidance_loss(student, student) == 0


def test_gradcheck():
    teacher = [random(2, 3, 4, 4), random(2, 3, 2, 2)]
    student = [random(2, 3, 3, 3, seed=1).requires_grad_(), random(2, 3, 4, 4, seed=2).requires_grad_()]
    assert gradcheck(lambda *maps: locality_guidance_loss(maps, teacher), student)


def test_the_module_projects_tokens_and_maps_to_the_teachers_channels():
    """Tokens behind a class token and maps; every learnt part moves."""
    loss = LocalityGuidanceLoss(["block", 4], [1, 2], weight=2.5)
    student = outputs(block=random(2, 1 + 9, 6).float())
    student.features[4] = random(2, 5, 4, 4).float()
    teacher = outputs()
    teacher.features.update({1: random(2, 3, 8, 8).float(), 2: random(2, 7, 2, 2).float()})
    loss.setup(student, teacher)
    assert [tuple(layer.weight.shape) for layer in loss.projectors] == [(3, 6, 1, 1), (7, 5, 1, 1)]

    value = loss(student, teacher, {})
    own = [as_map(student.features["block"]), student.features[4]]
    projected = [project(feature) for project, feature in zip(loss.projectors, own, strict=True)]
    torch.testing.assert_close(value, locality_guidance_loss(projected, [teacher.features[1], teacher.features[2]]))
    value.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert not loss.reads_logits


def test_as_map():
    tokens = random(2, 9, 4)
    grid = as_map(tokens)
    assert grid.shape == (2, 4, 3, 3) and torch.equal(grid[:, :, 1, 2], tokens[:, 5])
    for others in (1, 2, 3):
        assert torch.equal(as_map(torch.cat([random(2, others, 4, seed=1), tokens], dim=1)), grid)
    assert as_map(grid) is grid
    for shape in ((2, 14, 4), (2, 4)):
        with pytest.raises(ValueError, match="expected a map"):
            as_map(random(*shape))


def test_clear_errors():
    with pytest.raises(ValueError, match="lists of equal length"):
        build_losses({"locality_guidance": {"student_layers": [0, 6], "teacher_layers": [1]}}, False)
    for layers in ("blocks.0", 3, [], [0.5], None):
        with pytest.raises(ValueError, match="student_layers is .*give a list of stage indices or module paths"):
            build_losses({"locality_guidance": {"student_layers": layers, "teacher_layers": [1]}}, False)
    with pytest.raises(ValueError, match="needs the parameter 'student_layers'"):
        build_losses({"locality_guidance": {}}, False)
    with pytest.raises(ValueError, match="one number of channels"):
        locality_guidance_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)])
