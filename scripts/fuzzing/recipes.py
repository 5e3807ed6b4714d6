"""Recipes with changes: right and wrong values, keys that do not exist, keys that contradict, damaged text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hypothesis import strategies as st

from .cases import Plan, expected_of, strict_json
from .ground import RECIPE

# Left out: they start other programs, compile, reach for the network, or only make a case longer.
LEFT_OUT = {
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "deepspeed", "dataloader_num_workers"),
    *("output_dir", "resume_from_checkpoint", "dataloader_persistent_workers", "ddp_backend", "local_rank"),
    *("dataloader_multiprocessing_context", "use_cpu"),
}
RIGHT: dict[str, list] = {
    "learning_rate": [0, 1e-3, 0.1],
    "num_train_epochs": [1, 0.5, 2],
    "max_steps": [1, 3, -1],
    "per_device_train_batch_size": [4, 8, 500],
    "per_device_eval_batch_size": [1, 7, 500],
    "gradient_accumulation_steps": [1, 2],
    "weight_decay": [0, 5e-4],
    "seed": [0, 1, 2**32 - 1],
    "optim": ["sgd", "adamw_torch", "rmsprop", "adagrad"],
    "lr_scheduler_type": ["constant", "cosine", "linear"],
    "warmup_steps": [0, 1],
    "max_grad_norm": [0, 1],
    "ce_weight": [0, 0.5, 3],
    "published_top1": [0, 71.4, 100],
    "ema_decay": [0.5, 0.9],
    "image_size": [8, 16, 24],
    "eval_strategy": ["no", "epoch"],
    "save_strategy": ["no", "epoch"],
    "save_total_limit": [1, 3],
    "logging_steps": [1, 0.5, 100],
    "train_split": ["train", "train[:75%]", "train[:24]"],
    "eval_split": ["test", "test[:50%]", "train"],
    "run_name": ["ü 'name'", "1"],
    "report_to": ["none", ["none"]],
    "teacher_class_indices": [[0, 1, 2, 3], [3, 2, 1, 0]],
    "losses": [
        {"kd": {}},
        {"kd": None},
        {"dkd": {"beta": 2}},
        {"kd": {"temperature": 2, "weight": 0.5}, "dist": {}},
        {"rkd": {"weight": 2}},
        {"ctkd": {}},
    ],
    **dict.fromkeys(
        (
            *("random_flip", "bf16", "logit_standardization", "decay_all_parameters", "channels_last"),
            *("dataloader_drop_last", "disable_tqdm", "logging_first_step", "skip_bad_images"),
        ),
        [True, False],
    ),
}
NOT_NEGATIVE = (
    *("learning_rate", "num_train_epochs", "weight_decay", "warmup_steps", "max_grad_norm", "ce_weight", "mixup"),
    *("cutmix", "ema_decay", "image_size", "seed", "data_seed", "logging_steps", "save_steps", "eval_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lr_gamma"),
    *("save_total_limit", "dataloader_num_workers", "dataloader_prefetch_factor", "published_top1", "crop_pct"),
    *("drop_path_rate", "patch_size", "color_jitter", "random_erasing", "shuffle_buffer_size", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "eval_delay", "label_smoothing_factor", "eval_accumulation_steps"),
)
WRONG: dict[str, list] = {
    "eval_strategy": ["epochs", "nonsense"],
    "save_strategy": ["steps_", "nonsense"],
    "logging_strategy": ["nonsense"],
    "augmentation": ["Crop", "nonsense", None, ""],
    "interpolation": ["lanczos"],
    "optim": ["nonsense", "SGD "],
    "optim_args": ["momentum", "momentun=0.9", "momentum=x", "momentum=0.9,,", {"momentum": 0.9}],
    "lr_scheduler_type": ["nonsense"],
    "lr_milestones": [[2, 1], [1, 1], [0], "x", [".nan"]],
    "losses": [
        *(4, "kd", ["kd"], {"kdd": {}}, {"kd": 4}, {"kd": {"temprature": 4}}, {"kd": {"temperature": 0}}),
        *({"kd": {"temperature": float("nan")}}, {"kd": {"weight": "much"}}, {"kd": {"temperature": True}}),
        *({"kd": {"temperature": [4]}}, {"kd": {"weight": float("inf")}}, {"dist": {"beta": None, "x": 1}}, {}),
        *({"kd": {"temperature": -1}}, {1: {}}, {"fitnet": {"layers": "nowhere"}}),
    ],
    "student_name_or_path": ["cifar_resnet", "", "no/such/thing", "images", "resnet18.nonsense", 3, ["a", "b"]],
    "teacher_name_or_path": ["no/such/thing", "images", "cifar_resnet5", [], ["teacher", "nowhere"]],
    "teacher_checkpoint": ["nowhere.pth", "notes.txt", ["a", "b"]],
    "teacher_class_indices": [[0, 1], [0, 1, 2, 9], [0, 1, 2, "x"], "x"],
    "teacher_cache": ["nowhere", "images"],
    "dataset_name": ["nowhere", "notes.txt", "", "no/such", "teacher"],
    "train_split": ["trian", "train[:0]", "train[5", "train[:x%]", ""],
    "eval_split": ["tset", "test[99:]", "test[::]"],
    "image_column": ["picture"],
    "label_column": ["image", "nonsense"],
    "report_to": ["nonsense", ["wandbb"]],
    "fp16": [True],
    "label_smoothing_factor": [0.1],
    "metric_for_best_model": [3.5],
    "drop_path_rate": [1, 2],
    "extends": [5, "nowhere.yaml", ["a"], "recipe.yaml"],
    "published_top1": [101],
    "crop_pct": [0, 1.5],
    "ema_decay": [0, 1, 1.5],
    "random_erasing": [25],
    "remove_unused_columns": ["yes please"],
}
CONTRADICTIONS: list[dict[str, Any]] = [
    {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
    {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "epoch"},
    {"mixup": 0.2, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    {"cutmix": 1.0, "dataloader_drop_last": False},
    {"streaming": True, "augmentation": "crop"},
    {"random_erasing": 0.2, "augmentation": "crop"},
    {"auto_augment": "rand-m9", "augmentation": "crop"},
    {"lr_milestones": [1, 2], "warmup_steps": 3},
    {"teacher_name_or_path": None, "losses": {"kd": {}}},
    {"losses": None},
    {"teacher_name_or_path": ["teacher", "teacher"], "teacher_checkpoint": ["notes.txt"]},
    {"patch_size": 4},
]
DAMAGE = {  # of the text of a recipe: what it does and what must come of it
    "key twice": (lambda text: text + b"optim: adamw_torch\n", "refuse"),
    "tab": (lambda text: text + b"\tseed: 3\n", "refuse"),
    "list": (lambda text: b"- " + text.replace(b"\n", b"\n  "), "refuse"),
    "empty": (lambda text: b"", "refuse"),
    "a number": (lambda text: b"42\n", "refuse"),
    "not UTF-8": (lambda text: text + b"run_name: \xff\xfe\n", "refuse"),
    "UTF-16": (lambda text: text.decode().encode("utf-16"), "refuse"),
    "a zero byte": (lambda text: text + b"run_name: a\0b\n", "refuse"),
    "cut off": (lambda text: text[: len(text) // 2] + b"{", "refuse"),
    "python tag": (lambda text: text + b"run_name: !!python/object/apply:os.getcwd []\n", "refuse"),
    "aliases": (
        lambda text: (
            text
            + b"".join(b"%c: &%c [%s]\n" % (97 + i, 97 + i, b", ".join([b"*%c" % (96 + i)] * 9)) for i in range(1, 12))
        ),
        "refuse",
    ),
    "deep": (lambda text: text + b"run_name: " + b"[" * 5000 + b"]" * 5000, "refuse"),
    "contains itself": (lambda text: text + b"accelerator_config: &a {x: *a}\n", "refuse"),
    "two documents": (lambda text: text + b"---\nseed: 3\n", "refuse"),
    "merge key": (lambda text: text + b"<<: {seed: 3}\n", "either"),
    "CRLF": (lambda text: text.replace(b"\n", b"\r\n"), "run"),
    "BOM": (lambda text: b"\xef\xbb\xbf" + text, "run"),
    "comments": (lambda text: b"# \xc3\xbc: {\n" + text + b"\n\n# end", "run"),
    "YAML 1.1 time": (lambda text: text.replace(b"learning_rate: 0.01", b"learning_rate: 1:30"), "refuse"),
    "grouped digits": (lambda text: text.replace(b"size: 16", b"size: 1_6"), "either"),
    "octal": (lambda text: text.replace(b"size: 16", b"size: 016"), "run"),
}


def _fields() -> dict[str, Any]:
    from hfkd.recipe.reading import ARGUMENT_CLASSES

    hints = {name: hint for cls in ARGUMENT_CLASSES for name, hint in get_type_hints(cls).items()}
    names = [field.name for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls) if field.init]
    return {name: hints[name] for name in names if name not in LEFT_OUT}


def _wrong_type(hint: Any) -> list:
    """Return values that a key of this type cannot have."""
    if hint in (int, int | None):
        return ["abc", 1.5, float("nan"), float("inf"), [1, 2], {"a": 1}, True, "1 2"]
    if hint in (float, float | None):
        return ["abc", float("nan"), float("-inf"), [1.0, 2.0], {"a": 1}, "1:30", "0,1"]
    if hint in (bool, bool | None):
        return ["maybe", 3, [True, False], {"a": True}, "tru"]
    if hint in (str, str | None):
        return [["a", "b"]]
    return []


def _odd(hint: Any) -> list:
    """Return values that a key of this type may have, and nobody has thought of."""
    if hint in (int, int | None, float, float | None):
        return [0, 1, 2, 7, 0.5, 1e-300, 1e300, -0.0, 10**6, 2**31, 2**63, 10**30]
    if hint in (bool, bool | None):
        return [True, False, "yes", "1", 0]
    return [
        "",
        " ",
        "no",
        "null",
        "all",
        "x" * 5000,
        "../x",
        "a\nb",
        "{",
        "{}",
        "0",
        [],
        [""],
        [0],
        [None],
        {},
        {"x": 1},
    ]


def cases() -> st.SearchStrategy[dict]:
    """Return the strategy of cases. A change is [key, value, expectation], or ["text", name of the damage, ...]."""
    fields = _fields()
    wrong = [[key, value, "refuse"] for key, hint in fields.items() for value in _wrong_type(hint)]
    wrong += [[key, value, "refuse"] for key, values in WRONG.items() for value in values]
    wrong += [[key, value, "refuse"] for key in NOT_NEGATIVE for value in (-1, -0.5)]
    right = [[key, value, "run"] for key, values in RIGHT.items() for value in values]
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    misspelt = st.tuples(st.sampled_from(sorted(fields)), st.integers(1, 6), st.sampled_from("abxyz_ ")).map(
        lambda drawn: [drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] :], 1, "refuse"]
    )
    odd = [[key, value, "either"] for key, hint in fields.items() if key != "max_steps" for value in _odd(hint)]
    damage = st.sampled_from([["text", name, expected] for name, (_, expected) in DAMAGE.items()])
    any_value = st.tuples(st.sampled_from(sorted(fields)), anything, st.just("either")).map(list)
    few_right = st.lists(st.sampled_from(right), min_size=0, max_size=3, unique_by=lambda change: change[0])
    one = st.one_of(st.sampled_from(wrong), st.sampled_from(wrong), st.sampled_from(odd), any_value, misspelt, damage)
    contradiction = st.sampled_from(CONTRADICTIONS).map(lambda keys: [["keys", keys, "refuse"]])
    changes = st.one_of(
        st.tuples(few_right, one).map(lambda drawn: [*drawn[0], drawn[1]]),
        st.lists(st.one_of(any_value, st.sampled_from(odd)), min_size=1, max_size=3),
        st.lists(st.sampled_from(odd), min_size=1, max_size=2),
        st.lists(st.sampled_from(right), min_size=1, max_size=5, unique_by=lambda change: change[0]),
        contradiction,
    )
    return st.fixed_dictionaries({"changes": changes, "line": st.booleans()}).filter(_is_text)


def _is_text(case: dict) -> bool:
    try:
        json.dumps(case, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    return True


def build(case: dict, ground: Path, folder: Path) -> Plan:
    """Write the recipe; with `line`, the single values of the changes are given on the command line."""
    for name in ("images", "teacher"):
        (folder / name).symlink_to(ground / name)
    recipe, words, damage = dict(RECIPE), [], []
    for key, value, _ in case["changes"]:
        if key == "text":
            damage.append(value)
        elif key == "keys":
            recipe |= value
        elif case["line"] and isinstance(value, (str, int, float)) and key not in ("losses", "extends"):
            words.append(f"--{key}={value}")
        else:
            recipe[key] = value
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    for name in damage:
        text = DAMAGE[name][0](text)
    (folder / "recipe.yaml").write_bytes(text)
    expected = expected_of(case["changes"])
    asked = {key: value for key, value, verdict in case["changes"] if verdict == "run" and key != "text"}
    return Plan(["distill", "recipe.yaml", *words], expected, lambda records: check_run(folder / "out", asked))


def check_run(output: Path, asked: dict[str, Any]) -> str | None:
    """Return what is wrong with the files of a run that ended well, or None."""
    results = strict_json(output / "results.json")
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    for key, value in asked.items():
        if key != "losses" and not _same(recipe.get(key), value):
            return f"recipe.yaml: another value of {key}"
    strict_json(output / "trainer_state.json")
    exported = results[results["exported"]]
    if results["epochs"] != sorted(results["epochs"], key=lambda row: row["step"]):
        return "results.json: the rows are not in order"
    bf16 = ["--bf16"] if recipe.get("bf16") else []
    return check_top1(output / "student", exported["top1"], 7.0 if bf16 else 1e-6, bf16)


def _same(given: Any, asked: Any) -> bool:
    return given == asked or str(given) == str(asked) or given == [asked] or [given] == asked


def check_top1(model: Path, top1: float, tolerance: float, words: list[str]) -> str | None:
    """Return how the top-1 of a model, as `hfkd evaluate` measures it, differs from what a run says, or None."""
    from hfkd.commands.evaluate import evaluate

    measured = evaluate([str(model), *words])["eval_top1"]
    if abs(measured - top1) > tolerance:
        return "the exported model has another top-1 than results.json says"
    return None
