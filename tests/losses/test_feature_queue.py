import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.feature_queue import FeatureQueueLoss, feature_queue_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def ready(student, teacher, **settings):
    """A float64 loss and the outputs of two networks with these embeddings."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {"embedding": embedding}) for embedding in (student, teacher)]
    loss = FeatureQueueLoss(**settings)
    loss.setup(*outputs)
    return loss.double(), outputs


def test_golden(new_feature_golden):
    for case, settings in new_feature_golden.cases("lightly_queue"):
        student = new_feature_golden.tensor("lightly_queue/student").clone().requires_grad_()
        teacher, queue = (new_feature_golden.tensor(name) for name in ("teacher_pooled", "lightly_queue/queue"))
        value = feature_queue_loss(student, teacher, queue, settings["temperature"])
        value.backward()
        new_feature_golden.check(case, value, student=student.grad)


def test_gradcheck():
    teacher, queue = random(3, 4, seed=1), unit(7, 4, seed=2)
    loss = lambda student: feature_queue_loss(student, teacher, queue, 0.5)  # noqa: E731
    assert gradcheck(loss, random(3, 4).requires_grad_())


def test_the_queue_holds_the_newest_images_first():
    batches = [random(3, 8, seed=seed) for seed in range(3)]
    loss, outputs = ready(random(3, 6), batches[0], size=7)
    assert (loss.queue == 0).all()
    for batch in batches:
        outputs[1].features["embedding"] = batch
        value = loss(*outputs, {})
    expected = torch.nn.functional.normalize(torch.cat(batches[::-1])[:7], dim=1)
    torch.testing.assert_close(loss.queue, expected)
    projected = loss.projector(outputs[0].embedding)
    torch.testing.assert_close(value, feature_queue_loss(projected, batches[-1], expected, 0.07))


def test_a_batch_larger_than_the_queue():
    loss, outputs = ready(random(5, 6), random(5, 8, seed=1), size=2)
    assert loss(*outputs, {}).isfinite() and loss.queue.shape == (2, 8)


def test_the_queue_is_saved_with_the_run():
    loss, outputs = ready(random(3, 6), random(3, 8, seed=1), size=4)
    loss(*outputs, {})
    assert set(loss.state_dict()) == {"queue", "projector.weight", "projector.bias"}
    assert (loss.state_dict()["queue"] == loss.queue).all() and loss.replicated_buffers == ("queue",)


def test_every_learnable_part_moves():
    loss, outputs = ready(random(4, 6), random(4, 8, seed=1))
    loss(*outputs, {}).backward()
    assert len(list(loss.parameters())) == 2
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in loss.parameters())


def test_embeddings_of_zeros_have_moderate_gradients():
    loss, outputs = ready(torch.zeros(4, 6).double(), torch.zeros(4, 8).double())
    value = loss(*outputs, {})
    value.backward()
    assert value.isfinite()
    student = torch.zeros(4, 8).double().requires_grad_()
    feature_queue_loss(student, random(4, 8), unit(5, 8), 0.07).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e3


def test_the_projector_runs_in_the_precision_of_the_run_and_the_loss_in_float32():
    loss, outputs = ready(random(4, 6).float(), random(4, 8, seed=1).float())
    loss.float().autocast_dtype = torch.bfloat16
    seen = []
    loss.projector.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert loss(*outputs, {}).dtype == torch.float32 and seen == [torch.bfloat16]


def test_clear_errors():
    with pytest.raises(ValueError, match=r"got \(4, 6\) and \(4, 5\)"):
        feature_queue_loss(random(4, 6), random(4, 5), random(7, 6), 0.07)
    with pytest.raises(ValueError, match=r"a queue \(N, 6\) expected, got \(7, 5\)"):
        feature_queue_loss(random(4, 6), random(4, 6), random(7, 5), 0.07)
    with pytest.raises(ValueError, match="temperature is 0: give a finite number above 0"):
        FeatureQueueLoss(temperature=0)
    with pytest.raises(ValueError, match="size is 0: give a whole number"):
        FeatureQueueLoss(size=0)
