import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.vkd import VkDLoss, vkd_loss
from hfkd.networks.features import Outputs
from hfkd.networks.wrapping import wrap_timm

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(student, teacher):
    """A loss over one layer of each, and the outputs of the two networks."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {-1: feature}) for feature in (student, teacher)]
    loss = VkDLoss()
    loss.setup(*outputs)
    return loss, outputs


def test_golden(new_feature_golden):
    student = new_feature_golden.tensor("student_pooled").clone().requires_grad_()
    projection = new_feature_golden.tensor("vkd/projection").clone().requires_grad_()
    value = vkd_loss([student @ projection.T], [new_feature_golden.tensor("teacher_pooled")])
    value.backward()
    name = "vkd/given_projection"
    new_feature_golden.check(name, value, student_pooled=student.grad)
    expected = new_feature_golden.tensor(f"{name}/grad_projection")
    torch.testing.assert_close(projection.grad, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    teacher = [random(3, 4, seed=2), random(3, 5, seed=3)]
    projected = [random(3, 4).requires_grad_(), random(3, 5, seed=1).requires_grad_()]
    assert gradcheck(lambda *features: vkd_loss(features, teacher), projected)


def test_features_are_averages():
    student, teacher = random(2, 1 + 9, 6).float(), random(2, 8, 4, 4, seed=1).float()  # behind a class token
    loss, outputs = ready(student, teacher)
    projected = F.linear(student[:, 1:].mean(1), loss.projections[0].weight)
    torch.testing.assert_close(loss(*outputs, {}), vkd_loss([projected], [teacher.mean((2, 3))]))


@pytest.mark.parametrize(("own", "other"), [(6, 8), (8, 8), (8, 6)])
def test_the_projection_stays_orthonormal_while_it_learns(own, other):
    torch.manual_seed(0)
    loss, outputs = ready(random(4, own, 2, 2).float(), random(4, other, 2, 2, seed=1).float())
    (projection,) = loss.projections
    before = projection.weight.detach().clone()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(*outputs, {}).backward()
        assert all(parameter.grad.abs().max() > 1e-6 for parameter in loss.parameters())
        optimizer.step()
    weight = projection.weight.detach()
    gram = weight.T @ weight if other >= own else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    assert (weight - before).abs().max() > 1e-3


def test_all_that_is_saved_is_contiguous():
    for own, other in ((6, 8), (8, 8), (8, 6)):
        loss, _ = ready(random(4, own, 2, 2), random(4, other, 2, 2))
        assert all(value.is_contiguous() for value in loss.state_dict().values())


def test_half_precision_is_widened():
    value = vkd_loss([random(4, 6).half()], [random(4, 6, seed=1).half()])
    assert value.dtype == torch.float32


def test_clear_errors():
    loss = VkDLoss()
    assert loss.student_layers == loss.teacher_layers == [-1] and loss.weight == 1 and not loss.reads_logits
    with pytest.raises(ValueError, match=r"got \(4, 6\) and \(4, 5\)"):
        vkd_loss([random(4, 6)], [random(4, 5)])
    with pytest.raises(ValueError, match="give lists of equal length"):
        VkDLoss([0, 1])
    with pytest.raises(ValueError, match="weight is -1"):
        VkDLoss(weight=-1.0)
    with pytest.raises(ValueError, match=r"gives \(2, 5\); expected a map"):
        ready(random(2, 5), random(2, 9, 4))


def test_a_transformer_learns_from_a_convolutional_network(tmp_path):
    torch.manual_seed(0)
    student = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), list("0123456789"), TINY)
    trainer = DistillationTrainer(
        student,
        load_student("cifar_resnet8", num_classes=10),
        config(tmp_path, ce_weight=0.0, num_train_epochs=6, optim="adamw_torch", optim_args=None, learning_rate=1e-2),
        train_dataset=images(8, augment=False),  # one batch, so that the terms can be compared
        losses={"vkd": VkDLoss()},
    )
    trainer.train()
    terms = [entry["loss_vkd"] for entry in train_logs(trainer)]
    assert terms[-1] < 0.9 * terms[0]
