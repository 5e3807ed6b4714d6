"""Small networks and data sets that several test files use."""

import copy
import runpy
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hfkd import DistillationConfig
from hfkd.data import ImageDataset, NoAugmentation, WeakAugmentation
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def run_script(name: str, *arguments: str) -> None:
    """Do what `python scripts/name arguments` does, in this process: starting one takes longer than most scripts."""
    script = ROOT / "scripts" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"scripts/{name}", *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")


def aligned(model: nn.Module) -> nn.Module:
    """Copy a model whose weights `from_pretrained` left where the file has them.

    There they start at any byte, and the last bits of a product can depend on where: compare no other to the bit.
    """
    return copy.deepcopy(model)


def wave(shape: torch.Size | tuple[int, ...], frequency: float, phase: float = 0.0) -> Tensor:
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(steps * frequency + phase).reshape(shape)


def probe_weight(name: str, tensor: Tensor) -> Tensor:
    """The weights under which the golden logits were computed, a function of a tensor's name and shape."""
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor)
    s = wave(tensor.shape, 0.37, phase=zlib.crc32(name.encode()) % 1000 * 0.01)
    if tensor.ndim > 1:
        return s * (0.5 / tensor[0].numel()) ** 0.5
    return 1 + 0.1 * s if name.endswith(("weight", "running_var")) else 0.1 * s


class Plain(nn.Module):
    """A module that returns logits and knows nothing of any library; no BatchNorm, so a batch can be split."""

    def __init__(self, classes=10, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=4)
        self.fc = nn.Linear(width, classes)

    def forward(self, pixel_values):
        pixel_values = pixel_values.to(self.fc.weight.dtype)  # tests of exact equality run it in float64
        return self.fc(self.conv(pixel_values).relu().mean(dim=(2, 3)))


def images(count=16, classes=10, seed=0, augment=True, size=32):
    """Random images; class k is brighter the larger k, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 128, (count, 3, size, size), generator=generator)
    pixels = (noise + (labels * (127 // classes)).view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageDataset(
        pixels,
        labels,
        [f"class {index}" for index in range(classes)],
        transform=WeakAugmentation() if augment else NoAugmentation(),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        seed=seed,
    )


def config(output_dir="run", **changes):
    """Few steps of SGD on the CPU, silent, without checkpoints."""
    defaults = {
        "output_dir": str(output_dir),
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DistillationConfig(**(defaults | changes))


# Recipe of a short run of a small network on the digits.
DIGITS_RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "image_size": 16,
    "random_flip": False,
    "eval_split": "test[:20]",
    "per_device_train_batch_size": 16,
}


def train_logs(trainer):
    """The log entries of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# What results.json says of a run before anything is measured.
RESULTS = {
    "role": "student",
    "student": "cifar_resnet20",
    "teacher": "cifar_resnet56",
    "base_models": [],
    "parameters": 278_324,
    "teacher_parameters": 861_620,
    "losses": {"kd": {"temperature": 2.0, "weight": 9.0}},
    "logit_standardization": True,
    "ce_weight": 0.1,
    "dataset": {
        "name": "cifar100",
        "hub_id": "uoft-cs/cifar100",
        "eval_split": "test",
        "classes": 100,
        "train_images": 50_000,
    },
    "published_top1": 71.43,
    "exported": "best",
    "devices": "2 x cuda",
    "versions": {"python": "3.12.1", "hfkd": "0.1.0"},
    "git_commit": "0123abc",
}
