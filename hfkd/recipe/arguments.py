"""Argument classes of networks and images: every such key of a recipe, with its default, help and checks."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import HfkdError
from .checks import check_blocks, check_names, check_prompts, check_ranges, check_unlabelled
from .keys import AUTO_CACHE, PATH_KEYS, RECIPE_KEYS
from .yaml_file import parse_yaml

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # names of transformers


@dataclass
class ModelArguments:
    """Keys of the student and the teacher."""

    _argument_group_name = "model"  # in `--help`

    student_name_or_path: str = field(
        metadata={
            "help": "A timm architecture, a folder written by save_pretrained, or a Hub id. Short: --student.",
            "aliases": ["--student"],
        },
    )
    teacher_name_or_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Like student_name_or_path; several names form an ensemble. Without a teacher the student learns "
            "from the labels alone. Short: --teacher.",
            "aliases": ["--teacher"],
        },
    )
    teacher_checkpoint: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights for the timm architectures named in teacher_name_or_path, one each: a .safetensors file "
            "or a published .pth file holding {'model': state_dict}."
        },
    )
    teacher_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels at which the network in teacher_checkpoint was trained; by default the "
            "architecture's own. The student's images are resized to it."
        },
    )
    teacher_image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mean (RGB, images in [0, 1]) with which the network in teacher_checkpoint was trained; by default "
            "the architecture's own."
        },
    )
    teacher_image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation, like teacher_image_mean."}
    )
    teacher_recipe: str | None = field(
        default=None,
        metadata={
            "help": "Recipe that trains the teacher first, on the same images, if teacher_name_or_path is a run's "
            "folder that does not exist."
        },
    )
    train_missing_teacher: bool = field(
        default=True,
        metadata={"help": "Train a missing teacher by its teacher_recipe; otherwise it is an error."},
    )
    teacher_class_indices: list[int] | None = field(
        default=None,
        metadata={
            "help": "Index of the teacher's class for each class of the student, if the teacher has more classes or "
            "another order; by default they are matched by name."
        },
    )
    teacher_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Templates such as 'a photo of a {}', with which CLIP or SigLIP classifies the data set's classes "
            "by their names; the features of several are averaged. Without them it teaches its features."
        },
    )
    teacher_device_map: str | None = field(
        default=None,
        metadata={
            "help": "transformers' device_map, for a teacher that does not fit on one device: 'auto', or a mapping "
            "from module to device. Only for a teacher from a folder or the Hub, and one process."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "'auto' keeps what the teacher says in training beside the cache of datasets, where later runs on "
            "the same batches read it. Or a folder written by `hfkd cache-teacher`: its logits and features are read, "
            "no teacher is loaded; teacher_name_or_path, if set, must name the teacher of the cache."
        },
    )
    teacher_cache_limit: float = field(
        default=8.0,
        metadata={
            "help": "GiB that the kept outputs of all teachers may take (teacher_cache: auto; search, choose and "
            "reproduce keep them by themselves); 0 keeps none."
        },
    )
    teacher_blocks: dict[str, list[int]] | str | None = field(
        default=None,
        metadata={
            "help": "Start the student from the teacher's weights, if it has the same layers and fewer blocks: the "
            "index of the teacher's block for each of the student's, such as {blocks: [0, 2, 4, 6, 8, 10]}."
        },
    )
    pretrained: bool = field(
        default=False,
        metadata={
            "help": "Start a student that is a timm architecture without a tag from timm's default weights for it; a "
            "tag, a folder or a Hub id names weights itself."
        },
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={"help": "Stochastic depth of the student, for a timm architecture that supports it."},
    )
    patch_size: int | None = field(
        default=None,
        metadata={"help": "Side of the student's patches in pixels, for a timm ViT; by default its own."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with a student or teacher from a folder or the Hub. Read it first."},
    )

    def __post_init__(self):
        check_ranges(self)
        check_names(self, PATH_KEYS)
        if isinstance(self.teacher_device_map, str):
            self.teacher_device_map = parse_device_map(self.teacher_device_map)
        # Callers from code may pass one name without a list.
        if isinstance(self.teacher_name_or_path, str):
            self.teacher_name_or_path = [self.teacher_name_or_path]
        if isinstance(self.teacher_checkpoint, str):
            self.teacher_checkpoint = [self.teacher_checkpoint]
        teachers, checkpoints = self.teacher_name_or_path or [], self.teacher_checkpoint or []
        if checkpoints and len(checkpoints) != len(teachers):
            raise HfkdError(
                f"teacher_checkpoint names {len(checkpoints)} files and teacher_name_or_path {len(teachers)} teachers: "
                "give one file for each."
            )
        if isinstance(self.teacher_blocks, str):
            self.teacher_blocks = parse_yaml(self.teacher_blocks, "teacher_blocks")
        check_blocks(self)
        check_prompts(self)
        self.keeps_outputs = self.teacher_cache == AUTO_CACHE
        if self.keeps_outputs:
            self.teacher_cache = None  # which from here on is a folder
            if not teachers:
                raise HfkdError(
                    "teacher_cache: auto keeps what a teacher says, and none is named: set teacher_name_or_path, or "
                    "leave teacher_cache out."
                )
        for name in ("teacher_image_size", "teacher_image_mean", "teacher_image_std"):
            value = getattr(self, name)
            if value is None:
                continue
            if len(checkpoints) != 1:
                raise HfkdError(
                    f"{name} describes the one network in teacher_checkpoint, which names {len(checkpoints)} files. "
                    "Another teacher tells it itself: leave it out."
                )
            if isinstance(value, list) and len(value) != 3:
                raise HfkdError(f"{name} needs three numbers, for red, green and blue, got {len(value)}.")

    def outputs_limit(self, by_default: bool) -> float:
        """Return the GiB that a teacher's outputs may take, for `DistillationTrainer`; 0 where none are kept.

        Args:
            by_default: whether the command keeps them unless told otherwise.
        """
        keeps = self.keeps_outputs or (by_default and self.teacher_cache is None)
        return self.teacher_cache_limit if keeps else 0.0

    @property
    def teacher_image(self) -> dict[str, Any]:
        """Arguments of `load_teacher` that describe the input of a network from a file; only those that are given."""
        names = ("image_size", "image_mean", "image_std")
        return {name: value for name in names if (value := getattr(self, f"teacher_{name}")) is not None}


@dataclass
class DataArguments:
    """Keys of the images and their preprocessing."""

    _argument_group_name = "data"

    dataset_name: str = field(
        metadata={"help": "'digits', a Hub id, a local folder of Parquet files or a local imagefolder."}
    )
    train_split: str = field(default="train", metadata={"help": "Name of the training split."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Name of the evaluation split; by default the first of test, validation, val and valid."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; by default inferred from the features."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the labels; by default inferred from the features. 'none' reads the images without "
            "labels, and of a folder all images below it."
        },
    )
    unlabelled_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Further training images, like dataset_name, whose labels, if any, are not read."},
    )
    unlabelled_split: str = field(
        default="train", metadata={"help": "Split of unlabelled_dataset_name, or a slice of one."}
    )
    unlabelled_share: float = field(
        default=0.5, metadata={"help": "Share of unlabelled_dataset_name in every training batch."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square input in pixels; by default the student's own."}
    )
    random_flip: bool = field(
        default=True,
        metadata={"help": "Mirror half of the training images; unsuitable for digits and letters."},
    )
    augmentation: str = field(
        default="crop",
        metadata={
            "help": "'crop' is for small images: decode once into memory, zero-pad by 4 pixels and crop. "
            "'random_resized_crop': decode each time in the DataLoader workers, and resize a random crop.",
            "choices": ["crop", "random_resized_crop"],
        },
    )
    interpolation: str = field(
        default="bicubic",
        metadata={
            "help": "Interpolation for random_resized_crop and evaluation.",
            "choices": ["bicubic", "bilinear"],
        },
    )
    crop_pct: float = field(
        default=1.0,
        metadata={"help": "Share of the resized image's side that evaluation keeps (0.875: the central 224 of 256)."},
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's policy string, e.g. rand-m9-mstd0.5-inc1, for random_resized_crop."}
    )
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "timm's colour jitter, for random_resized_crop; auto_augment replaces it."},
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability of timm's random erasing with noise, for random_resized_crop."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data while training instead of downloading it; needs random_resized_crop."},
    )
    shuffle_buffer_size: int = field(
        default=8192, metadata={"help": "Images from which a worker draws the next one, for streaming."}
    )
    skip_bad_images: bool = field(
        default=False,
        metadata={"help": "Skip and count images that cannot be decoded; otherwise they raise an error."},
    )
    decoded_cache: bool = field(
        default=True,
        metadata={
            "help": "Keep small images, once decoded, in a file beside the cache of datasets, for later runs; for crop."
        },
    )

    def __post_init__(self):
        check_ranges(self)
        check_names(self, PATH_KEYS)
        for each in dataclasses.fields(DataArguments):
            needed = RECIPE_KEYS[each.name].augmentation
            if needed not in (None, self.augmentation) and getattr(self, each.name) != each.default:
                raise HfkdError(f"{each.name} needs augmentation: {needed}; this recipe's is {self.augmentation}.")
        check_unlabelled(self)


def parse_device_map(given: str) -> str | dict[str, Any]:
    """Return a device map from its text.

    Raises:
        HfkdError: if it is neither a mapping, nor a device, nor one of transformers' names.
    """
    if given.startswith("{"):
        mapping = parse_yaml(given, "teacher_device_map")
        if mapping and isinstance(mapping, dict):
            return mapping
    elif given in DEVICE_MAPS:
        return given
    else:
        with contextlib.suppress(RuntimeError):
            return str(torch.device(given))
    raise HfkdError(
        f"teacher_device_map must be one of {', '.join(DEVICE_MAPS)}, a device such as cuda:1, or a mapping from "
        f"modules to devices, got '{given}'."
    )
