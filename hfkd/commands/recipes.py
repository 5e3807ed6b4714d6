"""`hfkd recipes`: the recipes that come with hfkd, listed, searched and copied."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HfkdError, unknown_key_error
from ..recipe.finding import LOCAL, SUFFIX, find_recipe, names_below, packaged_names
from ..recipe.parser import ArgumentParser
from ..recipe.reading import load_recipe
from ..recipe.yaml_file import dump_yaml
from ..runs.tables import markdown_table
from .arguments import parse_known

USAGE = "hfkd recipes [WORD ...] [--copy NAME [FILE]]"
DESCRIPTION = (
    "List the recipes that come with hfkd, and those below `recipes` in the current folder. With words, list those\n"
    "whose row holds all of them. `hfkd distill NAME` trains one. --copy writes one as a file, to be changed."
)


@dataclass
class RecipesArguments:
    """Settings of the list."""

    _argument_group_name = "recipes"  # in `--help`

    copy: list[str] | None = field(
        default=None,
        metadata={
            "help": "Name of a recipe, and the file that it is written to, with all its keys; by default the last part "
            "of its name in the current folder."
        },
    )


def recipes(argv: list[str] | None = None) -> list[str]:
    """List, search or copy recipes: `[WORD ...] [--copy NAME [FILE]]`.

    Returns:
        The names of the listed or copied recipes.

    Raises:
        HfkdError: if no recipe matches, or the file to write exists.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser((RecipesArguments,), USAGE, DESCRIPTION)
    parser.answer_help(argv)
    args, words = parse_known(argv, parser)
    options = [word for word in words if word.startswith("-")]
    if options:
        raise unknown_key_error(options[0].lstrip("-").partition("=")[0], ["copy"], "the command line")
    return [copied(*args.copy)] if args.copy else listed(words)


def listed(words: list[str]) -> list[str]:
    """Print a table of the recipes whose rows hold all words, and return their names.

    Raises:
        HfkdError: if there are none.
    """
    rows = [_row(name) for name in sorted({*packaged_names(), *names_below(LOCAL)})]
    found = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
    if not found:
        raise HfkdError(f"No recipe has {' and '.join(map(repr, words))} in its row. `hfkd recipes` lists all.")
    print(markdown_table(["recipe", "student", "losses", "published top-1"], found, padded=True))
    return [row[0] for row in found]


def _row(name: str) -> list[str]:
    recipe = load_recipe(name)
    losses = [*(recipe.get("losses") or {}), *["Z-score"] * bool(recipe.get("logit_standardization"))]
    top1 = recipe.get("published_top1")
    return [name, recipe["student_name_or_path"], " + ".join(losses), "" if top1 is None else f"{top1:.2f}"]


def copied(name: str, file: str | None = None, *rest: str) -> str:
    """Write a recipe, with the keys of all that it extends, into a file, and return its name.

    Raises:
        NotFoundError: if there is no such recipe.
        HfkdError: if the file exists or cannot be written.
    """
    if rest:
        raise HfkdError(f"--copy takes the name of one recipe and one file, got also {' '.join(rest)}.")
    source = find_recipe(name)
    path = Path(file or f"{source.name.rpartition('/')[2]}{SUFFIX}")
    text = f"# Copied from {source.name}:\n#   hfkd distill {path}\n{dump_yaml(load_recipe(name))}"
    try:
        with path.open("x", encoding="utf-8") as written:
            written.write(text)
    except FileExistsError:
        raise HfkdError(f"{path} exists. Give another file: --copy {name} FILE.") from None
    except OSError as error:
        raise HfkdError(f"{path} cannot be written ({error.strerror}). Give another file.") from error
    print(f"{path} holds the recipe {source.name}, to be changed. Train it with `hfkd distill {path}`.")
    return source.name
