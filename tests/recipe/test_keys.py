"""The table of recipe keys, and the sets that other modules derive from it."""

import dataclasses
import inspect

import pytest

from hfkd.commands.reproduce import RESERVED_KEYS
from hfkd.comparison.rows import OF_ONE_RUN
from hfkd.losses import LOSSES
from hfkd.recipe.arguments import DataArguments
from hfkd.recipe.differences import recipe_differences, settings_of
from hfkd.recipe.keys import (
    DIGITS,
    NOT_RECORDED,
    PATH_KEYS,
    PRIVATE_KEYS,
    RECIPE_KEYS,
    SCHEDULE_KEYS,
    SEARCHABLE_KEYS,
    SECTIONS,
    SEEDS,
    WITHOUT_EFFECT,
    Effect,
    public_value,
)
from hfkd.recipe.reading import ARGUMENT_CLASSES, KEYS
from hfkd.recipe.yaml_file import dump_yaml
from hfkd.runs.published import COMPARED_KEYS
from hfkd.search.results import TRIAL_ONLY_KEYS
from hfkd.search.space import TRIAL_SETTINGS

PRIVATE = {
    *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *(
        "trust_remote_code",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "logging_dir",
    ),
}
FREE = PRIVATE | {
    *("disable_tqdm", "report_to", "dataloader_num_workers", "per_device_eval_batch_size"),
    *("teacher_device_map", "teacher_recipe", "shard_teacher", "published_top1", "stop_when_diverged"),
    *("decoded_cache", "keep_teacher_evaluation", "teacher_cache_limit"),
    # Speed and memory
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "torch_empty_cache_steps", "eval_accumulation_steps"),
    *("eval_use_gather_object", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_find_unused_parameters"),
    *("ddp_static_graph", "ddp_timeout"),
    # Logs and files
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
    *("log_level_replica", "log_on_each_node", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("debug", "save_only_model", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint"),
}
TRIALS = {
    *("num_train_epochs", "max_steps", "lr_milestones", "train_split", "teacher_cache", "published_top1"),
    *("eval_strategy", "save_strategy", "load_best_model_at_end", "push_to_hub", "output_dir", "losses"),
}


@pytest.mark.parametrize("argument_class", ARGUMENT_CLASSES)
def test_every_key_has_an_entry(argument_class):
    """A key that transformers adds counts as one that changes the result, until it is looked at and listed."""
    new = [field.name for field in dataclasses.fields(argument_class) if field.name not in RECIPE_KEYS]
    assert not new, f"{', '.join(new)}: say in hfkd/recipe/keys.py what they are"


@pytest.mark.parametrize(
    "derived, expected",
    [
        (PRIVATE_KEYS, PRIVATE),
        (WITHOUT_EFFECT, FREE),
        (OF_ONE_RUN, FREE | {"seed", "data_seed"}),
        (
            NOT_RECORDED,
            {
                *("hub_token", "push_to_hub_token", "resume_from_checkpoint", "allow_recipe_change"),
                "train_missing_teacher",
            },
        ),
        (
            PATH_KEYS,
            {
                *("dataset_name", "student_name_or_path", "teacher_name_or_path", "teacher_checkpoint"),
                *("teacher_cache", "teacher_recipe", "unlabelled_dataset_name"),
            },
        ),
        (TRIAL_ONLY_KEYS, TRIALS | {"resume_from_checkpoint"}),  # the last one is in no recipe
        (
            set(RESERVED_KEYS),
            {
                *("seed", "data_seed", "num_train_epochs", "max_steps", "lr_milestones", "warmup_steps"),
                *("resume_from_checkpoint", "student_name_or_path", "student"),
                *("losses", "logit_standardization", "ce_weight"),
            },
        ),
    ],
    ids=["private", "without effect", "of one run", "not recorded", "paths", "of the trials", "settled"],
)
def test_derived_sets(derived, expected):
    assert derived == expected


def test_derived_lists():
    """Their order shows in messages."""
    assert SEEDS == ("seed", "data_seed")
    assert set(SCHEDULE_KEYS) == {"num_train_epochs", "max_steps", "lr_milestones", "warmup_steps"}
    assert SEARCHABLE_KEYS == ("learning_rate", "weight_decay", "ce_weight")
    assert SECTIONS == ("extends", "search") and not set(SECTIONS) & set(KEYS)


def test_entries_do_not_contradict_one_another():
    for name, key in RECIPE_KEYS.items():
        without_effect = key.effect is not Effect.RESULT
        assert without_effect or not (key.private or key.secret), name
        assert not without_effect or not (key.seed or key.schedule or key.searchable or key.augmentation), name
    assert {RECIPE_KEYS[name].effect for name in COMPARED_KEYS} == {Effect.RESULT}
    assert set(TRIAL_SETTINGS) <= set(RECIPE_KEYS)


@pytest.mark.parametrize(
    "key, value",
    [
        *(("interpolation", "bilinear"), ("crop_pct", 0.5), ("auto_augment", "rand-m9"), ("color_jitter", 0.4)),
        *(("random_erasing", 0.1), ("streaming", True)),
    ],
)
def test_keys_of_one_augmentation(key, value):
    assert RECIPE_KEYS[key].augmentation == "random_resized_crop"
    DataArguments("digits", augmentation="random_resized_crop", **{key: value})
    with pytest.raises(ValueError, match=f"^{key} needs augmentation: random_resized_crop; this recipe's is crop"):
        DataArguments("digits", **{key: value})


def test_a_run_goes_on_with_other_keys_without_effect(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("{learning_rate: 0.1, output_dir: there, dataloader_num_workers: 2}")
    here = {"learning_rate": 0.1, "output_dir": "here", "dataloader_num_workers": 4}
    assert recipe_differences(tmp_path / "nowhere.yaml", here) == recipe_differences(path, here) == []
    harmless = {"logging_steps": 5, "save_total_limit": 3, "ddp_timeout": 3600, "published_top1": 71.0}
    assert recipe_differences(path, here | harmless) == []
    assert recipe_differences(path, here | {"weight_decay": 0.1}) == ["weight_decay: 0.0 there, 0.1 here"]
    assert recipe_differences(path, here | {"new_in_transformers": 1}) == ["new_in_transformers: None there, 1 here"]
    streamed = recipe_differences(path, here | {"streaming": True})
    assert streamed == ["dataloader_num_workers: 2 there, 4 here", "streaming: False there, True here"]


def test_a_folder_without_a_slash_is_a_path_unless_it_is_a_public_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", DIGITS, "resnet18"):
        (tmp_path / name).mkdir()
    assert public_value("dataset_name", "photos") == "path/to/photos"
    names = public_value("teacher_name_or_path", ["photos", "resnet18", "runs/a"])
    assert names == ["path/to/photos", "resnet18", "path/to/a"]
    assert public_value("dataset_name", DIGITS) == DIGITS and public_value("train_split", "photos") == "photos"


@pytest.mark.parametrize(
    "key, value",
    [
        *(("seed", 42), ("weight_decay", 0), ("optim", "adamw_torch_fused"), ("metric_for_best_model", "top1")),
        *(("losses", {}), ("lr_milestones", []), ("ema_decay", None), ("train_split", "train"), ("crop_pct", 1.0)),
    ],
)
def test_a_key_at_its_default_counts_as_not_set(key, value, tmp_path):
    path = tmp_path / "recipe.yaml"
    for there, here in (({}, {key: value}), ({key: value}, {})):
        path.write_text(dump_yaml({"learning_rate": 0.1} | there))
        assert recipe_differences(path, {"learning_rate": 0.1} | here) == []
    assert settings_of({key: value}) == {}


def test_a_parameter_of_a_loss_at_its_default_counts_as_not_set():
    default = {
        "losses": {
            "kd": {"weight": 1, "temperature": inspect.signature(LOSSES["kd"]).parameters["temperature"].default}
        }
    }
    assert settings_of(default) == settings_of({"losses": {"kd": {}}}) == settings_of({"losses": {"kd": None}})
    assert settings_of({"losses": {"kd": {"weight": 2}}}) == {"losses": {"kd": {"weight": 2}}}
    assert settings_of({"losses": {"own": {"a": 1}}}) == {"losses": {"own": {"a": 1}}}
