"""Command-line parser of every command, which turns a command line into objects of the argument classes.

It uses one internal of argparse, `ArgumentParser._actions`, which TRL's parser uses as well. It uses two documented
attributes of transformers' HfArgumentParser: `_argument_group_name`, the title of a class's group in the help, and
`dataclass_types`, the classes to fill.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
from collections.abc import Sequence
from typing import Any, get_type_hints

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..errors import HfkdError, unknown_key_error
from .checks import AUTO
from .yaml_file import parse_yaml

NULLS = ("null", "Null", "NULL", "~")  # YAML's
HELP_WORDS = ("-h", "--help", "--help-all")
MORE_HELP = (
    "The keys of transformers' TrainingArguments, such as learning_rate, num_train_epochs and\n"
    "per_device_train_batch_size, can be set as well. `--help-all` explains them."
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows the default of every key and keeps the line breaks of description and epilog."""


class HelpAll(argparse.Action):
    """Option `--help-all`: print the help with the keys that `--help` leaves out."""

    def __call__(self, parser: ArgumentParser, namespace, values, option_string=None):
        parser.show_inherited()
        parser.print_help()
        parser.exit()


class ArgumentParser(HfArgumentParser):
    """Parser that fills argument classes and raises HfkdError where argparse would print and exit.

    `--help` explains each of hfkd's keys once. Keys that a class inherits unchanged from transformers'
    TrainingArguments form their own group, which only `--help-all` shows.

    Attributes:
        options: the option of every option string, such as `--seed` and `--no_bf16`.
    """

    def __init__(
        self,
        argument_classes: Sequence[type],
        usage: str,
        description: str | None = None,
        epilog: str | None = None,
    ):
        groups = [group for argument_class in argument_classes for group in _help_groups(argument_class)]
        super().__init__(
            groups, allow_abbrev=False, usage=usage, description=description, formatter_class=HelpFormatter
        )
        self.dataclass_types = list(argument_classes)
        self.options = {word: option for option in self._actions for word in option.option_strings}
        inherited = {
            field.name for group in groups if issubclass(group, Inherited) for field in dataclasses.fields(group)
        }
        self._hidden_help = {}
        for option in self._actions:
            if option.dest == "help":
                continue
            if option.dest == "torch_compile":
                option.type = _switch_or_auto
            if option.option_strings[0] != f"--{option.dest}":  # `--no_random_flip` means `--random_flip false`
                option.help = argparse.SUPPRESS
            del option.option_strings[1:]  # `--batch-size` is still accepted
            if option.choices is None:
                option.metavar = "VALUE"
            if option.required:
                option.help, option.default = f"{option.help} (required)", argparse.SUPPRESS
            if option.dest in inherited:
                self._hidden_help[option], option.help = option.help, argparse.SUPPRESS
        self.epilog = self._whole_epilog = epilog
        if inherited:
            self.epilog = f"{epilog}\n\n{MORE_HELP}" if epilog else MORE_HELP
            text = f"show this and the {len(inherited)} other keys of transformers' TrainingArguments, and exit"
            self.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help=text)

    def without_help(self, *keys: str) -> None:
        """Leave keys out of the help that a command accepts, as from a run's recipe, and does not use."""
        for option in self._actions:
            if option.dest in keys:
                option.help = argparse.SUPPRESS

    def not_required(self, key: str, default: str) -> None:
        """Say in the help what stands for a key where it is not given."""
        option = self.options[f"--{key}"]
        option.help = option.help.replace("(required)", f"By default {default}.")

    def show_inherited(self) -> None:
        """Add the keys of transformers to the help."""
        self.epilog = self._whole_epilog
        for option, text in self._hidden_help.items():
            option.help = text

    def answer_help(self, argv: Sequence[str]) -> None:
        """Print the help and exit if the arguments contain `-h`, `--help` or `--help-all`, even after wrong ones."""
        asked = [word for word in argv if word in HELP_WORDS]
        if asked:
            self.parse_args(["--help-all" if "--help-all" in asked and self._hidden_help else "--help"])

    def error(self, message: str):
        raise HfkdError(message)

    def option(self, token: str) -> argparse.Action | None:
        """Return the option that a token such as `--seed=3` or `--no_bf16` sets, or None."""
        return self.options.get(token.partition("=")[0])

    def settle(self, argv: Sequence[str]) -> tuple[list[str], set[str]]:
        """Return the arguments with mappings as JSON, without keys that are set to null, and the names of these keys.

        Null gives a key its default again, whatever was set before.

        Raises:
            HfkdError: for a mapping that is not valid YAML.
        """
        groups: list[list[str]] = []  # a key and its values each
        for token in argv:
            if token.startswith("--") or not groups:
                name, equals, value = token.partition("=")
                groups.append([name, value] if equals and self.option(token) else [token])
            else:
                groups[-1].append(token)
        kept: list[tuple[str, list[str]]] = []
        unset = set()
        for name, *values in groups:
            option = self.option(name)
            key = name if option is None else option.dest
            if option is not None and len(values) == 1 and values[0] in NULLS:
                kept = [(other, tokens) for other, tokens in kept if other != key]
                unset.add(key)
                continue
            if option is not None and len(values) == 1:
                tokens = [f"{name}={_as_json(values[0], name)}"]
            else:
                tokens = [name, *values]
            kept.append((key, tokens))
        return [token for _, tokens in kept for token in tokens], unset

    def check_keys(self, argv: Sequence[str], *others: ArgumentParser) -> None:
        """Check that the keys among the arguments are known; parameters of losses are not looked at.

        Args:
            others: parsers whose keys are known, too.

        Raises:
            HfkdError: for an unknown key, with the nearest valid one.
        """
        for token in argv:
            if not token.startswith("--") or token.startswith("--losses."):
                continue
            if all(parser.option(token) is None for parser in (self, *others)):
                raise self._unknown_key(token, *others)

    def _unknown_key(self, token: str, *others: ArgumentParser) -> HfkdError:
        classes = [cls for parser in (self, *others) for cls in parser.dataclass_types]
        keys = [field.name for cls in classes for field in dataclasses.fields(cls) if field.init]
        return unknown_key_error(token.lstrip("-").partition("=")[0], keys, "the command line")

    def parse(self, argv: list[str]) -> list:
        """Parse a command line into one object of each class.

        Raises:
            HfkdError: for an unknown key, with the nearest valid one, or a value of the wrong type.
        """
        argv, _ = self.settle(argv)
        # Before the objects are made, because TrainingArguments takes seconds to find its device.
        _, unknown = self.parse_known_args(argv)
        if unknown:
            raise self._unknown_key(unknown[0])
        return list(self.parse_args_into_dataclasses(argv, look_for_args_file=False))


def _as_json(value: str, key: str) -> str:
    """Return a mapping written as YAML as JSON, any other value as it is; of `losses` also one without braces."""
    if not value.startswith("{") and key != "--losses":
        return value
    given = parse_yaml(value, key)
    return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else value


class Inherited:
    """Base class for the help group of keys that are inherited unchanged from transformers' TrainingArguments."""

    _argument_group_name = "training (transformers' TrainingArguments)"


def _switch_or_auto(text: str) -> bool | str:
    """Return the value of a switch that may be left to measuring.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    try:
        return text if text == AUTO else string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be true, false or auto, got {text!r}") from None


def _help_groups(argument_class: type) -> list[type]:
    """Return the classes that represent an argument class in the help, each with its own group.

    A subclass of TrainingArguments is split into two: the keys that it declares and the keys that it inherits.
    """
    if not issubclass(argument_class, TrainingArguments):
        return [argument_class]
    types = get_type_hints(argument_class)
    fields = {field.name: field for field in dataclasses.fields(argument_class) if field.init}
    declared = [name for name in inspect.get_annotations(argument_class) if name in fields]
    inherited = [name for name in fields if name not in declared]

    def part(names: list[str], base: type) -> type:
        # Copy the fields, because a field belongs to one class. The classes are keyword-only, because fields without a
        # default may follow fields with one.
        entries = [(name, types[name], copy.copy(fields[name])) for name in names]
        return dataclasses.make_dataclass(base.__name__, entries, bases=(base,), kw_only=True)

    class Declared:
        _argument_group_name = argument_class._argument_group_name

    return [part(declared, Declared), part(inherited, Inherited)]


def to_argv(recipe: dict[str, Any], parser: ArgumentParser) -> list[str]:
    """Return the recipe as command-line tokens, so that the same parser checks recipe and command line."""
    tokens = []
    for key, value in recipe.items():
        if isinstance(value, list):
            if parser.option(f"--{key}").nargs != "+":
                raise HfkdError(f"{key} takes one value, got the list {value}.")
            tokens += [f"--{key}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            tokens.append(f"--{key}={json.dumps(value, ensure_ascii=False)}")
        elif value is False and key.endswith("_strategy"):
            tokens.append(f"--{key}=no")  # YAML 1.1 reads `no` as false, and so do its users
        elif value is not None:
            tokens.append(f"--{key}={value}")
    return tokens
