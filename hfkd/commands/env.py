"""`hfkd env`: versions, devices and settings, for a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from ..errors import HfkdError
from ..runs.folder import environment

USAGE = "hfkd env"
EXTRAS = ("optuna", "onnx", "onnxruntime", "deepspeed", "tensorboard", "trackio", "wandb")
# Variables that change a run. None of them is secret.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def env(argv: list[str] | None = None) -> None:
    """Print what a bug report needs; it takes no arguments.

    Raises:
        HfkdError: for an argument.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\nPrint versions, devices, precisions and threads, for a bug report.")
        return
    if argv:
        raise HfkdError(f"env takes no arguments, got '{argv[0]}'. Usage: {USAGE}")
    facts = environment()
    lines = {"platform": platform.platform(), **facts["versions"], **_extras(EXTRAS)}
    lines |= {"commit of hfkd": facts["git_commit"] or "installed without git"}
    lines |= _devices() | {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, lines))
    print("\n".join(f"{name:{width}}  {text}" for name, text in lines.items()))


def _extras(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of optional libraries, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, str]:
    """Return the devices with their precisions, and the threads of the CPU."""
    import torch  # `--help` needs it not

    lines = {"CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, float32 and bf16"}
    lines["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "none"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        precisions = "float32, fp16 and bf16" if torch.cuda.is_bf16_supported() else "float32 and fp16, no bf16"
        lines[f"GPU {index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {precisions}"
    if torch.backends.mps.is_available():
        lines["MPS"] = "available"
    return lines
