import math
from types import SimpleNamespace

import pytest
import torch

from hfkd.losses import CTKDLoss, ctkd_instance_loss, kd_loss, standardize
from hfkd.losses.ctkd import curriculum_factor, scale_gradient

AFTER_CURRICULUM = 50.0  # epochs: the factor is -1


def set_up(loss, student, teacher):
    torch.manual_seed(0)
    loss.setup(student, teacher)
    return loss


def test_golden_global(golden):
    for case, settings in golden.cases("ctkd_global"):
        if case.endswith("temperature"):
            continue
        student, teacher = golden.inputs()
        loss = CTKDLoss(start=settings["start"], end=settings["end"], curriculum_epochs=10).double()
        loss.logit_standardization = bool(settings["zscore"])
        # The fifth epoch of ten is half way; 0 would belong to the epoch before the first.
        progress = {0.0: -1.0, -0.5: 4.0, -1.0: AFTER_CURRICULUM}[settings["lambda"]]
        batch = {"progress": torch.tensor(progress, dtype=torch.float64)}
        value = loss(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher, standardized=False), batch)
        value.backward()
        golden.check(case, value, student=student.grad, raw_temperature=loss.raw_temperature.raw.grad)
        expected = golden.values[f"{case}/temperature"]
        assert loss.metrics()["temperature"].item() == pytest.approx(expected, rel=1e-12)


def test_golden_instance(golden):
    for case, settings in golden.cases("ctkd_instance"):
        student, teacher = golden.inputs()
        temperature = golden.tensor("instance_temperature").clone().requires_grad_()
        prepare = standardize if settings["zscore"] else torch.clone
        value = ctkd_instance_loss(prepare(student), prepare(teacher), temperature)
        value.backward()
        golden.check(case, value, student=student.grad, temperature=temperature.grad)


def test_gradcheck_of_logits_and_temperatures():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    temperature = torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits, temperature: ctkd_instance_loss(logits, teacher, temperature),
        (student.clone().requires_grad_(), temperature),
    )


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_instance_loss_takes_one_temperature_a_sample(shape):
    with pytest.raises(ValueError, match=r"temperature of shape \(4,\)"):
        ctkd_instance_loss(torch.zeros(4, 10), torch.zeros(4, 10), torch.ones(shape))


@pytest.mark.parametrize(
    ("progress", "epoch"),
    [(0.0, 1), (0.99, 1), (1.0, 2), (4.2, 5), (8.99, 9), (9.0, 10), (19.5, 10), (25.0, 10)],
)
def test_curriculum_goes_from_0_to_minus_1_along_a_cosine(progress, epoch):
    expected = -(1 - (math.cos(math.pi * epoch / 10) + 1) / 2)
    assert curriculum_factor(torch.tensor(progress), 10.0).item() == pytest.approx(expected, abs=1e-6)


def test_without_curriculum_the_reversal_is_whole_at_once():
    assert curriculum_factor(torch.tensor(0.0), 0.0).item() == pytest.approx(-1)


def test_scale_gradient_keeps_the_value_exactly():
    value = torch.tensor([0.1, 1e6, -3.3], requires_grad=True)
    scaled = scale_gradient(value, torch.tensor(-0.3))
    assert torch.equal(scaled, value)
    scaled.sum().backward()
    torch.testing.assert_close(value.grad, torch.full((3,), -0.3))


@pytest.mark.parametrize("progress", [0.0, 4.0, AFTER_CURRICULUM])
@pytest.mark.parametrize("instance_wise", [False, True])
def test_the_temperature_learns_to_raise_the_loss(make_outputs, make_batch, instance_wise, progress):
    # In float64: early in the curriculum the loss rises by less than float32 can tell.
    student, teacher = (make_outputs(seed=seed, dtype=torch.float64) for seed in (1, 2))
    batch = make_batch(progress)
    loss = set_up(CTKDLoss(instance_wise), student, teacher).double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)
    before = loss(student, teacher, batch)
    before.backward()
    optimizer.step()
    assert loss(student, teacher, batch) > before


@pytest.mark.parametrize("instance_wise", [False, True])
def test_every_parameter_moves(make_outputs, make_batch, instance_wise):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    loss = set_up(CTKDLoss(instance_wise), student, teacher)
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    assert len(before) == (10 if instance_wise else 1)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(student, teacher, make_batch(0.0)).backward()
    optimizer.step()
    for name, parameter in loss.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"


def test_the_size_of_the_step_follows_the_curriculum(make_outputs, make_batch):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    gradients = []
    for progress in (0.0, 4.0, AFTER_CURRICULUM):
        loss = CTKDLoss()
        loss(student, teacher, make_batch(progress)).backward()
        gradients.append(loss.raw_temperature.raw.grad.item())
    assert gradients[0] / gradients[2] == pytest.approx((1 - math.cos(math.pi / 10)) / 2, rel=1e-4)
    assert gradients[1] / gradients[2] == pytest.approx(0.5, rel=1e-4)


def test_module_equals_function(make_outputs, make_batch):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(3.0)
    loss = CTKDLoss(start=2.0, end=6.0, weight=5.0)
    expected = kd_loss(student.logits, teacher.logits, 2 + 6 * torch.sigmoid(torch.tensor(1.0)))
    torch.testing.assert_close(loss(student, teacher, batch), expected)


def test_instance_module_equals_function_and_the_student_lowers_the_loss(make_outputs, make_batch):
    """The student's gradient is that at fixed temperatures: none comes, reversed, through the network."""
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(AFTER_CURRICULUM)
    loss = set_up(CTKDLoss(instance_wise=True), student, teacher)
    value = loss(student, teacher, batch)
    value.backward()
    with torch.no_grad():
        temperature = 1 + 20 * torch.sigmoid(loss.raw_temperature(student.logits, teacher.logits))
    logits = student.logits.detach().requires_grad_()
    expected = ctkd_instance_loss(logits, teacher.logits.detach(), temperature)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(student.logits.grad, logits.grad)
    assert temperature.std() > 1e-3, "each sample has its own temperature"


@pytest.mark.parametrize("instance_wise", [False, True])
def test_metrics_give_the_temperature_of_the_last_forward(make_outputs, make_batch, instance_wise):
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    loss = set_up(CTKDLoss(instance_wise), student, teacher)
    start = 1 + 20 * torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(loss.metrics(), {"temperature": start})
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    loss(student, teacher, make_batch(AFTER_CURRICULUM)).backward()
    optimizer.step()
    loss(student, teacher, make_batch(AFTER_CURRICULUM))
    temperature = loss.metrics()["temperature"]
    with torch.no_grad():
        raw = loss.raw_temperature(student.logits, teacher.logits)
    torch.testing.assert_close(temperature, (1 + 20 * torch.sigmoid(raw)).mean())
    assert temperature.ndim == 0 and not temperature.requires_grad
    assert (temperature - start).abs() > 1e-3


def test_what_is_learned_is_what_is_saved(make_outputs):
    loss = set_up(CTKDLoss(instance_wise=True), make_outputs(seed=1), make_outputs(seed=2))
    assert set(loss.state_dict()) == {name for name, _ in loss.named_parameters()}
    assert set(CTKDLoss().state_dict()) == {"raw_temperature.raw"}
