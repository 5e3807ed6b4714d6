"""Markdown and CSV tables: alignment, bars in cells, empty columns."""

from hfkd.runs.tables import csv_table, markdown_table, without_empty_columns

HEADER, ROWS = ["run", "top-1", "note"], [["a|b", "71.5", ""], ["kd", 9, "short"]]


def test_plain():
    assert markdown_table(["", "top-1"], [["kd", 71.5]]) == "|  | top-1 |\n| --- | --- |\n| kd | 71.5 |"


def test_padded():
    assert markdown_table(HEADER, ROWS, padded=True, right={"top-1"}).splitlines() == [
        "| run  | top-1 | note  |",
        "| ---- | ----: | ----- |",
        "| a\\|b |  71.5 |       |",
        "| kd   |     9 | short |",
    ]


def test_compact():
    assert markdown_table(["", "kd"], [["top-1", "–"]], compact=True) == "| | kd |\n|---|---|\n| top-1 | – |"


def test_columns_without_a_value_are_left_out():
    header, rows = without_empty_columns(HEADER, [["", "-", "x"], ["", "", "-"]], empty=("", "-"))
    assert header == ["run", "note"] and rows == [["", "x"], ["", "-"]], "the first column always stays"


def test_csv():
    assert csv_table(["run", "top-1"], [["a, b", None], ["c", 71.123456]]) == 'run,top-1\n"a, b",\nc,71.123456\n'
