"""Which of a teacher's classes is which of the student's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from transformers import PreTrainedModel

from ..errors import HfkdError

# Published label lists of one data set differ in a few names (ImageNet has two cranes): lists of the same length that
# agree in place this far are the same classes.
SAME_CLASSES = 0.9


def class_names_of(model: nn.Module) -> list[str]:
    """The names of a transformers classifier's classes, in order; none for other models."""
    if not isinstance(model, PreTrainedModel):
        return []
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def name_lists_of(model: nn.Module) -> list[list[str]]:
    """Every list of names by which a classifier's classes may go: its own, and for ImageNet's also WordNet's ids."""
    own = class_names_of(model)
    classes = len(own) or getattr(model, "num_classes", None)  # timm's models say it so
    own = [] if all(map(_is_generic, own)) else own
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return [own] if own else []
    info = ImageNetInfo(subset)
    descriptions = info.label_descriptions()
    if own and _agreement(own, descriptions) < SAME_CLASSES:
        return [own]
    return [own or descriptions, info.label_names()]


def match_classes(student_names: Sequence[str], teacher: nn.Module, teacher_classes: int) -> list[int] | None:
    """For each student class the teacher's class of that name; None where the two have the same classes.

    Case and the signs between words do not count. A teacher with the student's number of classes and no names, or with
    mostly the same ones in place, has the student's classes.

    Args:
        student_names: the student's classes; numbers or LABEL_0 ... are no names.
        teacher: the classifier.
        teacher_classes: how many logits it gives.

    Raises:
        ValueError: if names do not tell which class is which.
    """
    own = class_names_of(teacher)
    if sorted(own) == sorted(student_names) and len(set(own)) == len(own):  # digits, too, name classes then
        return None if own == list(student_names) else [own.index(name) for name in student_names]
    named = not all(map(_is_generic, student_names))
    lists = [names for names in name_lists_of(teacher) if named and len(names) == teacher_classes]
    wanted = [_normal(name) for name in student_names]
    for names in lists:
        counts = Counter(map(_normal, names))  # ImageNet has two cranes
        position = {_normal(name): index for index, name in enumerate(names) if counts[_normal(name)] == 1}
        if position.keys() >= set(wanted) and len(set(wanted)) == len(wanted):
            indices = [position[name] for name in wanted]
            return None if indices == list(range(teacher_classes)) else indices
    if len(wanted) == teacher_classes and (
        not lists or max(_agreement(student_names, names) for names in lists) >= SAME_CLASSES
    ):
        return None
    known = {_normal(name) for names in lists for name in names}
    missing = [name for name in student_names if _normal(name) not in known]
    reason = f"the teacher has no {_listed(missing)}" if lists and missing else "both need names, each its own"
    raise HfkdError(
        f"The teacher has {teacher_classes} classes and the student {len(wanted)}, and their names do not say which is "
        f"which ({reason}). Set teacher_class_indices: for each of the student's classes, in order, the index of the "
        "teacher's."
    )


def check_class_indices(indices: Sequence[int], student_classes: int, teacher_classes: int) -> None:
    """Raises ValueError unless `indices` name one of the teacher's classes for each of the student's."""
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


def _normal(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _is_generic(name: str) -> bool:
    return re.fullmatch(r"(LABEL_)?\d+", name) is not None


def _agreement(names: Sequence[str], others: Sequence[str]) -> float:
    """The share of places where two lists of the same length agree."""
    agreeing = sum(_normal(name) == _normal(other) for name, other in zip(names, others, strict=True))
    return agreeing / len(names)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
