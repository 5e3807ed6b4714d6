"""Reading of recipes: from a YAML file, its parent and the command line to objects of the argument classes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import HfkdError, unknown_key_error
from ..losses import LOSSES, build_losses, installed_losses
from .arguments import DataArguments, ModelArguments
from .config import DistillationConfig
from .finding import RecipeSource, find_recipe, name_from
from .keys import NOT_RECORDED, SECTIONS
from .parser import ArgumentParser, to_argv
from .yaml_file import parse_yaml

logger = logging.get_logger(__name__)

ARGUMENT_CLASSES = (ModelArguments, DataArguments, DistillationConfig)
KEYS = [field.name for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls) if field.init]

RECIPE_HELP = (
    "RECIPE is the name of a recipe that comes with hfkd (`hfkd recipes` lists them) or the path of a YAML file\n"
    "of the keys below. Its keys override the recipe that it `extends`, and keys on the command line override\n"
    "both. null gives a key its default again.\n\n"
    "Without RECIPE, --dataset_name, --teacher and --student are enough. The other keys are then those of the\n"
    "recipe photographs/student, and what suits the student and the machine."
)


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe, found by `find_recipe`, including the keys of the recipe that it `extends`.

    The parent is looked for in the recipe's folder first. It may extend a recipe in turn. Mappings such as `losses` are
    replaced and not merged, so that all losses of a recipe are in one place.

    Raises:
        NotFoundError: if the recipe or one that it extends does not exist.
        HfkdError: for invalid YAML, an unknown key, a recipe that extends itself, or a file of several recipes.
    """
    return _merged(_lineage(name))


def _lineage(name: str | Path) -> list[tuple[RecipeSource, dict[str, Any]]]:
    """Return a recipe and all that it extends, the nearest first, each with its own keys."""
    source = find_recipe(name)
    several = source.section_names() if source.section is None else []
    if several:
        raise HfkdError(f"{source} holds several recipes. Name one of them: {', '.join(several)}.")
    lineage: list[tuple[RecipeSource, dict[str, Any]]] = []
    while True:
        if source.identity in [other.identity for other, _ in lineage]:
            chain = " extends ".join(map(str, [*(other for other, _ in lineage), source]))
            raise HfkdError(f"{chain}: a recipe cannot extend itself. Remove one of the `extends`.")
        keys = _own_keys(source)
        lineage.append((source, keys))
        parent = keys.pop("extends", None)
        if parent is None:
            return lineage
        if not isinstance(parent, str):
            raise HfkdError(f"extends in {source} must be the name or path of one recipe, got {parent!r}.")
        source = find_recipe(parent, source.path.parent)


def _merged(lineage: list[tuple[RecipeSource, dict[str, Any]]]) -> dict[str, Any]:
    return functools.reduce(lambda recipe, step: recipe | step[1], reversed(lineage), {})


def _own_keys(source: RecipeSource) -> dict[str, Any]:
    keys = source.keys()
    for key in keys:
        if key not in (*KEYS, *SECTIONS):
            raise unknown_key_error(str(key), [*KEYS, *SECTIONS], str(source))
    teacher = keys.get("teacher_recipe")
    if isinstance(teacher, str):
        keys["teacher_recipe"] = name_from(teacher, source.path.parent)
    return copy.deepcopy(keys)  # a file may be read once for several recipes


def parse_recipe(
    argv: list[str] | None = None, command: str = "hfkd distill"
) -> tuple[ModelArguments, DataArguments, DistillationConfig, dict]:
    """Parse `RECIPE [--key value ...]`; the command line overrides the recipe, the recipe the defaults.

    A loss parameter is set by its path (`--losses.dkd.beta 2`). The default of `output_dir` is `runs/` followed by the
    recipe's name.

    Returns:
        The three argument objects and the resolved recipe, a flat mapping of every key that was set.

    Raises:
        NotFoundError: if the recipe does not exist.
        HfkdError: if no recipe is given, for an unknown key, or for a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = f"{command} RECIPE [--key value ...]"
    parser = ArgumentParser(ARGUMENT_CLASSES, usage, RECIPE_HELP, methods_help())
    parser.answer_help(argv)
    path, overrides = argv[0] if argv else "", argv[1:]
    if not path or path.startswith("-"):
        raise HfkdError(
            f"The first argument must be a recipe, got '{path}': {usage}. Without one, give --dataset_name, --teacher "
            "and --student."
        )
    lineage = _lineage(path)
    recipe = _merged(lineage)
    recipe.pop("search", None)
    overrides, unset = parser.settle(overrides)
    recipe = {key: value for key, value in recipe.items() if value is not None and key not in unset}
    recipe["losses"], overrides = _split_loss_overrides(recipe.get("losses") or {}, overrides)
    recipe.setdefault("output_dir", str(Path("runs", lineage[0][0].name)))
    shortened = _shortened(recipe, overrides, parser)
    argv = to_argv(recipe | shortened, parser) + overrides
    model_args, data_args, config = parser.parse(argv)
    if shortened and config.process_index == 0:
        changes = ", ".join(f"{key} {value}" for key, value in shortened.items())
        logger.warning(f"quantize goes on from a trained student, so the recipe is shortened: {changes}.")
    if any(":" in str(method) for method in config.losses):
        _look_for_code([source.path.parent for source, _ in lineage if not source.is_packaged])
    build_losses(config.losses, config.logit_standardization)  # finds mistakes before data and networks are loaded
    resolved = _resolve(parser, argv)
    config.written = frozenset(resolved)
    return model_args, data_args, config, resolved


def _shortened(recipe: dict[str, Any], overrides: list[str], parser: ArgumentParser) -> dict[str, Any]:
    """Return the keys of a recipe that change where the command line sets `quantize`, with their new values.

    Length, steps of warm-up and learning rate are a tenth, and milestones keep their shares of the length. A recipe
    that sets `quantize` itself is left as it is, and so is what the command line gives.
    """
    options = [parser.option(token) for token in overrides]
    given = {option.dest for option in options if option is not None}
    values = vars(parser.parse_known_args(to_argv(recipe, parser) + overrides)[0])
    if "quantize" not in given or values["quantize"] != "int8" or recipe.get("quantize") == "int8":
        return {}
    changed = {key: values[key] / 10 for key in ("learning_rate", "num_train_epochs") if key not in given}
    if "max_steps" in given:
        changed.pop("num_train_epochs", None)
    elif "num_train_epochs" not in given and values["max_steps"] > 0:
        changed["max_steps"] = max(1, round(values["max_steps"] / 10))
    if values["warmup_steps"] >= 1 and "warmup_steps" not in given:  # below 1 it is a share of the steps
        changed["warmup_steps"] = round(values["warmup_steps"] / 10)
    if values["lr_milestones"] and "lr_milestones" not in given:
        share = values["num_train_epochs"] / recipe.get("num_train_epochs", values["num_train_epochs"])
        share = share if "num_train_epochs" in given else 0.1
        changed["lr_milestones"] = [epoch * share for epoch in values["lr_milestones"]]
    return {key: _rounded(value) for key, value in changed.items()}


def _rounded(value: Any) -> Any:
    """Return numbers without the last digits of a division."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _look_for_code(folders: list[Path]) -> None:
    """Let Python find modules beside recipes and in the current folder, after those that are on its path."""
    for folder in [*folders, Path()]:
        place = str(folder.resolve())
        if place not in sys.path:
            sys.path.append(place)


def methods_help() -> str:
    """Return the methods with their parameters and defaults, one method per line."""
    lines = ["methods, whose parameters are set by --losses.METHOD.PARAMETER VALUE:"]
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss).parameters.values()
        lines.append(f"  {name}: {', '.join(str(p.replace(annotation=p.empty)) for p in parameters)}")
    lines += [f"  {name}: of the package {entry.value.partition(':')[0]}" for name, entry in installed_losses().items()]
    lines.append("  module:Class: a loss of your own, in a module beside the recipe or on Python's path")
    return "\n".join(lines)


def _resolve(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Return every key that `argv` sets, with its value before the argument classes change it."""
    values = vars(parser.parse_known_args(argv)[0])
    options = [parser.option(token) for token in argv]
    resolved = {option.dest: values[option.dest] for option in options if option is not None}
    for key, value in resolved.items():
        if isinstance(value, str) and value.startswith("{"):
            resolved[key] = json.loads(value)
    return {key: value for key, value in resolved.items() if key not in NOT_RECORDED}


def _split_loss_overrides(losses: dict, argv: list[str]) -> tuple[dict, list[str]]:
    """Return a copy of `losses` with each `--losses.method.parameter value` of `argv` set, and the rest of `argv`."""
    if not isinstance(losses, dict):
        raise HfkdError(f"losses must map method names to their parameters, got {losses!r}.")
    for method, parameters in losses.items():
        if not (parameters is None or isinstance(parameters, dict)):
            raise HfkdError(
                f"losses.{method} must map parameters to their values, such as {{temperature: 4}}, got {parameters!r}."
            )
    losses = {
        method: {name: value for name, value in (parameters or {}).items() if value is not None}
        for method, parameters in losses.items()
    }
    rest, tokens = [], iter(argv)
    for token in tokens:
        if not token.startswith("--losses."):
            rest.append(token)
            continue
        name, has_value, value = token.partition("=")
        method, _, parameter = name[len("--losses.") :].rpartition(".")
        value = value if has_value else next(tokens, None)
        if not method or ("." in method and ":" not in method) or not value:
            raise HfkdError(f"'{token}' must have the form --losses.METHOD.PARAMETER VALUE.")
        if any(other.partition("=")[0] == "--losses" for other in argv):
            raise HfkdError(f"--losses replaces all losses: give it or '{token}', not both.")
        given = parse_yaml(value, token)
        if given is None:  # the default again
            losses.setdefault(method, {}).pop(parameter, None)
        else:
            losses.setdefault(method, {})[parameter] = given
    return losses, rest
