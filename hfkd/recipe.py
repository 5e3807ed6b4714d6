"""Recipes: a YAML file over at most one parent, then the command line, become the three argument classes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .arguments import DataArguments, DistillationConfig, ModelArguments
from .losses import LOSSES

ARGUMENT_CLASSES = (ModelArguments, DataArguments, DistillationConfig)
# Secrets, and what is no setting.
NOT_RECORDED = {"hub_token", "push_to_hub_token", "resume_from_checkpoint", "allow_recipe_change"}
NO_SETTINGS = ("extends", "search")  # of the run: a parent, and what `hfkd search` tries
KEYS = [field.name for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls) if field.init]

RECIPE_HELP = (
    "A recipe is a YAML file of the keys below, laid over the one that it `extends`.\n"
    "What is set behind it on the command line wins."
)


def unknown_key_error(key: str, valid: list[str], where: str) -> ValueError:
    """The error for a name that nobody knows, with the nearest one that somebody does."""
    nearest = difflib.get_close_matches(key, valid, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else " `--help` lists the valid keys."
    return ValueError(f"Unknown key '{key}' in {where}.{hint}")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Reads a recipe and, where it `extends` another one (relative to itself), lays it over its parent.

    Mappings such as `losses` are replaced whole, not merged: what a recipe says of its losses stands in one place.

    Raises:
        FileNotFoundError: if the recipe or its parent does not exist.
        ValueError: for invalid YAML, an unknown key, or a parent that extends a third recipe.
    """
    path = Path(path)
    recipe = _read_yaml(path)
    parent_name = recipe.pop("extends", None)
    if parent_name is None:
        return recipe
    parent_path = path.parent / parent_name
    parent = _read_yaml(parent_path)
    if "extends" in parent:
        raise ValueError(f"{parent_path} is extended by {path} and extends a recipe itself: only one level is allowed.")
    return parent | recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        nearest = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / nearest[0]}?" if nearest else ""
        raise FileNotFoundError(f"There is no recipe at {path}.{hint}")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, got {type(recipe).__name__}.")
    for key in recipe:
        if key not in (*KEYS, *NO_SETTINGS):
            raise unknown_key_error(str(key), [*KEYS, *NO_SETTINGS], str(path))
    return recipe


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
        raise ValueError(message)

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


def parse_recipe(
    argv: list[str] | None = None, command: str = "hfkd distill"
) -> tuple[ModelArguments, DataArguments, DistillationConfig, dict]:
    """Parses `recipe.yaml [--key value ...]`; the command line wins over the recipe, the recipe over the defaults.

    A loss parameter is set by its path (`--losses.dkd.beta 2`). Without `output_dir` a run goes to `runs/` under the
    recipe's own path below the `recipes` folder.

    Returns:
        The three argument objects and the resolved recipe: one flat mapping of every key that was set.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: without a recipe; for an unknown key or a value of the wrong type, naming both.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = f"{command} recipe.yaml [--key value ...]"
    parser = ArgumentParser(ARGUMENT_CLASSES, usage, RECIPE_HELP, methods_help())
    if not {"-h", "--help"}.isdisjoint(argv):
        parser.parse_args(["--help"])
    path, overrides = argv[0] if argv else "", argv[1:]
    if not path or path.startswith("-"):
        raise ValueError(f"The first argument must be a recipe, got '{path}': {usage}. `--help` explains every key.")
    recipe = load_recipe(path)
    recipe.pop("search", None)
    losses, overrides = _split_loss_overrides(recipe.get("losses") or {}, overrides)
    recipe["losses"] = losses
    recipe.setdefault("output_dir", default_output_dir(path))
    argv = to_argv(recipe, parser) + overrides
    return *parser.parse(argv), _resolve(parser, argv)


def methods_help() -> str:
    """Every method with its parameters and their defaults, one a line."""
    lines = ["methods, whose parameters are set by --losses.METHOD.PARAMETER VALUE:"]
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss).parameters.values()
        lines.append(f"  {name}: {', '.join(str(p.replace(annotation=p.empty)) for p in parameters)}")
    return "\n".join(lines)


def _resolve(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Every key that `argv` sets, with its value as typed: what the argument classes make of it is not a recipe's."""
    values = vars(parser.parse_known_args(argv)[0])
    options = [parser.option(token) for token in argv]
    resolved = {option.dest: values[option.dest] for option in options if option is not None}
    for key, value in resolved.items():
        if isinstance(value, str) and value.startswith("{"):
            resolved[key] = json.loads(value)
    return {key: value for key, value in resolved.items() if key not in NOT_RECORDED}


def recipe_name(path: str | Path) -> str:
    """`cifar100/a-b/kd` of `recipes/cifar100/a-b/kd.yaml`; of a recipe from elsewhere its file's name alone."""
    parts = Path(path).resolve().with_suffix("").parts
    if "recipes" in parts:
        return str(Path(*parts[len(parts) - parts[::-1].index("recipes") :]))
    return parts[-1]


def default_output_dir(path: str | Path) -> str:
    """`recipes/cifar100/a-b/kd.yaml` runs in `runs/cifar100/a-b/kd`; a recipe from elsewhere in `runs/<its name>`."""
    return str(Path("runs", recipe_name(path)))


def _split_loss_overrides(losses: dict, argv: list[str]) -> tuple[dict, list[str]]:
    """Takes `--losses.method.parameter value` out of `argv` and writes it into a copy of `losses`."""
    if not isinstance(losses, dict):
        raise ValueError(f"losses must map method names to their parameters, got {losses!r}.")
    losses = {method: dict(parameters or {}) for method, parameters in losses.items()}
    rest, tokens = [], iter(argv)
    for token in tokens:
        if not token.startswith("--losses."):
            rest.append(token)
            continue
        name, has_value, value = token.partition("=")
        path = name[len("--losses.") :].split(".")
        value = value if has_value else next(tokens, None)
        if len(path) != 2 or not value:
            raise ValueError(f"'{token}' must read --losses.METHOD.PARAMETER VALUE.")
        if any(other.partition("=")[0] == "--losses" for other in argv):
            raise ValueError(f"--losses replaces all losses: give it, or '{token}', but not both.")
        losses.setdefault(path[0], {})[path[1]] = yaml.safe_load(value)
    return losses, rest


def to_argv(recipe: dict[str, Any], parser: ArgumentParser) -> list[str]:
    """The recipe as command-line tokens, so that one parser converts and checks the types of both."""
    tokens = []
    for key, value in recipe.items():
        if isinstance(value, list):
            if parser.option(f"--{key}").nargs != "+":
                raise ValueError(f"{key} takes one value, got the list {value}.")
            tokens += [f"--{key}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            tokens.append(f"--{key}={json.dumps(value)}")
        elif value is False and key.endswith("_strategy"):
            tokens.append(f"--{key}=no")  # YAML 1.1 reads `no` as false
        elif value is not None:
            tokens.append(f"--{key}={value}")
    return tokens
