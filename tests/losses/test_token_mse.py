import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.token_mse import TokenMSELoss, token_mse_loss
from hfkd.networks.features import Outputs
from hfkd.networks.teacher import Teacher

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(student, teacher):
    """A float64 loss over one layer of each, and the outputs of the two networks."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {-1: feature}) for feature in (student, teacher)]
    loss = TokenMSELoss()
    loss.setup(*outputs)
    return loss.double(), outputs


def test_tokens_are_projected_one_by_one():
    student, teacher = random(2, 1 + 9, 6), random(2, 2 + 9, 4, seed=1)  # behind a class token, and behind two
    loss, outputs = ready(student, teacher)
    (projector,) = loss.projectors
    projected = F.linear(student[:, 1:], projector.weight[:, :, 0, 0], projector.bias)
    torch.testing.assert_close(loss(*outputs, {}), (projected - teacher[:, 2:]).square().mean())


def test_the_larger_of_the_two_is_averaged_down():
    loss, outputs = ready(random(2, 16, 6), random(2, 4, 2, 2, seed=1))
    (projector,) = loss.projectors
    grid = projector(outputs[0].features[-1].transpose(1, 2).reshape(2, 6, 4, 4))
    expected = F.mse_loss(F.avg_pool2d(grid, 2), outputs[1].features[-1])
    torch.testing.assert_close(loss(*outputs, {}), expected)


def test_gradcheck_of_two_pairs():
    projected = [random(2, 3, 4, 4).requires_grad_(), random(2, 2, 2, 2, seed=1).requires_grad_()]
    teacher = [random(2, 3, 4, 4, seed=2), random(2, 2, 4, 4, seed=3)]
    assert gradcheck(lambda *maps: token_mse_loss(maps, teacher), projected)
    separately = token_mse_loss(projected[:1], teacher[:1]) + token_mse_loss(projected[1:], teacher[1:])
    torch.testing.assert_close(token_mse_loss(projected, teacher), separately)


def test_every_learnable_part_moves():
    loss, outputs = ready(random(2, 9, 6), random(2, 9, 4, seed=1))
    loss(*outputs, {}).backward()
    assert len(list(loss.parameters())) == 2
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in loss.parameters())


def test_the_projector_runs_in_the_precision_of_the_run_and_the_loss_in_float32():
    loss, outputs = ready(random(2, 9, 6).float(), random(2, 9, 4, seed=1).float())
    loss.float().autocast_dtype = torch.bfloat16
    seen = []
    loss.projectors[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert loss(*outputs, {}).dtype == torch.float32 and seen == [torch.bfloat16]


def test_clear_errors():
    loss = TokenMSELoss()
    assert loss.student_layers == loss.teacher_layers == [-1] and loss.weight == 1 and not loss.reads_logits
    with pytest.raises(ValueError, match="give lists of equal length"):
        TokenMSELoss([0, 1])
    with pytest.raises(ValueError, match="weight is -1"):
        TokenMSELoss(weight=-1.0)
    with pytest.raises(ValueError, match=r"gives \(2, 5\); expected a map"):
        ready(random(2, 5), random(2, 9, 4))
    with pytest.raises(ValueError, match=r"the same \(B, C\), got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        token_mse_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)])


def test_a_convolutional_student_learns_from_a_transformer(tmp_path):
    torch.manual_seed(0)
    teacher = Teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY))
    trainer = DistillationTrainer(
        load_student("cifar_resnet8", num_classes=10),
        teacher,
        config(tmp_path, ce_weight=0.0, num_train_epochs=6, optim="adamw_torch", optim_args=None, learning_rate=1e-2),
        train_dataset=images(8, augment=False),  # one batch, so that the terms can be compared
        losses={"token_mse": TokenMSELoss()},
    )
    trainer.train()
    terms = [entry["loss_token_mse"] for entry in train_logs(trainer)]
    assert terms[-1] < 0.9 * terms[0]
