"""Recipe keys: a table of their properties, sets of keys derived from it, and the publication of recipes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..names import DIGITS, is_local, last_part

SECTIONS = ("extends", "search")  # parts of a recipe that are not keys: its parent, the space of `hfkd search`
AUTO_CACHE = "auto"  # teacher_cache that fills itself
SHORT_FORMS = {"student": "student_name_or_path", "teacher": "teacher_name_or_path"}


class Effect(Enum):
    """Effect of a key on a run."""

    RESULT = "changes the student or its measurements"
    SPEED = "changes only speed and memory"
    OUTPUT = "changes only files, logs and reports"
    CONTROL = "controls how a run is begun or resumed, and is not recorded"


RESULT, SPEED, OUTPUT, CONTROL = Effect


@dataclass(frozen=True)
class Key:
    """Properties of a recipe key.

    Attributes:
        effect: effect of the key on a run.
        private: whether the published recipe leaves the key out.
        secret: whether the value is never written to a file.
        path: whether the value may be a local path. A published recipe replaces it by `path/to/<name>`.
        seed: whether the key changes the result only at random. A comparison averages over it.
        schedule: whether the value is counted in epochs or steps. A shortened run has another value.
        searchable: whether the value is a non-negative number that `hfkd search` may vary.
        augmentation: the only `augmentation` that allows the key, or None for all.
    """

    effect: Effect
    private: bool = False
    secret: bool = False
    path: bool = False
    seed: bool = False
    schedule: bool = False
    searchable: bool = False
    augmentation: str | None = None


# A key that is not listed, such as a new one of transformers, counts as RESULT.
_TRANSFORMERS = {
    # Optimisation
    **dict.fromkeys(("num_train_epochs", "max_steps", "warmup_steps"), Key(RESULT, schedule=True)),
    "warmup_ratio": Key(RESULT),  # until transformers 5.15
    **dict.fromkeys(("learning_rate", "weight_decay"), Key(RESULT, searchable=True)),
    **dict.fromkeys(("seed", "data_seed"), Key(RESULT, seed=True)),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "max_grad_norm"),
            *("lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules"),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha"),
            "average_tokens_across_devices",
        ),
        Key(RESULT),
    ),
    # Arithmetic, because other kernels round differently
    **dict.fromkeys(
        (
            *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "full_determinism"),
            *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel"),
            *("liger_kernel_config", "accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed"),
            *("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        ),
        Key(RESULT),
    ),
    # Data
    **dict.fromkeys(
        (
            *("dataloader_drop_last", "dataloader_in_order", "train_sampling_strategy", "length_column_name"),
            *("remove_unused_columns", "label_names"),
        ),
        Key(RESULT),
    ),
    # Evaluation and checkpoints, which decide which epoch is the best and where a run resumes
    **dict.fromkeys(
        (
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "prediction_loss_only"),
            *("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "save_strategy", "save_steps"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip"),
            "restore_callback_states_from_checkpoint",
        ),
        Key(RESULT),
    ),
    # Not used by hfkd; RESULT is the safe choice
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "local_rank", "use_cache"), Key(RESULT)),
    # Speed and memory
    **dict.fromkeys(("dataloader_num_workers", "per_device_eval_batch_size"), Key(SPEED)),
    **dict.fromkeys(
        (
            *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
            *("activation_checkpointing_kwargs", "torch_empty_cache_steps", "eval_accumulation_steps"),
            *("eval_use_gather_object", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_find_unused_parameters"),
            *("ddp_static_graph", "ddp_timeout"),
        ),
        Key(SPEED),
    ),
    # Files, logs, trackers and the Hub
    **dict.fromkeys(("hub_token", "push_to_hub_token"), Key(OUTPUT, secret=True)),
    **dict.fromkeys(
        (
            *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
            *("trackio_static_space_id", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
            *("hub_always_push", "hub_revision"),
        ),
        Key(OUTPUT, private=True),
    ),
    "logging_dir": Key(OUTPUT, private=True),  # until transformers 5.15
    **dict.fromkeys(("disable_tqdm", "report_to"), Key(OUTPUT)),
    **dict.fromkeys(
        (
            *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
            *("log_level_replica", "log_on_each_node", "include_num_input_tokens_seen", "skip_memory_metrics"),
            *("debug", "save_only_model", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint"),
        ),
        Key(OUTPUT),
    ),
    "resume_from_checkpoint": Key(CONTROL),
}
_MODEL = {
    **dict.fromkeys(
        ("student_name_or_path", "teacher_name_or_path", "teacher_checkpoint", "teacher_cache"), Key(RESULT, path=True)
    ),
    **dict.fromkeys(
        (
            *("teacher_image_size", "teacher_image_mean", "teacher_image_std", "teacher_class_indices"),
            *("teacher_prompts", "teacher_blocks", "pretrained", "drop_path_rate", "patch_size"),
        ),
        Key(RESULT),
    ),
    **dict.fromkeys(("teacher_device_map", "teacher_cache_limit"), Key(SPEED)),
    "teacher_recipe": Key(OUTPUT, path=True),  # the teacher that it trained is named by teacher_name_or_path
    "train_missing_teacher": Key(CONTROL),
    # Private: whoever repeats a published run decides anew.
    "trust_remote_code": Key(OUTPUT, private=True),
}
_DATA = {
    **dict.fromkeys(("dataset_name", "unlabelled_dataset_name"), Key(RESULT, path=True)),
    **dict.fromkeys(
        (
            *("train_split", "eval_split", "image_column", "label_column", "image_size", "random_flip"),
            *("augmentation", "shuffle_buffer_size", "skip_bad_images", "unlabelled_split", "unlabelled_share"),
        ),
        Key(RESULT),
    ),
    **dict.fromkeys(
        ("interpolation", "crop_pct", "auto_augment", "color_jitter", "random_erasing", "streaming"),
        Key(RESULT, augmentation="random_resized_crop"),
    ),
    "decoded_cache": Key(SPEED),
}
_DISTILLATION = {
    **dict.fromkeys(
        (
            *("losses", "logit_standardization", "decay_all_parameters", "lr_gamma", "mixup", "cutmix", "ema_decay"),
            "channels_last",  # selects kernels, which round differently
            "probe_every",  # as other keys of evaluations
        ),
        Key(RESULT),
    ),
    **dict.fromkeys(("early_stopping_patience", "early_stopping_threshold"), Key(RESULT)),
    **dict.fromkeys(("class_weights", "freeze", "layer_decay", "quantize"), Key(RESULT)),
    "ce_weight": Key(RESULT, searchable=True),
    "lr_milestones": Key(RESULT, schedule=True),
    "shard_teacher": Key(SPEED),
    "keep_teacher_evaluation": Key(SPEED),
    "stop_when_diverged": Key(OUTPUT),  # a run that does not diverge is the same
    "published_top1": Key(OUTPUT),
    "allow_recipe_change": Key(CONTROL),
}
RECIPE_KEYS: dict[str, Key] = _TRANSFORMERS | _MODEL | _DATA | _DISTILLATION


def keys_that(condition: Callable[[Key], bool]) -> tuple[str, ...]:
    """Return the names of the keys that meet a condition, in the order of the table."""
    return tuple(name for name, key in RECIPE_KEYS.items() if condition(key))


NOT_RECORDED = frozenset(keys_that(lambda key: key.secret or key.effect is CONTROL))
PRIVATE_KEYS = frozenset(keys_that(lambda key: key.private))
PATH_KEYS = frozenset(keys_that(lambda key: key.path))
# Keys that may differ between a run and its resumption, and between the runs of one row of a comparison. Keys in
# NOT_RECORDED need no entry, because no recorded recipe contains them.
WITHOUT_EFFECT = frozenset(keys_that(lambda key: key.effect in (SPEED, OUTPUT) and not key.secret))
SEEDS = keys_that(lambda key: key.seed)
SCHEDULE_KEYS = keys_that(lambda key: key.schedule)
SEARCHABLE_KEYS = keys_that(lambda key: key.searchable)


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe without private keys, and with `path/to/<name>` in place of each local path."""
    return {key: public_value(key, value) for key, value in recipe.items() if key not in PRIVATE_KEYS}


def public_value(key: str, value: Any) -> Any:
    """Return the value of one key with `path/to/<name>` in place of each local path."""
    if isinstance(value, dict):
        return {name: public_value(name, entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [public_value(key, entry) for entry in value]
    if not isinstance(value, str):
        return value
    is_path = is_local(value) or (key in PATH_KEYS and _is_bare_path(value))
    return f"path/to/{last_part(value)}" if is_path else value


def _is_bare_path(name: str) -> bool:
    """Return whether a name is an existing file or folder and neither an architecture nor the digits data set."""
    if name == DIGITS or not os.path.exists(name):
        return False
    # Imported here, because timm takes seconds. `--help` and mistakes in a recipe are answered without it.
    import timm

    return not timm.is_model(name)
