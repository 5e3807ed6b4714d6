"""Markdown and CSV tables: alignment, bars in cells, empty columns."""

from hfkd.runs.tables import csv_table, markdown_table, plain, without_empty_columns

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


def test_csv_holds_no_formulas():
    """A spreadsheet would run them; numbers stay numbers."""
    row = ['=HYPERLINK("x")', "+1+1", "@SUM(A1)", "-2+3", "-0.5", -0.5, "+3e4", "a=b", None, "-inf"]
    (line,) = csv_table([], [row]).splitlines()[1:]
    assert line == '"\'=HYPERLINK(""x"")",\'+1+1,\'@SUM(A1),\'-2+3,-0.5,-0.5,+3e4,a=b,,-inf'


def test_cells_end_no_row_and_command_no_terminal():
    assert markdown_table(["a"], [["b\n| c\x1b[2J"]]).splitlines()[2:] == ["| b \\| c [2J |"]


def test_text_of_others_is_shown_as_it_is():
    assert plain("<b>![x](y)`z`\n") == "\\<b\\>![x\\](y)\\`z\\` "
