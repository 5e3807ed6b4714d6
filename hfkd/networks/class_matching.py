"""Matching of classes: the teacher's class for each of the student's, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from transformers import PreTrainedModel

from ..errors import HfkdError
from .zero_shot import ZeroShotNetwork

# Published label lists of one data set differ in a few names. Two lists of the same length name the same classes if
# this share of the names agrees, position by position.
SAME_CLASSES_AGREEMENT = 0.9


def class_names_of(model: nn.Module) -> list[str]:
    """Return the names of a transformers or zero-shot classifier's classes, in order; none for other models."""
    if isinstance(model, ZeroShotNetwork):
        return model.class_names
    if not isinstance(model, PreTrainedModel):
        return []
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def name_lists_of(model: nn.Module) -> list[list[str]]:
    """Return the lists of names that fit a classifier's classes.

    They are the model's own names and, for the classes of ImageNet, the WordNet ids.
    """
    own = class_names_of(model)
    classes = len(own) or getattr(model, "num_classes", None)  # timm's attribute
    own = [] if all(map(_is_generic, own)) else own
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return [own] if own else []
    info = ImageNetInfo(subset)
    descriptions = info.label_descriptions()
    if own and _agreement(own, descriptions) < SAME_CLASSES_AGREEMENT:
        return [own]
    return [own or descriptions, info.label_names()]


def match_classes(student_names: Sequence[str], teacher: nn.Module, teacher_classes: int) -> list[int] | None:
    """Return the teacher's class for each student class, matched by name; None if both have the same classes.

    Case and punctuation do not count. A teacher has the student's classes if it has as many and either has no names or
    has mostly the same names in the same order.

    Args:
        student_names: names of the student's classes; numbers and LABEL_0 ... do not count as names.
        teacher: the classifier.
        teacher_classes: number of the teacher's logits.

    Raises:
        HfkdError: if the names do not determine the match.
    """
    own = class_names_of(teacher)
    # The same set of names is a match even if the names are numbers, which otherwise do not count: classes that were
    # only reordered are found here.
    if sorted(own) == sorted(student_names) and len(set(own)) == len(own):
        return None if own == list(student_names) else [own.index(name) for name in student_names]
    named = not all(map(_is_generic, student_names))
    lists = [names for names in name_lists_of(teacher) if named and len(names) == teacher_classes]
    wanted = [_normalized(name) for name in student_names]
    for names in lists:
        # ImageNet has two classes "crane". A name that occurs twice does not identify a class, so it is left out.
        counts = Counter(map(_normalized, names))
        position = {_normalized(name): index for index, name in enumerate(names) if counts[_normalized(name)] == 1}
        if position.keys() >= set(wanted) and len(set(wanted)) == len(wanted):
            indices = [position[name] for name in wanted]
            return None if indices == list(range(teacher_classes)) else indices
    # As many classes and no names that contradict: the order is the same. Two networks that were trained on one data
    # set often have generic names (LABEL_0 ...) on one side.
    if len(wanted) == teacher_classes and (
        not lists or max(_agreement(student_names, names) for names in lists) >= SAME_CLASSES_AGREEMENT
    ):
        return None
    known = {_normalized(name) for names in lists for name in names}
    missing = [name for name in student_names if _normalized(name) not in known]
    reason = f"the teacher has no {_listed(missing)}" if lists and missing else "both need distinct names"
    raise HfkdError(
        f"The teacher has {teacher_classes} classes and the student {len(wanted)}, and their names do not say which is "
        f"which ({reason}). Set teacher_class_indices: for each of the student's classes, in order, the index of the "
        "teacher's class. Or train the teacher on these images first, from its weights: `hfkd train-teacher "
        "--dataset_name DATA --student TEACHER`."
    )


def check_class_indices(indices: Sequence[int], student_classes: int, teacher_classes: int) -> None:
    """Check that `indices` hold one of the teacher's classes for each of the student's.

    Raises:
        HfkdError: if their number is wrong, or an index is out of range.
    """
    if len(indices) != student_classes:
        raise HfkdError(
            f"teacher_class_indices has {len(indices)} entries and the student {student_classes} classes: give the "
            "teacher's class for each of the student's, in order."
        )
    wrong = [index for index in indices if not 0 <= index < teacher_classes]
    if wrong:
        raise HfkdError(
            f"teacher_class_indices holds {wrong[0]}; the teacher's classes are 0 ... {teacher_classes - 1}."
        )


def _normalized(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _is_generic(name: str) -> bool:
    return re.fullmatch(r"(LABEL_)?\d+", name) is not None


def _agreement(names: Sequence[str], others: Sequence[str]) -> float:
    """Return the share of positions at which two lists of the same length hold the same name."""
    agreeing = sum(_normalized(name) == _normalized(other) for name, other in zip(names, others, strict=True))
    return agreeing / len(names)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
