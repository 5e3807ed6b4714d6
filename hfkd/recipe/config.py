"""`DistillationConfig`: transformers' `TrainingArguments` and the keys of distillation, with their checks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed import DistNetworkError, DistStoreError
from transformers import TrainingArguments

from ..errors import HfkdError, RendezvousError, did_you_mean
from .checks import check_label_smoothing, check_training


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` with the keys of distillation, and other defaults where those of transformers cost speed.

    Changed defaults: no gradient clipping (`max_grad_norm` 0), no NaN filter (it waits for the device at every
    step), no removal of columns (a user's own loss may read them), and no search for unused parameters under DDP. The
    best checkpoint is the one with the highest top-1.

    Raises:
        HfkdError: for a setting that hfkd does not support.
        RendezvousError: if other processes of the run do not join within `ddp_timeout`.
    """

    _argument_group_name = "distillation"
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "losses"]

    losses: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Distillation losses: a mapping from each method to its parameters, which may include 'weight'. "
            "On the command line: --losses.METHOD.PARAMETER VALUE, or the mapping as YAML. A method is one of those "
            "below, of an installed package (entry points hfkd.losses), or module:Class."
        },
    )
    logit_standardization: bool = field(
        default=False,
        metadata={"help": "Z-score the logits of teacher and student before every logit loss."},
    )
    ce_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy with the labels; 0 without any."}
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the cross-entropy: a number for each, in the order of the labels, or "
            "'balanced' for the inverse of their shares of the training images."
        },
    )
    decay_all_parameters: bool = field(
        default=False,
        metadata={
            "help": "Apply weight decay to every parameter, as the CIFAR protocols do; otherwise only to matrices and "
            "convolution kernels that the model does not exempt."
        },
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Glob patterns of the student's modules or parameters that are not trained, e.g. patch_embed "
            "'blocks.[0-5].*'. BatchNorm statistics within do not move."
        },
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "timm's layer-wise learning rates: each layer of the student has this share of the next one's, and "
            "the classifier learning_rate."
        },
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={"help": "Epochs after which lr_gamma multiplies the learning rate; replaces lr_scheduler_type."},
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of the learning rate at lr_milestones."})
    mixup: float = field(
        default=0.0,
        metadata={"help": "Alpha of mixup (Zhang et al., 2018); 0: off. With cutmix, for half the batches."},
    )
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix (Yun et al., 2019); 0: off."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay per step of the moving average of the student, which is then evaluated and exported."},
    )
    quantize: str = field(
        default="none",
        metadata={
            "help": "int8: train with the rounding of an int8 file, from a trained student. On the command line "
            "without num_train_epochs, max_steps or learning_rate, these are a tenth of the recipe's.",
            "choices": ["none", "int8"],
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End training when metric_for_best_model has not improved for this many evaluations; by default it "
            "goes on to the end."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better the metric must get to count as improved."}
    )
    probe_every: int | None = field(
        default=None,
        metadata={
            "help": "Epochs between two measurements of eval_knn: top-1 of 20 weighted nearest neighbours of each "
            "evaluation image among the others, in the student's features; metric_for_best_model may be knn."
        },
    )
    shard_teacher: bool = field(
        default=False, metadata={"help": "With FSDP: shard the teacher over the processes, like the student."}
    )
    keep_teacher_evaluation: bool = field(
        default=True,
        metadata={"help": "Keep the teacher's classes for the evaluation images beside the cache of datasets."},
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Keep student and teacher in the channels_last memory format."}
    )
    allow_recipe_change: bool = field(
        default=False,
        metadata={"help": "Resume even if the recipe has changed since the checkpoint; the differences are printed."},
    )
    stop_when_diverged: bool = field(
        default=True,
        metadata={"help": "End training after the epoch in which losses, weights or logits are no longer finite."},
    )
    published_top1: float | None = field(
        default=None,
        metadata={"help": "Top-1 in percent that the paper reports for this recipe; copied to results.json."},
    )

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the run. By default runs/ and the recipe's name; trainer_output without a recipe."
        },
    )
    report_to: list[str] | str = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "Trackers that log the run: tensorboard (its files lie in <output_dir>/tensorboard), trackio, "
            "wandb, any other that transformers knows, 'all' that are installed, or 'none'."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: resume from the last checkpoint of the run; or a checkpoint's folder."},
    )
    torch_compile: bool | str = field(  # type: ignore[assignment]  # Trainer's: only bool
        default=False,
        metadata={
            "help": "Compile student, losses and teacher: true, false, or auto. auto measures 20 eager and 20 compiled "
            "steps at the beginning of the training, and goes on with what ends it sooner."
        },
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient norm to this; 0: no clipping."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN losses out of the log; makes every step wait for the device."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop the columns of a data set that hfkd does not read."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel."}
    )
    metric_for_best_model: str | None = field(
        default="top1",
        metadata={
            "help": "Evaluation metric that decides which checkpoint is the best; where the evaluation images have no "
            "labels, the loss."
        },
    )

    def __post_init__(self):
        for name in ("class_weights", "freeze"):
            if isinstance(getattr(self, name), str):  # from code
                setattr(self, name, [getattr(self, name)])
        # Keys that the recipe gives, for defaults that depend on the data; None for a config made from code.
        self.written: frozenset[str] | None = None
        check_training(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise TrainingArguments refuses bf16, which CPUs support
        elif self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}  # otherwise the copy of every batch waits for the device
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            # transformers 5.24 renamed both keys. It warns of the old names, and overwrites them with the values of the
            # new ones. A recipe for earlier versions as well can only use the old names.
            renamed = name.replace("gradient", "activation")
            if hasattr(self, renamed) and getattr(self, renamed) is None:
                setattr(self, renamed, getattr(self, name))
        try:
            with joining_processes(self):
                super().__post_init__()
        except HfkdError:
            raise
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError, OverflowError) as error:
            raise HfkdError(f"transformers refuses these settings: {error}") from error
        check_trackers(self.report_to)
        self.losses = self.losses or {}
        if not isinstance(self.losses, dict):
            raise HfkdError(
                f"losses must map method names to their parameters, e.g. {{'kd': {{'temperature': 4.0}}}}; "
                f"got {self.losses!r}."
            )
        if self.fp16 and self.use_cpu:
            raise HfkdError("fp16 needs an accelerator. On a CPU, set bf16 or neither.")
        check_label_smoothing(self.label_smoothing_factor, self.losses)
        if self.mixes and (self.per_device_train_batch_size % 2 or not self.dataloader_drop_last):
            raise HfkdError(
                "mixup and cutmix pair the images of a batch, so every batch must be even: set dataloader_drop_last: "
                f"true and an even per_device_train_batch_size (it is {self.per_device_train_batch_size})."
            )
        if self.lr_milestones and self.get_warmup_steps(1_000):
            raise HfkdError("lr_milestones has no warm-up: leave warmup_steps at 0 or use lr_scheduler_type.")

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0


def check_trackers(names: list[str]) -> None:
    """Check that every tracker can be used, before networks and images are loaded. Trainer checks it only afterwards.

    Raises:
        HfkdError: for a tracker that transformers does not know, or whose package is not installed.
    """
    if not names:
        return
    # Imported here, because this imports transformers' modelling code, which takes seconds.
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            valid = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            raise HfkdError(f"report_to: there is no tracker '{name}'.{valid}; 'all' that are installed, or 'none'.")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            package = name.replace("_", "-")
            raise HfkdError(
                f"report_to: '{name}' cannot be used here; `pip install {package}` may help ({error})"
            ) from error


@contextlib.contextmanager
def joining_processes(args: DistillationConfig) -> Iterator[None]:
    """Raise a readable error if processes do not join while `TrainingArguments` waits for them.

    Raises:
        RendezvousError: if some are missing after `ddp_timeout` seconds.
    """
    try:
        if args.use_cpu:  # on CPUs TrainingArguments ignores the time-out
            PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))
        yield
    except (DistNetworkError, DistStoreError) as error:
        here = {name: os.environ.get(name, "not set") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        raise RendezvousError(
            f"Process {here['RANK']} of {here['WORLD_SIZE']} waited for the others at {here['MASTER_ADDR']}:"
            f"{here['MASTER_PORT']} for {args.ddp_timeout} s ({error}). Check that each machine runs the command "
            "with the same number of processes and can reach that address. Wait longer with --ddp_timeout SECONDS."
        ) from error
