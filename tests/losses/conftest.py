"""Golden cases of the losses, and the stand-ins of model outputs and batches that their tests share."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent.parent / "golden"


class GoldenSet:
    """One set of inputs, with the reference's values and gradients for it."""

    def __init__(self, name, values, arrays):
        self.name, self.values, self.arrays = name, values, arrays

    def tensor(self, name):
        return torch.from_numpy(self.arrays[f"{self.name}/{name}"])

    def inputs(self):
        """Student and teacher logits, float64; the student's collect gradients."""
        return self.tensor("student").clone().requires_grad_(), self.tensor("teacher")

    def cases(self, method):
        """(case, settings) of a method: "kd/T=4/zscore=1" and {"T": 4.0, "zscore": 1.0}."""
        names = [name for name in self.values if name.startswith(f"{method}/")]
        assert names, f"no golden case of {method} in {self.name}"
        for name in names:
            settings = (part.split("=") for part in name.split("/") if "=" in part)
            yield name, {key: float(value) for key, value in settings}

    def check_loss(self, case, loss, standardized):
        """Check the module `loss` in a run with or without Z-scores, past every warm-up."""
        student, teacher = self.inputs()
        loss.logit_standardization = bool(standardized)
        batch = {"labels": self.tensor("labels"), "progress": torch.tensor(100.0)}
        value = loss(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher, standardized=False), batch)
        value.backward()
        self.check(case, value, student=student.grad)

    def check(self, case, value, **gradients):
        """value and gradients (by name in the npz) agree to 1e-9, gradients relative to the largest entry."""
        assert value.item() == pytest.approx(self.values[case], rel=1e-9, abs=0), case
        for name, gradient in gradients.items():
            expected = self.tensor(f"{case}/grad_{name}")
            error = (gradient.reshape(expected.shape) - expected).abs().max()
            assert error <= 1e-9 * expected.abs().max(), f"{case}: gradient of {name} is off by {error}"


@pytest.fixture(scope="session")
def golden_file():
    with np.load(GOLDEN / "logit_losses.npz") as arrays:
        arrays = dict(arrays)
    return json.loads((GOLDEN / "logit_losses.json").read_text()), arrays


@pytest.fixture(params=["cifar_b8", "sharp_teacher_b8", "imagenet_b4"])
def golden(request, golden_file):
    values, arrays = golden_file
    return GoldenSet(request.param, values[request.param], arrays)


@pytest.fixture(scope="session")
def new_logit_file():
    with np.load(GOLDEN / "new_logit_losses.npz") as arrays:
        arrays = dict(arrays)
    return json.loads((GOLDEN / "new_logit_losses.json").read_text()), arrays


@pytest.fixture(params=["logits_b8c10_a", "logits_b4c100_a", "extreme_b8c10", "faint_b4c100"])
def new_golden(request, new_logit_file):
    """The logit losses of 2021 to 2026: usual logits, logits in the hundreds, and logits near 0."""
    values, arrays = new_logit_file
    return GoldenSet(request.param, values[request.param], arrays)


class FeatureGolden:
    """The inputs of the feature losses, float64, with the reference's weights, values and gradients."""

    def __init__(self, values, arrays):
        self.values, self.arrays = values, arrays

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name])

    def inputs(self, *names):
        """Copies of inputs ("student_map_0", "student_pooled", ...) that collect gradients."""
        return [self.tensor(name).clone().requires_grad_() for name in names]

    def maps(self, role):
        """The three maps of the "student" (which collect gradients) or the "teacher"."""
        maps = [self.tensor(f"{role}_map_{number}").clone() for number in range(3)]
        return [one.requires_grad_() for one in maps] if role == "student" else maps

    def weights(self, case):
        """{name: tensor} of a case's learnable parts, under the reference's names."""
        prefix = f"{case}/weights/"
        return {name.removeprefix(prefix): self.tensor(name) for name in self.arrays if name.startswith(prefix)}

    def check(self, case, value, **inputs):
        """The value agrees to 1e-9, and so do the gradients of the inputs, relative to the largest entry.

        Runs the backward pass; `inputs` are by the names in the npz, as `inputs` and `maps` gave them.
        """
        assert value.item() == pytest.approx(self.values[case], rel=1e-9, abs=0), case
        gradients = torch.autograd.grad(value, list(inputs.values()))
        for name, gradient in zip(inputs, gradients, strict=True):
            expected = self.tensor(f"{case}/grad_{name}")
            error = (gradient - expected).abs().max()
            assert error <= 1e-9 * expected.abs().max(), f"{case}: gradient of {name} is off by {error}"


@pytest.fixture(scope="session")
def feature_golden():
    with np.load(GOLDEN / "feature_losses.npz") as arrays:
        arrays = dict(arrays)
    return FeatureGolden(json.loads((GOLDEN / "feature_losses.json").read_text()), arrays)


@pytest.fixture(scope="session")
def new_feature_golden():
    """The feature losses of 2017 to 2026."""
    with np.load(GOLDEN / "new_feature_losses.npz") as arrays:
        arrays = dict(arrays)
    ((name, values),) = json.loads((GOLDEN / "new_feature_losses.json").read_text()).items()
    return GoldenSet(name, values, arrays)


@pytest.fixture
def make_outputs():
    """Outputs of a random network: leaf logits, with a strong view."""

    def make(batch_size=6, classes=10, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def view():
            logits = 3 * torch.randn(batch_size, classes, generator=generator, dtype=torch.float64)
            return SimpleNamespace(logits=logits.to(dtype).requires_grad_(), standardized=False, strong=None)

        weak = view()
        weak.strong = view()
        return weak

    return make


@pytest.fixture
def make_batch():
    def make(progress=0.0, batch_size=6, classes=10):
        return {"labels": torch.arange(batch_size) * 7 % classes, "progress": torch.tensor(progress)}

    return make
