"""Every key that a recipe may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments


@dataclass
class ModelArguments:
    """Which network learns and which one teaches."""

    student_name_or_path: str = field(
        metadata={"help": "A timm architecture, a folder written by save_pretrained, or a Hub id."},
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Like student_name_or_path. Without a teacher the student learns from the labels alone."},
    )
    teacher_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Weights for a timm architecture named in teacher_name_or_path: a .safetensors file or a "
            "published .pth file holding {'model': state_dict}."
        },
    )


@dataclass
class DataArguments:
    """Which images, and how they are prepared."""

    dataset_name: str = field(
        metadata={"help": "'digits', a Hub id, a local folder of Parquet files or a local imagefolder."}
    )
    train_split: str = field(default="train", metadata={"help": "Name of the training split."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Name of the evaluation split; by default test, validation, val or valid, the first found."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; by default found from the features."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels; by default found from the features."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square input in pixels; by default the student's own."}
    )
    random_flip: bool = field(
        default=True, metadata={"help": "Mirror half of the training images; wrong for digits and letters."}
    )

    def __post_init__(self):
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be a number of pixels, got {self.image_size}.")


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` plus what distillation needs; defaults that cost speed or fidelity are changed.

    Changed defaults: no gradient clipping (`max_grad_norm` 0), no NaN filter (it waits for the device at every
    step), no column removal (it would drop a second view), no search for unused parameters under DDP, and the
    best checkpoint is the one with the highest top-1.

    Raises:
        ValueError: for a setting that hfkd does not support.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "losses"]

    losses: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Distillation losses: a mapping from method to its parameters, each of which may hold 'weight'. "
            "On the command line --losses.METHOD.PARAMETER VALUE."
        },
    )
    logit_standardization: bool = field(
        default=False, metadata={"help": "Z-score the logits of teacher and student before every logit loss."}
    )
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    decay_all_parameters: bool = field(
        default=False,
        metadata={
            "help": "Weight decay on every parameter, as the CIFAR protocols do; otherwise only on matrices and "
            "convolution kernels that the model does not exempt."
        },
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={"help": "Epochs after which lr_gamma multiplies the learning rate; replaces lr_scheduler_type."},
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of lr_milestones."})
    channels_last: bool = field(
        default=True, metadata={"help": "Keep student and teacher in the channels_last memory format."}
    )
    published_top1: float | None = field(
        default=None,
        metadata={"help": "Top-1 in percent that the paper reports for this recipe; copied to results.json."},
    )

    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient norm to this; 0: no clipping."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN losses out of the log; waits for the device at every step."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop batch entries that the student's forward does not take."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel."}
    )
    metric_for_best_model: str | None = field(
        default="top1", metadata={"help": "Evaluation metric that says which checkpoint is the best."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else TrainingArguments refuses bf16, which CPUs have too
        super().__post_init__()
        self.losses = self.losses or {}
        if not isinstance(self.losses, dict):
            raise ValueError(
                f"losses must map method names to their parameters, e.g. {{'kd': {{'temperature': 4.0}}}}; "
                f"got {self.losses!r}."
            )
        if self.fp16 and self.use_cpu:
            raise ValueError("fp16 needs an accelerator; on a CPU set bf16 instead, or neither.")
        if self.ce_weight < 0:
            raise ValueError(f"ce_weight must not be negative, got {self.ce_weight}.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: the teacher's distribution "
                "takes its place. Leave it at 0."
            )
        if self.lr_milestones and self.get_warmup_steps(1_000):
            raise ValueError("lr_milestones has no warm-up: leave warmup_steps at 0 or use lr_scheduler_type.")
