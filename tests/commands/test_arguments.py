"""Command lines of a subject and keys."""

from dataclasses import dataclass, field

import pytest

from hfkd.commands.arguments import parse_known, parse_with_subject, split_subject
from hfkd.recipe.parser import ArgumentParser


@dataclass
class Arguments:
    """Arguments of a test."""

    size: int = field(default=3, metadata={"help": "Size."})


def parser():
    return ArgumentParser((Arguments,), "hfkd measure THING [--size N]")


def test_the_subject_comes_first():
    assert parse_with_subject(["x", "--size", "4"], parser()) == ("x", Arguments(4))
    assert split_subject(["x", "--other", "4"], parser()) == ("x", ["--other", "4"])
    assert parse_known(["--size=5", "--other", "4"], parser()) == (Arguments(5), ["--other", "4"])
    with pytest.raises(ValueError, match="Unknown key 'sise'.*Did you mean 'size'"):
        parse_with_subject(["x", "--sise", "4"], parser())


@pytest.mark.parametrize("argv, given", [([], ""), (["--size", "4", "x"], "--size"), (["--token=secret"], "--token")])
def test_a_missing_subject(argv, given):
    message = rf"^The first argument must be a thing, got '{given}'. Usage: hfkd measure THING \[--size N\]$"
    with pytest.raises(ValueError, match=message):
        parse_with_subject(argv, parser(), "a thing")


@pytest.mark.parametrize("argv", [["--help"], ["x", "-h"], ["--size", "4", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as ending:
        split_subject(argv, parser())
    assert ending.value.code == 0 and capsys.readouterr().out.startswith("usage: hfkd measure THING")
