"""Command lines of the form `SUBJECT [--key value ...]`, such as `MODEL --batch_size 100`."""

from __future__ import annotations

from pathlib import Path

from ..errors import HfkdError, NotFoundError
from ..names import hub_id
from ..recipe.checks import check_name
from ..recipe.parser import ArgumentParser
from ..runs.finished import runs_nearby
from ..runs.folder import CONFIG_NAME, ROLES

MODEL = "the model's folder or Hub id"


def split_subject(argv: list[str], parser: ArgumentParser, subject: str = MODEL) -> tuple[str, list[str]]:
    """Split a command line into its subject, the first argument, and the rest; print the help if it is asked for.

    Args:
        parser: parser of the rest, whose usage is part of the message.
        subject: description of the subject, for the message.

    Raises:
        ValueError: if the first argument is missing or a key.
        SystemExit: after the help.
    """
    parser.answer_help(argv)
    if not argv or argv[0].startswith("-"):
        given = argv[0].partition("=")[0] if argv else ""  # the value may be a token
        raise HfkdError(f"The first argument must be {subject}, got '{given}'. Usage: {parser.usage}")
    check_name("The first argument", argv[0])
    return argv[0], argv[1:]


def parse_with_subject(argv: list[str], parser: ArgumentParser, subject: str = MODEL) -> tuple:
    """Parse `SUBJECT [--key value ...]`.

    Returns:
        The subject and one object for each of the parser's argument classes.

    Raises:
        ValueError: without a subject, for an unknown key, with the nearest valid one, or a value of the wrong type.
        SystemExit: after the help, if it is asked for.
    """
    first, rest = split_subject(argv, parser, subject)
    return first, *parser.parse(rest)


def parse_known(argv: list[str], parser: ArgumentParser) -> tuple:
    """Parse the keys that a parser knows.

    Returns:
        One object for each of the parser's argument classes, and the list of the other words.
    """
    return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)


def check_trained(name: str) -> None:
    """Check that a name is the folder of a trained model or a Hub id.

    Raises:
        HfkdError: for the name of an architecture, which has no trained weights.
        NotFoundError: for a folder that does not exist, or that holds no model.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / CONFIG_NAME).is_file():
            return
        near = [folder / role for role in ROLES if (folder / role / CONFIG_NAME).is_file()]
        hint = f"Did you mean {near[0]}?" if near else "Give the folder of a trained model, such as runs/.../student."
        raise NotFoundError(f"{name} holds no model ({CONFIG_NAME}). {hint}")
    if hub_id(name) is not None:
        return
    import timm  # takes seconds, and most names need it not

    if timm.is_model(name):
        raise HfkdError(f"{name} is an architecture, not a trained model: give the folder of a run, or a Hub id.")
    raise NotFoundError(
        f"There is no model at {name}: give the folder of a trained model, or a Hub id.{runs_nearby(folder)}"
    )
