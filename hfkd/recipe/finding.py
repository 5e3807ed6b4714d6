"""Finding of recipes by name, in the current folder and in the package.

A recipe is a YAML file, or one of the sections under the key `recipes` of such a file, which share the keys above them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HfkdError, NotFoundError, nearest
from .keys import SHORT_FORMS
from .yaml_file import read_yaml

PACKAGED = Path(__file__).parents[1] / "recipes"  # in a checkout a link to its folder `recipes`
LOCAL = Path("recipes")  # of the current folder
SUFFIX = ".yaml"
SECTIONS_KEY = "recipes"
NO_RECIPES = "accelerate"  # folder of settings for `accelerate launch`


@dataclass(frozen=True)
class RecipeSource:
    """Place of a recipe.

    Attributes:
        path: the file.
        section: the section of the file, if it holds several recipes.
    """

    path: Path
    section: str | None = None

    def __str__(self) -> str:
        if self.is_packaged:
            return self.name
        return str(self.path if self.section is None else _stem(self.path) / self.section)

    @property
    def name(self) -> str:
        """Name of the recipe: its path below a folder `recipes`, without suffix; elsewhere the file's name."""
        parts = self.path.resolve().with_suffix("").parts
        folders = parts[-2::-1]  # from the innermost
        below = parts[-1 - folders.index("recipes") :] if "recipes" in folders else parts[-1:]
        return "/".join([*below, *([] if self.section is None else [self.section])])

    @property
    def is_packaged(self) -> bool:
        """Whether the recipe comes with hfkd."""
        return PACKAGED.resolve() in self.path.resolve().parents

    @property
    def identity(self) -> tuple[Path, str | None]:
        """Path without links, and section: equal for two ways to write one recipe."""
        return self.path.resolve(), self.section

    def keys(self) -> dict[str, Any]:
        """Return the keys that the recipe itself sets; those of a section lie over the keys that its file shares.

        Raises:
            HfkdError: if the file or the section holds no mapping, or a key in its short and in its long form.
        """
        shared = dict(_read(self.path))
        sections = shared.pop(SECTIONS_KEY, None)
        keys = _long_forms(shared, self.path)
        if self.section is None:
            return keys
        own = _sections(self.path, sections)[self.section]
        own = {} if own is None else own  # a section that adds nothing
        if not isinstance(own, dict):
            raise HfkdError(f"{self} must hold a mapping of keys to values, got {type(own).__name__}.")
        return keys | _long_forms(own, self)

    def section_names(self) -> list[str]:
        """Return the full names of the recipes in the file; none for a file that is itself a recipe."""
        sections = _sections(self.path, _read(self.path).get(SECTIONS_KEY, {}))
        return [RecipeSource(self.path, section).name for section in sections]

    def reference(self, folder: Path) -> str:
        """Return what a recipe in `folder` extends this one by: its name if it is packaged, else a relative path."""
        if self.is_packaged:
            return self.name
        path = self.path if self.section is None else _stem(self.path) / self.section
        return os.path.relpath(path.resolve(), folder.resolve())


def find_recipe(name: str | Path, folder: Path = Path()) -> RecipeSource:
    """Find a recipe by its path or its name, with or without the suffix.

    `cifar100/resnet56-resnet20/kd` is the file `cifar100/resnet56-resnet20/kd.yaml`, or the section `kd` of the file
    `cifar100/resnet56-resnet20.yaml`. It is looked for in `folder`, then in the folder `recipes` of the current folder,
    then in the package. A name may begin with `recipes/`.

    Raises:
        NotFoundError: if there is none; the message names the nearest.
    """
    path = Path(name)
    below = path.relative_to(LOCAL) if path.parts[:1] == LOCAL.parts else path
    for place in (folder / path, LOCAL / below, PACKAGED / below):
        source = _source_at(place)
        if source is not None:
            return source
    beside = nearest(path.name, [other.name for other in (folder / path).parent.glob(f"*{SUFFIX}")])
    near = [str((folder / path).parent / beside[0])] if beside else nearest(_stem(below), packaged_names())
    hint = f"Did you mean {near[0]}?" if near else "`hfkd recipes` lists those that come with hfkd."
    raise NotFoundError(f"There is no recipe at {folder / path}. {hint}")


def name_from(name: str, folder: Path) -> str:
    """Return the path of a recipe that is named from a folder, or the name as it is if it is not found there."""
    source = _source_at(folder / name)
    return name if source is None else str(source)


@functools.cache
def packaged_names() -> list[str]:
    """Return the names of all recipes that come with hfkd, sorted."""
    return names_below(PACKAGED)


def names_below(folder: Path) -> list[str]:
    """Return the names of all recipes below a folder, sorted; one without a student is only a parent of others."""
    names = []
    for path in folder.rglob(f"*{SUFFIX}"):
        if path.parent.name == NO_RECIPES:
            continue
        sections = _sections(path, _read(path).get(SECTIONS_KEY, {}))
        sources = [RecipeSource(path, section) for section in sections] or [RecipeSource(path)]
        names += [source.name for source in sources if "student_name_or_path" in source.keys()]
    return sorted(set(names))


def _long_forms(keys: Mapping[str, Any], where: object) -> dict[str, Any]:
    for short, long in SHORT_FORMS.items():
        if short in keys and long in keys:
            raise HfkdError(f"{where} has {short} and {long}, which are the same key: remove one.")
    return {SHORT_FORMS.get(key, key): value for key, value in keys.items()}


def _source_at(path: Path) -> RecipeSource | None:
    """Return the recipe at a path, whose suffix may be missing, or None."""
    if path.is_file():
        return RecipeSource(path)
    stem = _stem(path)
    file = stem.with_name(f"{stem.name}{SUFFIX}") if stem.name else path
    if file.is_file():
        return RecipeSource(file)
    shared = stem.parent.with_name(f"{stem.parent.name}{SUFFIX}") if stem.parent.name else path
    if shared.is_file() and stem.name in _sections(shared, _read(shared).get(SECTIONS_KEY, {})):
        return RecipeSource(shared, stem.name)
    return None


def _stem(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX)) if path.name.endswith(SUFFIX) else path


def _read(path: Path) -> Mapping[str, Any]:
    """Return the mapping in a file.

    Raises:
        HfkdError: if it holds none.
    """
    value = _read_packaged(path) if PACKAGED in path.parents else read_yaml(path)
    if not isinstance(value, dict):
        raise HfkdError(f"{path} must hold a mapping of keys to values, got {type(value).__name__}.")
    return value


_read_packaged = functools.cache(read_yaml)  # these files do not change


def _sections(path: Path, sections: Any) -> Mapping[str, Any]:
    if not isinstance(sections, dict):
        raise HfkdError(f"{SECTIONS_KEY} in {path} must map names to recipes, got {sections!r}.")
    return sections
