"""A training step never waits for the device, nor leaves anything on the host: what it logs is read back later."""

from unittest import mock

import pytest
import torch
from helpers import Plain, config, images
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hfkd import DistillationTrainer, load_student
from hfkd.data.source import ImageSource
from hfkd.losses import LOSSES, DistillationLoss

# On a GPU that tests may use (HFKD_TEST_GPU) torch itself objects to whatever waits; elsewhere `Waits` looks out.
CUDA = torch.cuda.is_available()
# The result of such an operation, or its shape, is a number that Python needs: PyTorch says so in these tags.
READ_BACK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
MASKS = {torch.bool, torch.uint8}
# Methods that leave no trace among the operations of a CPU tensor.
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
FROM_HOST = {torch.tensor, torch.as_tensor}
STEPS = 3
LOSS_ARGUMENTS = {
    "locality_guidance": {"student_layers": [1, 2], "teacher_layers": [1, 2]},
    "crd": {"negatives": 16},
    "semckd": {"batch_size": 8},
    "ofd": {
        "student_layers": ["layer3.0.act2:input"],
        "teacher_layers": ["layer3.0.act2:input"],
        "teacher_norms": ["layer3.0.bn2"],
    },
}


class Waits(TorchDispatchMode):
    """Lists the operations within it whose result a host would wait for, were the tensors on another device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._methods = _Methods(self.found)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in INDEXING:  # by numbers it waits for nothing; a mask's True values are counted first
            waits = any(isinstance(leaf, Tensor) and leaf.dtype in MASKS for leaf in tree_leaves(args[1]))
        else:
            waits = not READ_BACK.isdisjoint(function.tags) or function is torch.ops.aten._linalg_check_errors.default
        # The epoch, which a data set shares with its DataLoader workers, is the host's on every machine.
        if waits and not args[0].is_shared():
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """The part of `Waits` that sees calls, not operations."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # Numbers that are put on a device straight from Python are copied there while Python waits.
        if function in TO_HOST or function in FROM_HOST and (kwargs or {}).get("device") is not None:
            self._found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Watch(TrainerCallback):
    """From the first step's beginning to the end of the last, batches between them included.

    What comes before is no part of a step: an epoch begins with the sampler's `randperm(...).tolist()`, numbers that
    never were on a device. What comes after is the log, the one place that waits.
    """

    def __init__(self):
        self.waits = Waits()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            return
        if CUDA:
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.waits.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            return
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
        else:
            self.waits.__exit__(None, None, None)


def networks_for(losses):
    """A student, and as many teachers as the losses need."""
    several = any(name in LOSSES and LOSSES[name].reads_members for name in losses)
    student, *teachers = [load_student("cifar_resnet8", num_classes=10) for _ in range(3 if several else 2)]
    return student, teachers


def watched_steps(losses, **changes):
    """What a host waits for during whole steps of `train()`; on CUDA torch raises an error instead."""
    networks = networks_for(losses)
    # The epoch is longer than the run: its end is where the sampler looks whether there are more images.
    args = config(max_steps=STEPS, logging_strategy="steps", logging_steps=STEPS, use_cpu=not CUDA, **changes)
    trainer = DistillationTrainer(*networks, args, train_dataset=images(80), losses=losses)
    watch = Watch()
    trainer.add_callback(watch)  # the last one: after the moving average has followed
    try:
        trainer.train()
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == STEPS
    return watch.waits.found


class Curious(DistillationLoss):
    """Looks at a value of the batch in every step, as a loss must not."""

    def forward(self, student, teacher, batch):
        return student.logits.mean() * (1.0 if student.logits.mean() > 0 else 2.0)


def test_a_loss_that_waits_is_found():
    if CUDA:
        with pytest.raises(RuntimeError, match="synchroniz"):
            watched_steps({"curious": Curious()})
    else:
        assert watched_steps({"curious": Curious()}) == ["aten._local_scalar_dense.default"] * STEPS


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda values: values.max().item(), True),
        (lambda values: bool(values[0] > 0), True),
        (lambda values: torch.equal(values, values), True),
        (lambda values: values.nonzero(), True),
        (lambda values: values[values > 0], True),
        (lambda values: values.index_put_((values > 0,), values[0]), True),
        (lambda values: values.unique(), True),
        (lambda values: values.tolist(), True),
        (lambda values: values.numpy(), True),
        (lambda values: values.cpu(), True),
        (lambda values: torch.tensor([1.0], device=values.device), True),
        (lambda values: torch.linalg.inv(values.outer(values) + torch.eye(3)), True),
        (lambda values: values[torch.tensor([2, 0])], False),
        (lambda values: values[1:], False),
        (lambda values: torch.where(values > 0, values, 0).sum(), False),
        (lambda values: values.masked_fill(values > 0, 0), False),
        (lambda values: torch.full((), 1.0, device=values.device), False),
    ],
)
def test_what_waits_is_told_from_what_does_not(call, waits):
    values = torch.arange(3.0)
    with Waits() as watching:
        call(values)
    assert bool(watching.found) == waits


@pytest.mark.parametrize("standardized", [False, True], ids=["plain", "zscore"])
@pytest.mark.parametrize("method", LOSSES)
def test_no_method_waits_for_the_device(method, standardized):
    losses = {method: LOSS_ARGUMENTS.get(method, {})}
    assert watched_steps(losses, logit_standardization=standardized) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.8, "cutmix": 1.0, "dataloader_drop_last": True},
        {"ema_decay": 0.9, "gradient_accumulation_steps": 2},
        {"max_grad_norm": 1.0, "bf16": True, "lr_milestones": [0.1]},
        {"optim": "adamw_torch_fused", "optim_args": None, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_setting_waits_for_the_device(changes):
    assert watched_steps({"kd": {}}, **changes) == []


class Lookups(TrainerCallback):
    """The packages that are looked for within steps, each time that one is."""

    def __init__(self):
        self.names: list[str] = []
        self._patch = mock.patch("importlib.util.find_spec", lambda name, *_: self.names.append(name))

    def on_step_begin(self, args, state, control, **kwargs):
        self._patch.start()

    def on_step_end(self, args, state, control, **kwargs):
        self._patch.stop()


def test_a_package_is_looked_for_once_at_most():
    trainer = DistillationTrainer(Plain(), None, config(max_steps=2), train_dataset=images(), losses={})
    lookups = Lookups()
    trainer.add_callback(lookups)
    trainer.train()
    assert len(lookups.names) <= 1, "accelerate asks twice a step for lomo_optim"


# ---- A device that this machine does not have ------------------------------------------------------------------------


def move(mode, module, device):
    """`module.to(device)`, which fake parameters do not allow: all that it knows as its own."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            own.update({name: mode.from_tensor(value).to(device) for name, value in own.items() if value is not None})


def step_elsewhere(losses, monkeypatch, **changes):
    """Where a batch and its loss are, gone through as on a GPU, in shapes and devices without numbers.

    Operands on two devices are an error there, as is a number that Python asks for.
    """
    monkeypatch.setattr(ImageSource, "epoch", 0)  # the host's own, shared with its DataLoader workers
    networks = networks_for(losses)
    data = images(80)
    trainer = DistillationTrainer(*networks, config(**changes), train_dataset=data, losses=losses)
    device, rows = torch.device("cuda"), list(range(8))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        teachers = [part for one in trainer.teacher.members for part in (one.model, one._classifier)]
        for module in (trainer.distiller, *teachers):
            if module is not None:
                move(mode, module, device)
        data.to(device)
        trainer.distiller.train()
        batch = data.__getitems__(rows)
        return {value.device.type for value in (*batch.values(), trainer.compute_loss(trainer.distiller, batch))}


class Forgotten(DistillationLoss):
    """Its tensor is no buffer, so it stays on the host."""

    def __init__(self):
        super().__init__(weight=1.0)
        self.scale = torch.ones(10)

    def forward(self, student, teacher, batch):
        return (student.logits * self.scale).mean()


def test_what_stays_on_the_host_is_found(monkeypatch):
    with pytest.raises(RuntimeError, match="on the same device"):
        step_elsewhere({"forgotten": Forgotten()}, monkeypatch)
    with pytest.raises(DataDependentOutputException):
        step_elsewhere({"curious": Curious()}, monkeypatch)


@pytest.mark.parametrize("standardized", [False, True], ids=["plain", "zscore"])
@pytest.mark.parametrize("method", LOSSES)
def test_all_of_a_method_is_on_the_device(method, standardized, monkeypatch):
    losses = {method: LOSS_ARGUMENTS.get(method, {})}
    assert step_elsewhere(losses, monkeypatch, logit_standardization=standardized) == {"cuda"}


def test_mixed_images_are_on_the_device(monkeypatch):
    assert step_elsewhere({"kd": {}}, monkeypatch, mixup=0.8, cutmix=1.0, dataloader_drop_last=True) == {"cuda"}
