import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.cc import CCLoss, cc_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(student, teacher, **settings):
    """A float64 loss and the outputs of two networks with these embeddings."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {"embedding": embedding}) for embedding in (student, teacher)]
    loss = CCLoss(**settings)
    loss.setup(*outputs)
    return loss.double(), outputs


def test_golden(new_feature_golden):
    student = new_feature_golden.tensor("student_pooled").clone().requires_grad_()
    loss, outputs = ready(student, new_feature_golden.tensor("teacher_pooled"), dimension=12)
    released = {"embed_s": loss.student_head, "embed_t": loss.teacher_head}
    parameters = {f"weights/{name}.{key}": p for name, head in released.items() for key, p in head.named_parameters()}
    for name, parameter in parameters.items():
        parameter.data.copy_(new_feature_golden.tensor(f"cc/{name}"))
    value = loss(*outputs, {})
    value.backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    new_feature_golden.check("cc", value, student_pooled=student.grad, **gradients)


def test_by_hand():
    student = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    assert cc_loss(student, teacher) == ((1 * 2 + 0 * 1) + (2 * 3 + 1 * 4)) / 2


def test_gradcheck():
    teacher = random(4, 3, seed=1)
    assert gradcheck(lambda student: cc_loss(student, teacher), random(4, 3).requires_grad_())


def test_every_learnable_part_moves():
    loss, outputs = ready(random(4, 6), random(4, 8, seed=1))
    loss(*outputs, {}).backward()
    parameters = dict(loss.named_parameters())
    assert {tuple(parameter.shape) for parameter in parameters.values()} == {(128, 6), (128, 8), (128,)}
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in parameters.values())


def test_the_heads_run_in_the_precision_of_the_run_and_the_loss_in_float32():
    loss, outputs = ready(random(4, 6).float(), random(4, 8, seed=1).float())
    loss.float().autocast_dtype = torch.bfloat16
    seen = []
    loss.student_head.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert loss(*outputs, {}).dtype == torch.float32 and seen == [torch.bfloat16]


def test_clear_errors():
    assert CCLoss().weight == 0.02 and not CCLoss().reads_logits and CCLoss().least_images == 2
    with pytest.raises(ValueError, match=r"embeddings \(B, D\) and \(B, D\) .*got \(4, 6\) and \(4, 5\)"):
        cc_loss(random(4, 6), random(4, 5))
    with pytest.raises(ValueError, match=r"two images or more expected, got \(1, 6\)"):
        cc_loss(random(1, 6), random(1, 6))
    with pytest.raises(ValueError, match="dimension is 0: give a whole number"):
        CCLoss(dimension=0)
    with pytest.raises(ValueError, match="weight is -1"):
        CCLoss(weight=-1.0)
