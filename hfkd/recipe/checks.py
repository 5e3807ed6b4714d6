"""Checks of values that need no other library: ranges of numbers, settings that contradict one another, optim_args."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..errors import HfkdError, did_you_mean
from ..names import NO_LABELS


@dataclass(frozen=True)
class Range:
    """Range of a number.

    Attributes:
        words: end of the sentence that begins with the key, such as `must not be negative`.
        holds: True for a finite number in the range.
    """

    words: str
    holds: Callable[[Any], bool]


NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
POSITIVE = Range("must be above 0", lambda value: value > 0)
AT_LEAST_1 = Range("must be 1 or more", lambda value: value >= 1)
SHARE = Range("must be 0 or above and at most 1", lambda value: 0 <= value <= 1)
BELOW_1 = Range("must be 0 or above and below 1", lambda value: 0 <= value < 1)
PERCENT = Range("must be 0 or above and at most 100", lambda value: 0 <= value <= 100)
SEED = Range("must be 0 or above and below 2**32", lambda value: 0 <= value < 2**32)
AUTO = "auto"  # torch_compile that is chosen by measuring
BALANCED = "balanced"  # class_weights from the labels
RANGES = {
    # Model and data
    **dict.fromkeys(("teacher_class_indices", "teacher_image_mean", "teacher_cache_limit"), NOT_NEGATIVE),
    "teacher_image_size": AT_LEAST_1,
    "teacher_image_std": POSITIVE,
    "drop_path_rate": BELOW_1,
    "patch_size": AT_LEAST_1,
    "image_size": AT_LEAST_1,
    "crop_pct": Range("must be above 0 and at most 1", lambda value: 0 < value <= 1),
    "random_erasing": SHARE,
    "color_jitter": NOT_NEGATIVE,
    "shuffle_buffer_size": AT_LEAST_1,
    "unlabelled_share": Range("must be above 0 and below 1", lambda value: 0 < value < 1),
    # Distillation
    **dict.fromkeys(("ce_weight", "mixup", "cutmix"), NOT_NEGATIVE),
    **dict.fromkeys(("lr_milestones", "lr_gamma"), POSITIVE),
    "ema_decay": Range("must be between 0 and 1, e.g. 0.9998", lambda value: 0 < value < 1),
    "layer_decay": Range("must be above 0 and at most 1, e.g. 0.75", lambda value: 0 < value <= 1),
    "early_stopping_patience": AT_LEAST_1,
    "early_stopping_threshold": NOT_NEGATIVE,
    "probe_every": AT_LEAST_1,
    "published_top1": PERCENT,
    # Training
    "num_train_epochs": POSITIVE,
    "max_steps": Range("must be 1 or more, or -1 to leave it out", lambda value: value == -1 or value >= 1),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), BELOW_1),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "warmup_steps", "adam_epsilon", "max_grad_norm", "eval_delay"),
            "dataloader_num_workers",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "neftune_noise_alpha"), POSITIVE),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("save_total_limit", "eval_accumulation_steps", "torch_empty_cache_steps", "ddp_timeout"),
            *("dataloader_prefetch_factor", "ddp_bucket_cap_mb"),
        ),
        AT_LEAST_1,
    ),
}
# Optimizers that read optim_args by name and ignore other names, or that ignore all of them.
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor"), ()),
}
SWITCHES = ("nesterov", "centered")  # the optim_args that are no numbers


# They run layers again or as other code, or hold the weights in bf16 or float16.
NOT_WITH_QUANTIZE = (
    *("torch_compile", "gradient_checkpointing", "activation_checkpointing", "bf16_full_eval", "fp16_full_eval"),
)


def check_ranges(arguments: Any, ranges: Mapping[str, Range] = RANGES) -> None:
    """Check that the numbers in an object of an argument class are finite and in their ranges.

    Raises:
        HfkdError: for the first one that is not.
    """
    for each in dataclasses.fields(arguments):
        given = getattr(arguments, each.name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if not isinstance(value, Real):
                continue
            if isinstance(value, Integral) and abs(value) >= 2**53:  # no counter of torch or Python takes any number
                raise HfkdError(f"{each.name} must be below 2**53, got {value}.")
            if not math.isfinite(value):
                raise HfkdError(f"{each.name} must be a finite number, got {value}.")
            if each.name in ranges and not ranges[each.name].holds(value):
                raise HfkdError(f"{each.name} {ranges[each.name].words}, got {value}.")


def check_name(key: str, name: str) -> None:
    """Check that a name can be asked for as a file: a file system refuses long names, whatever is asked.

    Raises:
        HfkdError: if a part of it is longer than 255 bytes, or it holds a zero byte.
    """
    parts = [len(part.encode(errors="surrogatepass")) for part in name.split("/")]
    if max(parts) > 255 or sum(parts) > 3000 or "\0" in name:
        raise HfkdError(f"{key} is no name that a file could have: '{name[:40]}...' has {len(name)} characters.")


def check_names(arguments: Any, keys: Iterable[str]) -> None:
    """Check the names of files, folders and models in an object of an argument class, see `check_name`."""
    for key in keys:
        given = getattr(arguments, key, None)
        for name in [given] if isinstance(given, str) else given or ():
            check_name(key, name)


def check_prompts(model_args: Any) -> None:
    """Check teacher_prompts: each has a place for the name of a class, and there is one teacher that reads them.

    Raises:
        HfkdError: if not.
    """
    prompts, teachers = model_args.teacher_prompts or [], model_args.teacher_name_or_path or []
    for prompt in prompts:
        if "{}" not in prompt:
            raise HfkdError(
                f"teacher_prompts: '{prompt}' has no {{}}, where the name of the class is put: 'a photo of a {{}}'."
            )
    if prompts and len(teachers) != 1:
        raise HfkdError(f"teacher_prompts needs one teacher, and teacher_name_or_path names {len(teachers)}.")
    for key in ("teacher_checkpoint", "teacher_class_indices", "teacher_device_map"):
        if prompts and getattr(model_args, key):
            raise HfkdError(f"teacher_prompts make a classifier of CLIP or SigLIP, which takes no {key}: leave it out.")


def check_blocks(model_args: Any) -> None:
    """Check teacher_blocks: lists of indices by the names of lists of blocks, and one network to take the blocks from.

    Raises:
        HfkdError: if not.
    """
    given = model_args.teacher_blocks
    if given is None:
        return
    lists = list(given.values()) if isinstance(given, dict) else []
    right = bool(lists) and all(isinstance(taken, list) and taken for taken in lists)
    if not right or not all(type(index) is int and index >= 0 for taken in lists for index in taken):
        raise HfkdError(
            "teacher_blocks must map each list of blocks to indices from 0 on, such as "
            f"{{layer1: [0, 3, 8], layer2: [0, 2, 4]}}, got {given!r}."
        )
    teachers = len(model_args.teacher_name_or_path or [])
    if teachers != 1:
        raise HfkdError(f"teacher_blocks needs one teacher, and teacher_name_or_path names {teachers or 'none'}.")
    for key in ("pretrained", "teacher_prompts", "teacher_device_map"):
        if getattr(model_args, key):
            raise HfkdError(f"teacher_blocks starts the student from the teacher's own weights: leave {key} out.")
    if model_args.teacher_cache not in (None, AUTO):
        raise HfkdError(
            f"teacher_blocks needs the teacher, and from the cache {model_args.teacher_cache} none is loaded: take "
            "teacher_cache: auto, or leave it out."
        )


def check_unlabelled(data_args: Any) -> None:
    """Check the keys of further images without labels in a DataArguments.

    Raises:
        HfkdError: for keys that contradict one another.
    """
    if data_args.unlabelled_dataset_name is None:
        return
    if data_args.streaming:
        raise HfkdError("unlabelled_dataset_name needs images that can be read in any order: set streaming: false.")
    if data_args.label_column == NO_LABELS:
        raise HfkdError(
            "unlabelled_dataset_name goes with images that have labels, and label_column is none: name the images "
            "without labels in dataset_name alone, or leave label_column out."
        )


def check_without_labels(losses: Any, config: Any, where: str) -> None:
    """Check that nothing is to be learnt from labels, and set a `ce_weight` that no recipe gives to 0.

    Args:
        losses: `DistillationLoss` modules by name.
        config: a DistillationConfig.
        where: name of the training images in the message.

    Raises:
        HfkdError: if a loss, class weights, or a `ce_weight` that was given need labels.
    """
    reading = [name for name, loss in losses.items() if loss.reads_labels]
    if reading:
        raise HfkdError(
            f"The losses {reading} read labels, and {where} have none. Take losses that read none, such as kd, or name "
            "the label_column."
        )
    if not losses:
        raise HfkdError(
            f"{where[0].upper()}{where[1:]} have no labels, and there is no loss to learn from without them: name a "
            "teacher and a loss, or the label_column."
        )
    if config.class_weights:
        raise HfkdError(
            f"class_weights weigh the cross-entropy with the labels, and {where} have none: leave them out."
        )
    if config.ce_weight > 0:
        if config.written is None or "ce_weight" in config.written:
            raise HfkdError(
                f"ce_weight is {config.ce_weight:g}, the weight of the cross-entropy with the labels, and {where} have "
                "none. Set ce_weight to 0, or name the label_column."
            )
        config.ce_weight = 0.0


def check_probe(config: Any, has_labels: bool) -> None:
    """Check that evaluation images have the labels that `probe_every` reads.

    Raises:
        HfkdError: if they have none.
    """
    if config.probe_every is not None and not has_labels:
        raise HfkdError(
            "probe_every measures how often the nearest neighbours have an image's label, and the evaluation images "
            "have no labels: name an eval_split or label_column with labels, or leave probe_every out."
        )


def check_training(config: Any) -> None:
    """Check the settings of a DistillationConfig before transformers looks for the device, which takes seconds.

    Raises:
        HfkdError: for a number out of range, milestones that do not increase, strategies that contradict
            load_best_model_at_end or early stopping, or optim_args that the optimizer does not take.
    """
    check_ranges(config)
    if isinstance(config.torch_compile, str) and config.torch_compile != AUTO:  # from code
        raise HfkdError(f"torch_compile must be true, false or auto, got {config.torch_compile!r}.")
    for key in ("neftune_noise_alpha", "use_liger_kernel"):
        if getattr(config, key, None):
            raise HfkdError(f"{key} is for language models: leave it out.")
    if config.probe_every is not None and config.prediction_loss_only:
        raise HfkdError("probe_every reads features, and prediction_loss_only measures the loss alone: leave one out.")
    milestones = config.lr_milestones or []
    if sorted(set(milestones)) != milestones:
        raise HfkdError(f"lr_milestones must increase, got {' '.join(f'{epoch:g}' for epoch in milestones)}.")
    evaluated, saved = (_name(strategy) for strategy in (config.eval_strategy, config.save_strategy))
    if config.load_best_model_at_end and saved not in ("best", evaluated):
        raise HfkdError(
            "load_best_model_at_end needs a checkpoint of each evaluation, so eval_strategy and save_strategy must be "
            f"the same, got {evaluated} and {saved}. Set both to epoch, or save_strategy to best."
        )
    eval_steps = config.eval_steps or config.logging_steps
    if config.load_best_model_at_end and saved == evaluated == "steps" and eval_steps != config.save_steps:
        raise HfkdError(
            "load_best_model_at_end needs a checkpoint of each evaluation, so save_steps must be eval_steps, got "
            f"{config.save_steps:g} and {eval_steps:g}."
        )
    _check_early_stopping(config, evaluated)
    _check_quantize(config)
    _check_class_weights(config)
    if isinstance(config.lr_scheduler_kwargs, str) and not config.lr_scheduler_kwargs.startswith("{"):
        raise HfkdError(f"lr_scheduler_kwargs must be a mapping, got '{config.lr_scheduler_kwargs}'.")
    if config.optim_args:
        check_optim_args(_name(config.optim), config.optim_args)


def _check_early_stopping(config: Any, evaluated: str) -> None:
    if config.early_stopping_patience is None:
        if config.early_stopping_threshold:
            raise HfkdError("early_stopping_threshold goes with early_stopping_patience: set it, too.")
    elif evaluated == "no":
        raise HfkdError("early_stopping_patience counts evaluations: set eval_strategy to epoch or steps.")
    elif config.metric_for_best_model is None:
        raise HfkdError("early_stopping_patience needs a metric: set metric_for_best_model, such as top1.")


def _check_quantize(config: Any) -> None:
    if config.quantize == "none":
        return
    if config.quantize != "int8":  # from code
        raise HfkdError(f"quantize must be none or int8, got '{config.quantize}'.")
    asked = {
        "fsdp": config.fsdp or _launched_with("FSDP"),
        "deepspeed": config.deepspeed or _launched_with("DEEPSPEED"),
        **{key: getattr(config, key, None) for key in NOT_WITH_QUANTIZE},
    }
    given = [key for key, value in asked.items() if value]
    if given:
        raise HfkdError(f"quantize is not supported with {given[0]}: leave one of them out.")


def _launched_with(plugin: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true")


def check_quantized_losses(losses: Any, config: Any, has_classifier: bool) -> None:
    """Check that a student to be trained in simulated int8 has a classifier and is not rebuilt.

    Args:
        losses: `DistillationLoss` modules by name.
        config: a DistillationConfig.

    Raises:
        HfkdError: if it has none, or a loss rebuilds it.
    """
    if config.quantize == "none":
        return
    if not has_classifier:
        raise HfkdError(
            "quantize needs a student with a classifier, whose top-1 tells what int8 costs, and nothing here trains "
            "one: set ce_weight above 0, or leave quantize out."
        )
    rebuilding = [name for name, loss in losses.items() if loss.reuses_classifier is not None]
    if rebuilding:
        raise HfkdError(
            f"quantize starts from a trained student, and the loss '{rebuilding[0]}' gives it a new projector: train "
            "it without quantize first, then give its folder as --student with another loss, such as kd."
        )


def _check_class_weights(config: Any) -> None:
    given = config.class_weights
    if given is None:
        return
    if config.ce_weight == 0:
        raise HfkdError("class_weights weigh the cross-entropy, and ce_weight is 0: leave class_weights out.")
    if list(given) == [BALANCED]:
        return
    for weight in given:
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):  # a batch of classes without weight has no mean
            raise HfkdError(f"class_weights must be {BALANCED}, or a number above 0 for each class, got '{weight}'.")


def check_label_smoothing(factor: float, losses: Any) -> None:
    """Raise HfkdError for label smoothing beside losses."""
    if factor and losses:
        raise HfkdError(
            f"label_smoothing_factor={factor} is for training from the labels alone, as with `hfkd train-teacher`: "
            "beside losses the teacher's distribution replaces it. Leave it at 0."
        )


def _name(value: Any) -> str:
    """Return the name of a value that may be an enumeration's."""
    return str(getattr(value, "value", value))


def check_optim_args(optimizer: str, given: str) -> None:
    """Check that optim_args are of the form `name=value,...`, with names that transformers passes to the optimizer.

    Raises:
        HfkdError: if they are not; the message names the nearest valid name.
    """
    for entry in given.replace(" ", "").split(","):
        name, equals, value = entry.partition("=")
        if not name or not equals or not value or "=" in value:
            raise HfkdError(f"optim_args must be of the form name=value,name=value, got '{given}'.")
        if optimizer not in OPTIM_ARGS:
            continue
        valid = OPTIM_ARGS[optimizer]
        if not valid:
            raise HfkdError(f"optim_args: {optimizer} takes none, got '{given}'. Leave optim_args out.")
        if name not in valid:
            raise HfkdError(f"optim_args: {optimizer} takes no '{name}'.{did_you_mean(name, valid)}.")
        _check_optim_value(name, value)


def _check_optim_value(name: str, value: str) -> None:
    if name in SWITCHES:
        if value.lower() not in ("true", "1", "yes", "false", "0", "no"):
            raise HfkdError(f"optim_args: {name} must be true or false, got '{value}'.")
        return
    try:
        number = float(value)
    except ValueError:
        raise HfkdError(f"optim_args: {name} must be a number, got '{value}'.") from None
    if not (math.isfinite(number) and number >= 0):
        raise HfkdError(f"optim_args: {name} must be a finite number, 0 or above, got '{value}'.")
