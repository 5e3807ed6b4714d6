"""What holds for every logit loss, with and without standardization."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfkd.losses import build_losses

CONFIGURATIONS = {
    "kd": {"kd": {}},
    "dkd": {"dkd": {}},
    "mlkd": {"mlkd": {}},
    "ctkd": {"ctkd": {}},
    "ctkd_instance": {"ctkd": {"instance_wise": True}},
    "dist": {"dist": {}},
    "ttm": {"ttm": {}},
    "wttm": {"wttm": {}},
    "nkd": {"nkd": {}},
    "abkd": {"abkd": {}},
    "wsld": {"wsld": {}},
    "hard": {"hard": {}},
    "rld": {"rld": {}},
    "skd": {"skd": {}},
    "crld": {"crld": {"weak_threshold": 0.0, "strong_threshold": 0.0}},  # else unsure images have no gradient
}
BOUNDED = {"dist", "abkd"}  # correlations, and at its default exponents a distance of distributions
# A student equal to its teacher still learns from them: the target is not the teacher's output for the same view.
OTHER_TARGETS = {"ttm", "wttm", "nkd", "wsld", "hard", "rld", "crld"}


@pytest.fixture(params=CONFIGURATIONS)
def method(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "zscore"])
def zscore(request):
    return request.param


def build(method, zscore, student, teacher):
    (loss,) = build_losses(CONFIGURATIONS[method], logit_standardization=zscore).values()
    torch.manual_seed(0)
    loss.setup(student, teacher)
    return loss


def total(terms):
    return sum(terms.values()) if isinstance(terms, dict) else terms


def gradients(outputs):
    views = [outputs.logits, outputs.strong.logits]
    return [logits.grad for logits in views if logits.grad is not None]


def extreme_logits(kind, classes=20):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, classes, generator=generator)
    signs = torch.where(noise > 0, 1.0, -1.0)
    hot = torch.zeros(4, classes)
    hot[torch.arange(4), torch.tensor([0, 3, 3, 19])] = 1e4
    return {
        "all large": 1e4 + noise,
        "all negative": -1e4 + noise,
        "mixed sign": 1e4 * signs,
        "spread": 3e3 * noise,
        "one hot": hot,
        "one cold": -hot,
        "zero": torch.zeros(4, classes),
        "constant": torch.full((4, classes), -1e4),
        "nearly constant": 1e-12 * noise,
    }[kind]


EXTREMES = [
    "all large",
    "all negative",
    "mixed sign",
    "spread",
    "one hot",
    "one cold",
    "zero",
    "constant",
    "nearly constant",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_value_and_gradients_stay_finite(method, zscore, dtype, make_batch):
    def outputs(kind):
        views = [extreme_logits(kind).to(dtype).requires_grad_() for _ in range(2)]
        strong = SimpleNamespace(logits=views[1], strong=None)
        return SimpleNamespace(logits=views[0], standardized=False, strong=strong)

    for student_kind in EXTREMES:
        for teacher_kind in EXTREMES:
            student, teacher = outputs(student_kind), outputs(teacher_kind)
            loss = build(method, zscore, student, teacher)
            value = total(loss(student, teacher, make_batch(3.0, batch_size=4, classes=20)))
            value.backward()
            leaves = [value, *gradients(student), *(parameter.grad for parameter in loss.parameters())]
            assert all(leaf.isfinite().all() for leaf in leaves), f"{student_kind} -> {teacher_kind}"


def test_large_logits_are_still_told_apart(method, make_batch):
    """Masks and additive constants vanish beside logits of 1e4: the loss must still see the student."""
    values = []
    for student_kind in ("one hot", "one cold", "mixed sign"):
        student, teacher = (
            SimpleNamespace(logits=logits, strong=SimpleNamespace(logits=logits, strong=None))
            for logits in (extreme_logits(student_kind), extreme_logits("one hot"))
        )
        loss = build(method, False, student, teacher)
        labels = {"labels": torch.tensor([0, 3, 3, 19]), "progress": torch.tensor(30.0)}
        values.append(total(loss(student, teacher, labels)).item())
    same, opposite, mixed = values
    assert 0 <= same < (10 if method in OTHER_TARGETS else 1)
    assert (opposite > 2 and mixed > 1) if method in BOUNDED else (opposite > 1e3 and mixed > 1e2)


@pytest.mark.parametrize("method", [name for name in CONFIGURATIONS if name not in OTHER_TARGETS], indirect=True)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(method, zscore, make_outputs, make_batch):
    student, teacher = make_outputs(dtype=torch.float64), make_outputs(dtype=torch.float64)
    loss = build(method, zscore, student, teacher)
    value = total(loss(student, teacher, make_batch(3.0)))
    value.backward()
    # Instance-wise, 1e-7 is added to each of the teacher's probabilities; DIST adds 1e-8 to
    # products of norms, of which those of rare classes are small.
    slack = {"ctkd_instance": 1e-3, "dist": 1e-4}.get(method, 1e-12)
    assert value.abs() < slack
    assert all(gradient.abs().max() < slack for gradient in gradients(student))


def test_standardization_hides_shift_and_positive_scale_of_every_row(method, make_outputs, make_batch):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(3.0)
    loss = build(method, True, student, teacher)
    expected = loss(student, teacher, batch)
    with torch.no_grad():
        for outputs in (student, teacher, student.strong, teacher.strong):
            outputs.logits.mul_(torch.rand(6, 1) * 5 + 0.5).add_(torch.randn(6, 1))
    actual = loss(student, teacher, batch)
    if method == "mlkd":
        expected, actual = expected["kd"], actual["kd"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    plain = build(method, False, student, teacher)(student, teacher, batch)
    assert not torch.allclose(total(plain), total(expected), rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_terms_are_float32_at_least(method, zscore, dtype, make_outputs, make_batch):
    student, teacher = make_outputs(seed=1, dtype=dtype), make_outputs(seed=2, dtype=dtype)
    loss = build(method, zscore, student, teacher)
    value = total(loss(student, teacher, make_batch(3.0)))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for outputs in (student, teacher, student.strong, teacher.strong):
        outputs.logits = outputs.logits.detach().double()
    wide = total(loss(student, teacher, make_batch(3.0)))
    assert value.item() == pytest.approx(wide.item(), rel=1e-4)


def test_autocast_changes_nothing(method, zscore, make_outputs, make_batch):
    student, teacher = make_outputs(seed=1, dtype=torch.bfloat16), make_outputs(seed=2, dtype=torch.bfloat16)
    loss = build(method, zscore, student, teacher)
    expected = loss(student, teacher, make_batch(3.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher, make_batch(3.0)), expected, rtol=0, atol=0)


def test_a_batch_of_one(method, zscore, make_outputs, make_batch):
    student, teacher = make_outputs(1, seed=1), make_outputs(1, seed=2)
    loss = build(method, zscore, student, teacher)
    value = total(loss(student, teacher, make_batch(3.0, batch_size=1)))
    value.backward()
    assert value > 0 and all(gradient.abs().max() > 0 for gradient in gradients(student))


def test_teacher_and_student_must_have_the_same_classes(method, zscore, make_outputs, make_batch):
    student, teacher = make_outputs(classes=10), make_outputs(classes=10)
    loss = build(method, zscore, student, teacher)
    with pytest.raises(ValueError, match=r"\(6, 10\) and \(6, 12\)"):
        loss(student, make_outputs(classes=12), make_batch(3.0))


class NoWaiting(TorchDispatchMode):
    """Refuses to hand a tensor's value to Python, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was read"
        return function(*arguments, **(keywords or {}))


def test_never_reads_a_value(method, zscore, make_outputs, make_batch):
    student, teacher, batch = make_outputs(seed=1), make_outputs(seed=2), make_batch(3.0)
    loss = build(method, zscore, student, teacher)
    with NoWaiting():
        total(loss(student, teacher, batch)).backward()
        loss.metrics()
    with NoWaiting(), pytest.raises(AssertionError, match="was read"):
        batch["progress"].item()


def test_compiles_to_one_graph_for_the_whole_run(method, make_outputs, make_batch):
    """fullgraph refuses what it cannot trace, and new progress must not compile anew."""
    torch._dynamo.reset()
    student, teacher = make_outputs(seed=1), make_outputs(seed=2)
    loss = build(method, True, student, teacher)
    compiled = torch.compile(lambda *arguments: loss(*arguments), fullgraph=True, backend="aot_eager")
    for progress in (0.0, 7.5, 30.0):
        batch = make_batch(progress)
        with torch._dynamo.config.patch(error_on_recompile=progress > 0):
            actual = compiled(student, teacher, batch)
        total(actual).backward()
        compiled_gradients = [gradient.clone() for gradient in gradients(student)]
        clear(student)
        expected = loss(student, teacher, batch)
        total(expected).backward()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(compiled_gradients, gradients(student))
        clear(student)


def clear(outputs):
    outputs.logits.grad = outputs.strong.logits.grad = None
