"""Data folders with changes: class folders, tables of labels and Parquet files, as people have them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from .cases import Plan, Records, expected_of, strict_json
from .data_tables import PARQUET_CHANGES, TABLE_CHANGES, rows, write_parquet, write_table
from .ground import BROKEN, CLASSES, FINE, LABELS_ALONE, Content, png, write_images, write_recipe

ODD_NAMES = (
    *("ü ñ 漢", "with space", "new\nline", "a'b\"c", "[x]{y}", "50%", "#1", "-x", "null", "a,b", "~", "*", "a\tb"),
    *("🙂", "x" * 100, "e\u0301", "train", "test", "007", "true", "$HOME"),
)


def _need_split(content, path):
    split = path.partition("/")[0]
    if split in content.counts and not (content.root / split).is_dir():
        raise ValueError(f"another change has taken {split} away")


def _write(content, path, data=b"x"):
    _need_split(content, path)
    path = content.root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _rename_class(content, name):
    for split in ("train", "test"):
        os.rename(content.root / split / "date", content.root / split / name)
        content.counts[split][name] = content.counts[split].pop("date")


def _rename_image(content, name):
    os.rename(content.root / "train/apple/1.png", content.root / "train/apple" / f"{name}.png")


def _fine(content, name):
    _write(content, f"train/apple/{name}", FINE[name])
    content.add()


def _special(content, what):
    path = content.root / "train/banana/special.png"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    else:
        path.symlink_to({"dead link": "nowhere.png", "link to itself": path, "device": "/dev/zero"}[what])


def _link_to_image(content):
    (content.root / "train/apple/link.png").symlink_to(content.root / "train/apple/0.png")
    content.add()


def _loop(content):
    (content.root / "train/apple/loop").symlink_to(content.root / "train")


def _nested(content):
    _write(content, "train/apple/more/deep/a.png", png(3))
    content.add()


def _rename_split(content, names):
    (content.root / names[0]).rename(content.root / names[1])


def _remove(content, name):
    if (content.root / name / "bad.png").exists():
        raise ValueError(f"{name} holds the image of another change")
    for path in sorted((content.root / name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (content.root / name).rmdir()
    split, _, class_name = name.partition("/")
    content.counts[split].pop(class_name, None)


def _one_class(content):
    for split in ("train", "test"):
        for name in CLASSES[1:]:
            _remove(content, f"{split}/{name}")


def _second_split(content, name):
    _need_split(content, "test" if name.lower() == "test" else "train")
    write_images(content.root / name, 1, 0)


def _only_in_test(content):
    _need_split(content, "test")
    write_images(content.root / "test", 2, 0, ("elder",))


FOLDER_CHANGES: dict[str, tuple[Callable, list, str]] = {  # what is done, with which values, and what must come of it
    "image name": (_rename_image, list(ODD_NAMES), "run"),
    "class name": (_rename_class, list(ODD_NAMES), "run"),
    "undecodable image name": (_rename_image, ["\udcff"], "either"),
    "undecodable class name": (_rename_class, ["\udcff"], "either"),
    "fine image": (_fine, list(FINE), "run"),
    "broken image": (lambda c, name: _write(c, "train/apple/bad.png", BROKEN[name]), list(BROKEN), "refuse"),
    "broken test image": (lambda c, name: _write(c, "test/date/bad.png", BROKEN[name]), list(BROKEN), "refuse"),
    "no image": (
        _write,
        [
            *("train/apple/.DS_Store", "train/apple/._0.png", "train/apple/notes.txt", "train/apple/Thumbs.db"),
            *(".git/a/b.png", "train/.cache/a.png", "__MACOSX/train/apple/0.png", "README.md", "train/readme.txt"),
            *("raw/a/b.png", "annotations/x.xml", "runs/x/recipe.yaml", "train/@eaDir/apple/0.png", "dataset.json"),
            *("train/apple/.hidden/a.png", ".test/apple/0.png", "train_old/apple/0.png", "metadata.json"),
        ],
        "run",
    ),
    "special file": (
        _special,
        ["pipe", "socket", "dead link", "link to itself", "device"],
        "refuse",
    ),
    "link": (_link_to_image, [], "run"),
    "loop": (_loop, [], "refuse"),
    "nested": (_nested, [], "run"),
    "split name": (
        _rename_split,
        [["train", "Train"], ["train", "training"], ["test", "TEST"], ["test", "val"], ["test", "valid"]]
        + [["test", "validation"], ["test", "Testing"], ["train", "TRAINING"]],
        "run",
    ),
    "other split name": (_rename_split, [["train", "trian"], ["test", "holdout"], ["train", ".train"]], "refuse"),
    "empty class": (
        lambda c, name: (c.root / name).mkdir(parents=True),
        ["train/elder", "train/elder/images"],
        "refuse",
    ),
    "two splits": (_second_split, ["Train", "training", "TEST"], "refuse"),
    "fewer test classes": (_remove, ["test/date", "test/apple"], "run"),
    "fewer train classes": (_remove, ["train/date", "train/apple"], "refuse"),
    "missing split": (_remove, ["train", "test"], "refuse"),
    "one class": (_one_class, [], "refuse"),
    "only in test": (_only_in_test, [], "refuse"),
    "stray image": (lambda c: _write(c, "train/stray.png", png(4)), [], "either"),
    "stray image on top": (lambda c: _write(c, "stray.png", png(4)), [], "either"),
}


LAYOUTS = {"folders": FOLDER_CHANGES, "table": TABLE_CHANGES, "parquet": PARQUET_CHANGES}
WORDS = {
    "": [],
    "lazy": ["--augmentation", "random_resized_crop"],
    "streaming": ["--augmentation", "random_resized_crop", "--streaming", "true"],
}


def cases() -> st.SearchStrategy[dict]:
    """Return the strategy of cases. A change is [layout's change, its value or None, expectation]."""

    def of_layout(layout):
        single = [
            [name, value, expected]
            for name, (_, values, expected) in LAYOUTS[layout].items()
            for value in (values or [None])
        ]
        changes = st.lists(
            st.sampled_from(single), min_size=1, max_size=3, unique_by=lambda change: change[0].split()[-1]
        )
        words = st.sampled_from(["", "", "lazy", "streaming"])
        return st.fixed_dictionaries({"layout": st.just(layout), "words": words, "changes": changes})

    return st.one_of(map(of_layout, ("folders", "folders", *LAYOUTS)))


def build(case: dict, ground: Path, folder: Path) -> Plan:
    """Write the data folder with its changes; a run of two steps on it follows."""
    root = folder / "my data"
    content = Content(root, {"train": dict.fromkeys(CLASSES, 8), "test": dict.fromkeys(CLASSES, 4)})
    os.chdir(folder)  # for a socket, whose path must be short
    expected = expected_of(case["changes"])
    if case["layout"] == "folders":
        write_images(root / "train", 8, 0)
        write_images(root / "test", 4, 8)
    else:
        content.rows = {"train": rows(0, 8), "test": rows(8, 4)}
    for name, value, _ in case["changes"]:
        change, values, _ = LAYOUTS[case["layout"]][name]
        try:
            change(content, *([value] if values else []))
        except (OSError, KeyError, ValueError):  # it does not go with a change before it
            expected = "either"
    if case["layout"] != "folders":
        {"table": write_table, "parquet": write_parquet}[case["layout"]](content)
    write_recipe(folder / "recipe.yaml", LABELS_ALONE | {"dataset_name": "my data", "max_steps": 2})
    lazy = case["words"] != ""
    if expected == "refuse" and lazy and any("image" in name for name, _, _ in case["changes"]):
        expected = "either"  # two steps need not look at the image
    argv = ["train-teacher", "recipe.yaml", *WORDS[case["words"]]]
    return Plan(argv, expected, lambda records: check(folder / "out", content, records), lazy=lazy)


def check(output: Path, content: Content, records: type[Records]) -> str | None:
    """Return what is wrong with the numbers of images and classes of a run, or None."""
    facts = strict_json(output / "results.json")["dataset"]
    found = (facts["classes"], facts["train_images"], records.eval_images)
    right = (len(content.counts["train"]), content.images("train"), content.images("test"))
    if found != right:
        return f"(classes, training images, evaluation images) are {found} and not {right}"
    return None
