import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.srd import SRDLoss, srd_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(student, teacher, **settings):
    """A float64 loss and the outputs of two networks with these embeddings."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {"embedding": embedding}) for embedding in (student, teacher)]
    loss = SRDLoss(**settings)
    loss.setup(*outputs)
    return loss.double(), outputs


def test_golden(new_feature_golden):
    for case, settings in new_feature_golden.cases("srd"):
        student = new_feature_golden.tensor("student_pooled").clone().requires_grad_()
        loss, outputs = ready(student, new_feature_golden.tensor("teacher_pooled"), exponent=settings["exponent"])
        for name, parameter in loss.projector.named_parameters():
            parameter.data.copy_(new_feature_golden.tensor(f"{case}/weights/{name}"))
        value = loss(*outputs, {})
        value.backward()
        gradients = {"student_pooled": student.grad, "weights/weight": loss.projector.weight.grad}
        new_feature_golden.check(case, value, **gradients)


def test_the_formula():
    student, teacher = random(5, 3), random(5, 3, seed=1)
    standardized = [(z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-4).sqrt() for z in (student, teacher)]
    expected = ((standardized[0] - standardized[1]) ** 4).sum().log()
    torch.testing.assert_close(srd_loss(student, teacher, 4.0), expected)


@pytest.mark.parametrize("exponent", [1.5, 4.0])
def test_gradcheck(exponent):
    teacher = random(4, 3, seed=1)
    assert gradcheck(lambda student: srd_loss(student, teacher, exponent), random(4, 3).requires_grad_())


@pytest.mark.parametrize("exponent", [1.0, 4.0])
def test_equal_and_constant_embeddings_are_finite(exponent):
    for student in (torch.zeros(4, 3), random(4, 3).float(), 1e15 * random(4, 3).float()):
        for teacher in (torch.ones(4, 3), student.clone()):
            logits = student.clone().requires_grad_()
            value = srd_loss(logits, teacher, exponent)
            value.backward()
            assert value.isfinite() and logits.grad.isfinite().all()


def test_every_learnable_part_moves_but_the_bias():
    """Standardization takes the bias out again."""
    loss, outputs = ready(random(4, 6), random(4, 8, seed=1))
    loss(*outputs, {}).backward()
    assert loss.projector.weight.grad.abs().max() > 1e-6
    assert loss.projector.bias.grad.abs().max() < 1e-12  # DDP waits for it


def test_the_projector_runs_in_the_precision_of_the_run_and_the_loss_in_float32():
    loss, outputs = ready(random(4, 6).float(), random(4, 8, seed=1).float())
    loss.float().autocast_dtype = torch.bfloat16
    seen = []
    loss.projector.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert loss(*outputs, {}).dtype == torch.float32 and seen == [torch.bfloat16]


def test_clear_errors():
    assert (SRDLoss().exponent, SRDLoss().weight, SRDLoss().least_images) == (
        4.0,
        2.0,
        2,
    ) and not SRDLoss().reads_logits
    with pytest.raises(ValueError, match=r"got \(4, 6\) and \(4, 5\)"):
        srd_loss(random(4, 6), random(4, 5), 4.0)
    with pytest.raises(ValueError, match=r"two images or more expected, got \(1, 6\)"):
        srd_loss(random(1, 6), random(1, 6), 4.0)
    for value in (0.5, 0, float("nan"), "4"):
        with pytest.raises(ValueError, match=f"exponent is {value!r}: give a finite number"):
            SRDLoss(exponent=value)
