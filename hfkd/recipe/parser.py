"""The command-line parser behind every command: argument classes in, checked objects out."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..errors import HfkdError, unknown_key_error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every key with its default; the lines before and after the keys as they are."""


class ArgumentParser(HfArgumentParser):
    """Fills argument classes from the command line; raises ValueError where argparse would print and exit.

    `--help` explains each key once, those of transformers' TrainingArguments behind our own.
    """

    def __init__(self, argument_classes, usage: str, description: str | None = None, epilog: str | None = None):
        super().__init__(
            argument_classes,
            allow_abbrev=False,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
        )
        for option in self._actions[1:]:  # the first is --help
            del option.option_strings[1:]  # `--batch-size` is understood, too
            if isinstance(option, argparse._StoreFalseAction):  # `--no_random_flip`: the same as `--random_flip false`
                option.help = argparse.SUPPRESS
            if option.choices is None:
                option.metavar = "VALUE"
            if option.required:
                option.help, option.default = f"{option.help} (required)", argparse.SUPPRESS

    def _add_dataclass_arguments(self, argument_class: type):
        inherits = issubclass(argument_class, TrainingArguments)
        self._inherited = {field.name for field in dataclasses.fields(TrainingArguments)} if inherits else set()
        super()._add_dataclass_arguments(argument_class)

    def _parse_dataclass_field(self, group, field: dataclasses.Field):
        super()._parse_dataclass_field(self._training_group if field.name in self._inherited else group, field)

    @functools.cached_property
    def _training_group(self):
        return self.add_argument_group("training (transformers' TrainingArguments)")

    def error(self, message: str):
        raise HfkdError(message)

    def option(self, token: str) -> argparse.Action | None:
        """The option that a command-line token such as `--seed=3` or `--no_bf16` names, if it names one."""
        return self._option_string_actions.get(token.partition("=")[0])

    def parse(self, argv: list[str]) -> list:
        """One object a class.

        Raises:
            ValueError: for an unknown key, with the nearest valid one, or a value of the wrong type.
        """
        *parsed, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            keys = [field.name for cls in self.dataclass_types for field in dataclasses.fields(cls) if field.init]
            raise unknown_key_error(unknown[0].lstrip("-").partition("=")[0], keys, "the command line")
        return parsed


def to_argv(recipe: dict[str, Any], parser: ArgumentParser) -> list[str]:
    """The recipe as command-line tokens, so that one parser converts and checks the types of both."""
    tokens = []
    for key, value in recipe.items():
        if isinstance(value, list):
            if parser.option(f"--{key}").nargs != "+":
                raise HfkdError(f"{key} takes one value, got the list {value}.")
            tokens += [f"--{key}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            tokens.append(f"--{key}={json.dumps(value)}")
        elif value is False and key.endswith("_strategy"):
            tokens.append(f"--{key}=no")  # YAML 1.1 reads `no` as false
        elif value is not None:
            tokens.append(f"--{key}={value}")
    return tokens
