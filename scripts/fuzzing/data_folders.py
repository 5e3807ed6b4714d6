"""Data folders with changes: class folders, tables of labels and Parquet files, as people have them."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from .cases import CLASSES, LABELS_ALONE, Plan, Records, expected_of, strict_json, write_images, write_recipe

ODD_NAMES = (
    *("ü ñ 漢", "with space", "new\nline", "a'b\"c", "[x]{y}", "50%", "#1", "-x", "null", "a,b", "~", "*", "a\tb"),
    *("🙂", "x" * 100, "e\u0301", "train", "test", "007", "true", "$HOME"),
)


@dataclass
class Content:
    """Right content of a data folder: the images of each class by split; a change updates it.

    `rows` are those of a table or of Parquet files, before they are written; `kind` says how the file is written.
    """

    root: Path
    counts: dict[str, dict[str, int]]
    rows: dict[str, list[dict]] = field(default_factory=dict)
    kind: str | None = None

    def images(self, split: str) -> int:
        return sum(self.counts[split].values())

    def add(self, split: str = "train", number: int = 1, name: str = CLASSES[0]) -> None:
        self.counts[split][name] += number


def png(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (16, 16), suffix: str = "PNG") -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 250, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(stream, suffix)
    return stream.getvalue()


def _huge_png(side: int) -> bytes:
    """Return a PNG whose header says side x side, with a few bytes of pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


BROKEN = {
    "empty": b"",
    "text": b"<html>404</html>",
    "cut": png(1, size=(64, 64))[:400],
    "cut JPEG": png(1, size=(64, 64), suffix="JPEG")[:900],
    "claims 60,000": _huge_png(60_000),
    "claims 2**31": _huge_png(2**31 - 1),
    "claims 9,000": _huge_png(9_000),
    "16 bit": png(1, "I;16"),
    "no pixels": _huge_png(0),
}
FINE = {
    "a.PNG": png(2),
    "a.jpg": png(2, suffix="JPEG"),
    "a.JPEG": png(2, suffix="JPEG"),
    "a.bmp": png(2, suffix="BMP"),
    "a.gif": png(2, suffix="GIF"),
    "a.tif": png(2, suffix="TIFF"),
    "a.webp": png(2, suffix="WEBP"),
    "grey.png": png(2, "L"),
    "palette.png": png(2, "P"),
    "alpha.png": png(2, "RGBA"),
    "two.png": png(2, "1"),
    "cmyk.jpg": png(2, "CMYK", suffix="JPEG"),
    "other.png": png(2, suffix="JPEG"),
    "large.png": png(2, size=(300, 200)),
    "tiny.png": png(2, size=(1, 1)),
    "thin.png": png(2, size=(400, 1)),
}

# ---- Class folders -------------------------------------------------------------------------------------------------


def _write(content, path, data=b"x"):
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


def _only_in_test(content):
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
    "two splits": (lambda c, name: write_images(c.root / name, 1, 0), ["Train", "training", "TEST"], "refuse"),
    "fewer test classes": (_remove, ["test/date", "test/apple"], "run"),
    "fewer train classes": (_remove, ["train/date", "train/apple"], "refuse"),
    "missing split": (_remove, ["train", "test"], "refuse"),
    "one class": (_one_class, [], "refuse"),
    "only in test": (_only_in_test, [], "refuse"),
    "stray image": (lambda c: _write(c, "train/stray.png", png(4)), [], "either"),
    "stray image on top": (lambda c: _write(c, "stray.png", png(4)), [], "either"),
}

# ---- Tables and Parquet files --------------------------------------------------------------------------------------


def _labels(content, values):
    """Give the classes other labels; the number of classes is the same."""
    for rows in content.rows.values():
        for row in rows:
            row["label"] = values[CLASSES.index(row["label"])]


def _first_label(content, value):
    if value == -1 and not isinstance(content.rows["train"][0]["label"], int):
        raise ValueError("the labels are text")
    content.rows["train"][0]["label"] = value


def _first_image(content, name):
    content.rows["train"][0]["image"] = BROKEN[name]


def _extra_column(content, name):
    for rows in content.rows.values():
        for i, row in enumerate(rows):
            row[name] = f"x {i}" if name != "id" else i


def _drop_label(content):
    for rows in content.rows.values():
        for row in rows:
            del row["label"]


def _kind_of_file(content, kind):
    content.kind = kind


LABELS: dict[str, tuple[Callable, list, str]] = {
    "labels": (
        _labels,
        [[0, 1, 2, 3], [1, 2, 3, 4], [0, 10, 20, 30], [3, 2, 1, 0], ["b", "a", "c", "é"], ["1", "2", "10", "x"]],
        "run",
    ),
    "bad labels": (_labels, [[0.5, 1.5, 2.5, 3.5], [1, 1, 1, 1]], "refuse"),
    "first label": (_first_label, [None], "refuse"),
    "no label column": (_drop_label, [], "refuse"),
}
TABLE_CHANGES = {
    "labels": (_labels, LABELS["labels"][1], "run"),
    "one label": (_labels, [[1, 1, 1, 1], ["a", "a", "a", "a"]], "refuse"),
    "first label": (_first_label, [""], "refuse"),
    "first image": (_first_image, list(BROKEN), "refuse"),
    "no label column": (_drop_label, [], "refuse"),
    "file": (
        _kind_of_file,
        ["missing image", "empty file", "header only", "not UTF-8", "long row", "short row", "pipe"],
        "refuse",
    ),
    "kind of file": (_kind_of_file, ["CRLF", "BOM", "semicolons", "quoted", "blank line", "spare image"], "run"),
    "odd file": (_kind_of_file, ["row twice", "outside", "name of a pipe"], "either"),
    "column": (_extra_column, ["id", "note", "ü"], "run"),
}
PARQUET_CHANGES = LABELS | {
    "first image": (_first_image, list(BROKEN), "refuse"),
    "first image missing": (lambda c: c.rows["train"][0].update(image=None), [], "refuse"),
    "unlabelled": (_first_label, [-1], "either"),
    "file": (
        _kind_of_file,
        ["empty file", "cut", "text", "pipe", "dead link", "folder", "no test", "no rows", "other columns"],
        "refuse",
    ),
    "kind of file": (_kind_of_file, ["two shards", "hidden shard", "data folder", "large strings"], "run"),
    "column": (_extra_column, ["id", "note", "ü"], "run"),
}


def _write_table(content: Content) -> None:
    how = content.kind
    for split, rows in content.rows.items():
        folder = content.root / split
        folder.mkdir(parents=True)
        separator = ";" if how == "semicolons" else ","
        names = [name for name in (rows[0] if rows else {}) if name != "image"]
        lines = [separator.join(["file_name", *names])]
        for i, row in enumerate(rows):
            (folder / f"{i}.png").write_bytes(row["image"])
            cells = [f"{i}.png", *(str(row[name]) for name in names)]
            lines.append(separator.join(f'"{cell}"' if how == "quoted" else cell for cell in cells))
        if split == "train":
            _damage_table(content, folder, lines, how)
        text = ("\r\n" if how == "CRLF" else "\n").join(lines) + "\n"
        data = text.encode("utf-8-sig" if how == "BOM" else "utf-8")
        if split == "train":
            data = {"empty file": b"", "not UTF-8": data + b"\xff\xfe,\xff\n"}.get(how, data)
        (folder / "labels.csv").write_bytes(data)
    if how == "pipe":
        (content.root / "train/labels.csv").unlink()
        os.mkfifo(content.root / "train/labels.csv")


def _damage_table(content, folder, lines, how):
    if how == "missing image":
        (folder / "3.png").unlink()
    elif how == "header only":
        del lines[1:]
    elif how == "long row":
        lines[2] += ",x,y"
    elif how == "short row":
        lines[2] = lines[2].partition(",")[0]
    elif how == "blank line":
        lines.insert(2, "")
    elif how == "spare image":
        (folder / "spare.png").write_bytes(png(5))
    elif how == "row twice":
        lines.append(lines[1])
        content.add()
    elif how == "outside":
        (content.root / "outside.png").write_bytes(png(6))
        lines.append(lines[1].replace("0.png", "../outside.png"))
        content.add()
    elif how == "name of a pipe":
        os.mkfifo(folder / "pipe.png")
        lines.append(lines[1].replace("0.png", "pipe.png"))


def _write_parquet(content: Content) -> None:
    import pyarrow
    import pyarrow.parquet

    how = content.kind
    folder = content.root / "data" if how == "data folder" else content.root
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in content.rows.items():
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["image"] = [None if data is None else {"bytes": data, "path": None} for data in columns["image"]]
        types = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        arrays = {name: pyarrow.array(v, types if name == "image" else None) for name, v in columns.items()}
        if how == "large strings" and pyarrow.types.is_string(arrays["label"].type):
            arrays["label"] = arrays["label"].cast(pyarrow.large_string())
        table = pyarrow.table(arrays)
        if split == "train":
            _write_train_parquet(content, folder, table, how)
        elif how != "no test":
            pyarrow.parquet.write_table(table, folder / "test.parquet")


def _write_train_parquet(content, folder, table, how):
    from pyarrow.parquet import write_table

    file = folder / "train.parquet"
    write_table(table.slice(0, 0) if how == "no rows" else table, file)
    if how == "two shards":
        write_table(table.slice(0, 20), folder / "train-00000-of-00002.parquet")
        write_table(table.slice(20), folder / "train-00001-of-00002.parquet")
        file.unlink()
    elif how == "hidden shard":
        write_table(table.slice(0, 5), folder / ".train-0.parquet")
    elif how == "other columns":
        file.rename(folder / "train-0.parquet")
        write_table(table.rename_columns([f"{name}_2" for name in table.column_names]), folder / "train-1.parquet")
    elif how in ("empty file", "cut", "text"):
        file.write_bytes({"empty file": b"", "cut": file.read_bytes()[:-300], "text": b"PAR1 x PAR1"}[how])
    elif how in ("pipe", "dead link", "folder"):
        file.unlink()
        make = {"pipe": os.mkfifo, "dead link": lambda path: path.symlink_to("nowhere"), "folder": Path.mkdir}[how]
        make(file)


def _rows(first: int, per_class: int) -> list[dict]:
    return [
        {"image": png(100 * number + i), "label": name}
        for i in range(first, first + per_class)
        for number, name in enumerate(CLASSES)
    ]


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
        content.rows = {"train": _rows(0, 8), "test": _rows(8, 4)}
    for name, value, _ in case["changes"]:
        change, values, _ = LAYOUTS[case["layout"]][name]
        try:
            change(content, *([value] if values else []))
        except (OSError, KeyError, ValueError):  # it does not go with a change before it
            expected = "either"
    if case["layout"] != "folders":
        {"table": _write_table, "parquet": _write_parquet}[case["layout"]](content)
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
