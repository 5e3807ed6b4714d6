"""Numbering of classes: their names, and the values that stand for them in each split or file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from ..errors import HfkdError

ClassValues = list[int | str | None] | None  # the value of class i at position i; None: the values are the numbers


@dataclass(frozen=True)
class LabelValues:
    """Labels of one split or file, before the classes are numbered.

    Attributes:
        feature: of the label column.
        distinct: the different values of whole numbers or text; empty for a ClassLabel, which names its classes.
        num_rows: number of rows that `distinct` was found in.
        where: name for messages.
    """

    feature: datasets.ClassLabel | datasets.Value
    distinct: Sequence[int | str]
    num_rows: int
    where: str

    @property
    def is_number(self) -> bool:
        return not isinstance(self.feature, datasets.ClassLabel) and "string" not in self.feature.dtype

    def own_classes(self) -> dict[str, int | str]:
        """Return the value of each class by its name."""
        if isinstance(self.feature, datasets.ClassLabel):
            return {name: index for index, name in enumerate(self.feature.names)}
        return {str(value): value for value in self.distinct}


def number_classes(
    parts: Sequence[LabelValues], num_first: int, column: str, expected: list[str] | None
) -> tuple[list[str], list[ClassValues]]:
    """Return the names of the classes, and each part's values for them.

    The first split names the classes: in the order of its ClassLabel, or sorted if they are text. Whole numbers of all
    parts are sorted. If all names are among the `expected` ones, those are the classes. Other parts are matched by
    name.

    Args:
        parts: splits or files, those of the first split first.
        num_first: number of parts of the first split.
        column: name of the label column.
        expected: names of a model's classes, or None.

    Raises:
        HfkdError: a part has a class that the first split lacks, its labels are of another type, some are empty text,
            or whole numbers look like ids.
    """
    for part in parts:
        if "" in part.distinct:
            raise HfkdError(
                f"label_column: '{column}' of {part.where} is empty text in some rows. Fill in their labels, or remove "
                "these rows."
            )
    if all(part.is_number for part in parts):
        return _number_numbers(parts, column, expected)
    names = _names_of_first(parts, num_first)
    if expected and len(set(expected)) == len(expected) and set(names) <= set(expected):
        names = list(expected)
    return names, [_values_of(part, names, column, parts[0].where) for part in parts]


def _names_of_first(parts, num_first):
    first = [part for part in parts[:num_first] if not part.is_number] or [part for part in parts if not part.is_number]
    if isinstance(first[0].feature, datasets.ClassLabel):
        return list(first[0].feature.names)
    return sorted({name for part in first for name in part.own_classes()})


def _values_of(part, names, column, first) -> ClassValues:
    if part.is_number:  # a file that lost the names; its numbers are those of the others
        if any(not isinstance(value, int) or value >= len(names) for value in part.distinct):
            raise HfkdError(f"label_column: '{column}' of {part.where} holds numbers, unlike {first}.")
        return None
    own = part.own_classes()
    unknown = [name for name in own if name not in names]
    if unknown:
        listed = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise HfkdError(
            f"label_column: '{column}' of {part.where} has classes that {first} lacks: {listed}. The classes are "
            f"matched by name: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
        )
    values = [own.get(name) for name in names]
    return None if values == list(range(len(names))) else values


def _number_numbers(parts, column, expected):
    values = sorted({value for part in parts for value in part.distinct if value >= 0})
    names = [str(value) for value in values]
    if values and expected and len(set(expected)) == len(expected):
        if set(names) <= set(expected):
            return list(expected), [_or_none([_number(name, values) for name in expected])] * len(parts)
        if not all(name.isdecimal() for name in expected) and values[-1] < len(expected):
            return list(expected), [None] * len(parts)  # numbers of the model's classes, some of which may be missing
    rows = sum(part.num_rows for part in parts)
    if values and values[-1] > 10 * len(values) and 2 * len(values) > rows:
        raise HfkdError(
            f"label_column: '{column}' of {parts[0].where} has {len(values)} different numbers in {rows} rows, and its "
            f"numbers go up to {values[-1]}: they look like ids and not like classes. Choose another label_column."
        )
    if values != list(range(len(values))):
        shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
        warnings.warn(
            f"{parts[0].where}: the labels in column '{column}' are {shown}, which are not 0 to {len(values) - 1}. "
            f"They are mapped to the {len(values)} classes 0 to {len(values) - 1} in this order.",
            stacklevel=4,
        )
    return names, [_or_none(values)] * len(parts)


def _number(name, values):
    return next((value for value in values if str(value) == name), None)


def _or_none(values) -> ClassValues:
    return None if values == list(range(len(values))) else values


def renumbered(values: ClassValues, indices: Sequence[int], num_classes: int) -> ClassValues:
    """Return the values for other classes, of which `indices` are those that the present ones become."""
    found: list[int | str | None] = [None] * num_classes
    for index, value in zip(indices, range(len(indices)) if values is None else values, strict=True):
        found[index] = value
    return found


def check_several(names: Sequence[str], where: str) -> None:
    """Check that there is something to learn.

    Raises:
        HfkdError: there is one class.
    """
    if len(names) < 2:
        raise HfkdError(
            f"{where} has one class ({', '.join(map(repr, names))}), and there is nothing to learn from one. Labels of "
            "two or more classes are needed."
        )
