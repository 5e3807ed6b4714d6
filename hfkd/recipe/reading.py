"""Reading of recipes: from a YAML file, its parent and the command line to objects of the argument classes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import HfkdError, NotFoundError, nearest, unknown_key_error
from ..losses import LOSSES, build_losses
from .arguments import DataArguments, DistillationConfig, ModelArguments
from .keys import NOT_RECORDED, SECTIONS
from .parser import ArgumentParser, to_argv
from .yaml_file import parse_yaml, read_yaml

ARGUMENT_CLASSES = (ModelArguments, DataArguments, DistillationConfig)
KEYS = [field.name for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls) if field.init]

RECIPE_HELP = (
    "A recipe is a YAML file of the keys below. Its keys override the recipe that it `extends`,\n"
    "and keys on the command line override both. null gives a key its default again."
)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe, including the keys of the recipe that it `extends`, whose path is relative to it.

    The parent may extend a recipe in turn. Mappings such as `losses` are replaced and not merged, so that all losses of
    a recipe are in one place.

    Raises:
        NotFoundError: if the recipe or one that it extends does not exist.
        HfkdError: for invalid YAML, an unknown key, or a recipe that extends itself.
    """
    recipe: dict[str, Any] = {}
    paths: list[Path] = []
    while True:
        path = Path(path)
        if path.resolve() in [other.resolve() for other in paths]:
            chain = " extends ".join(map(str, [*paths, path]))
            raise HfkdError(f"{chain}: a recipe cannot extend itself. Remove one of the `extends`.")
        paths.append(path)
        recipe = _read_yaml(path) | recipe
        parent = recipe.pop("extends", None)
        if parent is None:
            return recipe
        if not isinstance(parent, str):
            raise HfkdError(f"extends in {path} must be the path of one recipe, got {parent!r}.")
        path = path.parent / parent


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = nearest(path.name, [other.name for other in path.parent.glob("*.yaml")])
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise NotFoundError(f"There is no recipe at {path}.{hint}")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise HfkdError(f"{path} must hold a mapping of keys to values, got {type(recipe).__name__}.")
    for key in recipe:
        if key not in (*KEYS, *SECTIONS):
            raise unknown_key_error(str(key), [*KEYS, *SECTIONS], str(path))
    return recipe


def parse_recipe(
    argv: list[str] | None = None, command: str = "hfkd distill"
) -> tuple[ModelArguments, DataArguments, DistillationConfig, dict]:
    """Parse `recipe.yaml [--key value ...]`; the command line overrides the recipe, the recipe the defaults.

    A loss parameter is set by its path (`--losses.dkd.beta 2`). The default of `output_dir` is `runs/` followed by the
    recipe's path below the `recipes` folder.

    Returns:
        The three argument objects and the resolved recipe, a flat mapping of every key that was set.

    Raises:
        NotFoundError: if the recipe does not exist.
        HfkdError: if no recipe is given, for an unknown key, or for a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = f"{command} recipe.yaml [--key value ...]"
    parser = ArgumentParser(ARGUMENT_CLASSES, usage, RECIPE_HELP, methods_help())
    parser.answer_help(argv)
    path, overrides = argv[0] if argv else "", argv[1:]
    if not path or path.startswith("-"):
        raise HfkdError(f"The first argument must be a recipe, got '{path}': {usage}. `--help` explains the keys.")
    recipe = load_recipe(path)
    recipe.pop("search", None)
    overrides, unset = parser.settle(overrides)
    recipe = {key: value for key, value in recipe.items() if value is not None and key not in unset}
    recipe["losses"], overrides = _split_loss_overrides(recipe.get("losses") or {}, overrides)
    recipe.setdefault("output_dir", default_output_dir(path))
    argv = to_argv(recipe, parser) + overrides
    model_args, data_args, config = parser.parse(argv)
    build_losses(config.losses, config.logit_standardization)  # finds mistakes before data and networks are loaded
    return model_args, data_args, config, _resolve(parser, argv)


def methods_help() -> str:
    """Return the methods with their parameters and defaults, one method per line."""
    lines = ["methods, whose parameters are set by --losses.METHOD.PARAMETER VALUE:"]
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss).parameters.values()
        lines.append(f"  {name}: {', '.join(str(p.replace(annotation=p.empty)) for p in parameters)}")
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


def recipe_name(path: str | Path) -> str:
    """Return the path below the `recipes` folder without its suffix, or the file's name for a recipe from elsewhere."""
    parts = Path(path).resolve().with_suffix("").parts
    if "recipes" in parts:
        return str(Path(*parts[len(parts) - parts[::-1].index("recipes") :]))
    return parts[-1]


def default_output_dir(path: str | Path) -> str:
    """Return the default folder of a run: `runs/cifar100/a-b/kd` for `recipes/cifar100/a-b/kd.yaml`."""
    return str(Path("runs", recipe_name(path)))


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
        path = name[len("--losses.") :].split(".")
        value = value if has_value else next(tokens, None)
        if len(path) != 2 or not value:
            raise HfkdError(f"'{token}' must have the form --losses.METHOD.PARAMETER VALUE.")
        if any(other.partition("=")[0] == "--losses" for other in argv):
            raise HfkdError(f"--losses replaces all losses: give it or '{token}', not both.")
        given = parse_yaml(value, token)
        if given is None:  # the default again
            losses.setdefault(path[0], {}).pop(path[1], None)
        else:
            losses.setdefault(path[0], {})[path[1]] = given
    return losses, rest
