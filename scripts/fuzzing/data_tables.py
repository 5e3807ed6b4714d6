"""Tables of labels and Parquet files with changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .ground import BROKEN, CLASSES, Content, png


def _labels(content, values):
    """Give the classes other labels; the number of classes is the same."""
    for rows in content.rows.values():
        for row in rows:
            row["label"] = values[CLASSES.index(row["label"])]


def _first_label(content, value):
    given = content.rows["train"][0]["label"]  # a KeyError, if there is none to change
    if value == -1 and not isinstance(given, int):
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


def write_table(content: Content) -> None:
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


def write_parquet(content: Content) -> None:
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
    from pyarrow import parquet

    file = folder / "train.parquet"
    parquet.write_table(table.slice(0, 0) if how == "no rows" else table, file)
    if how == "two shards":
        parquet.write_table(table.slice(0, 20), folder / "train-00000-of-00002.parquet")
        parquet.write_table(table.slice(20), folder / "train-00001-of-00002.parquet")
        file.unlink()
    elif how == "hidden shard":
        parquet.write_table(table.slice(0, 5), folder / ".train-0.parquet")
    elif how == "other columns":
        file.rename(folder / "train-0.parquet")
        parquet.write_table(
            table.rename_columns([f"{name}_2" for name in table.column_names]), folder / "train-1.parquet"
        )
    elif how in ("empty file", "cut", "text"):
        file.write_bytes({"empty file": b"", "cut": file.read_bytes()[:-300], "text": b"PAR1 x PAR1"}[how])
    elif how in ("pipe", "dead link", "folder"):
        file.unlink()
        make = {"pipe": os.mkfifo, "dead link": lambda path: path.symlink_to("nowhere"), "folder": Path.mkdir}[how]
        make(file)


def rows(first: int, per_class: int) -> list[dict]:
    return [
        {"image": png(100 * number + i), "label": name}
        for i in range(first, first + per_class)
        for number, name in enumerate(CLASSES)
    ]
