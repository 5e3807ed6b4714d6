"""Weights of a student that has the layers of its teacher, but fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import HfkdError
from .class_matching import check_class_indices, class_names_of, match_classes
from .headless import HeadlessNetwork
from .layers import classifier_names, timm_model_of
from .teacher import Teacher

ONLY_BLOCKS = "teacher_blocks is for networks that differ in their number of blocks alone"

logger = logging.get_logger(__name__)


def inherit_blocks(student: PreTrainedModel, teacher: Teacher, blocks: Mapping[str, Sequence[int]]) -> None:
    """Start a student from the weights of its teacher, which has the same layers, but more blocks.

    DistilBERT starts so, from every second block of its teacher (Sanh et al., 2019, arXiv:1910.01108). All weights
    outside the lists of blocks are the teacher's as well. Of its classifier the student gets the rows of its own
    classes; where the teacher lacks them, the student's classifier stays as it is.

    Args:
        student: model from `load_student`.
        teacher: teacher from `load_teacher`, of the student's family and width.
        blocks: for each list of blocks, by its name in both networks, the index of the teacher's block that each of the
            student's blocks gets, such as `{"blocks": [0, 2, 4, 6, 8, 10]}`.

    Raises:
        HfkdError: if a list of blocks is in one of the networks alone, if another number of blocks is named than the
            student has, if the teacher lacks a block, or if the networks differ in more than their number of blocks.
    """
    network, teaching = _network(student), _network(teacher.model)
    own, given = network.state_dict(), teaching.state_dict()
    _check_lists(_lists_of(own), _lists_of(given), blocks)
    classifier = classifier_names(network)
    sources = {name: _source(name, blocks) for name in own if name not in classifier}
    for name, source in sources.items():
        _check_weight(name, own[name], source, given.get(source))
    no_place = classifier_names(teaching) if teacher.has_classifier else set()
    _check_left_out(given.keys() - set(sources.values()) - no_place, blocks)
    started = {name: given[source] for name, source in sources.items()}
    network.load_state_dict(started | _classifier(student, teacher, {name: own[name] for name in classifier}, given))


def _network(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of transformers and of backbones."""
    return timm_model_of(model.backbone if isinstance(model, HeadlessNetwork) else model)


def _check_lists(own: dict[str, int], given: dict[str, int], blocks: Mapping[str, Sequence[int]]) -> None:
    """Check that the blocks that are named are those of the networks.

    Args:
        own, given: numbers of blocks in each list of the student and of the teacher.
    """
    for path, taken in blocks.items():
        for role, lists in (("student", own), ("teacher", given)):
            if path not in lists:
                raise HfkdError(
                    f"teacher_blocks: {path} is no list of blocks of the {role}, which has {_in_words(lists)}."
                )
        if len(taken) != own[path]:
            raise HfkdError(
                f"teacher_blocks: the student has {own[path]} blocks in {path}, and {len(taken)} of the teacher's are "
                f"named ({', '.join(map(str, taken))}): name one for each."
            )
        if max(taken) >= given[path]:
            raise HfkdError(
                f"teacher_blocks: the teacher's blocks in {path} are 0 to {given[path] - 1}, and {max(taken)} is named."
            )
    for path, count in own.items():
        named = any(path == other or path.startswith(f"{other}.") for other in blocks)
        if not named and path in given and given[path] != count:
            raise HfkdError(
                f"teacher_blocks: of {path} the student has {count} and the teacher {given[path]}: name those that the "
                "student gets."
            )


def _lists_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of modules in each list that holds weights, by the list's path."""
    lists: dict[str, int] = {}
    for name in state:
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isdecimal():
                path = ".".join(parts[:position])
                lists[path] = max(lists.get(path, 0), int(part) + 1)
    return lists


def _in_words(lists: Mapping[str, int]) -> str:
    """Return the outermost lists with their numbers of blocks."""
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return ", ".join(f"{path} ({lists[path]})" for path in outermost) or "none"


def _place(name: str, blocks: Mapping[str, Sequence[int]]) -> tuple[str, int, str] | None:
    """Return the list, the index of the block and the rest of a weight's name; None outside the lists."""
    for path in blocks:
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            return path, int(index), rest
    return None


def _source(name: str, blocks: Mapping[str, Sequence[int]]) -> str:
    """Return the name in the teacher of a weight of the student."""
    place = _place(name, blocks)
    if place is None:
        return name
    path, index, rest = place
    return f"{path}.{blocks[path][index]}.{rest}"


def _check_weight(name: str, own: Tensor, source: str, given: Tensor | None) -> None:
    """Check that a weight of the student can be one of the teacher's, which is None if there is none."""
    if given is None or given.shape != own.shape:
        has = "does not exist" if given is None else f"has the shape {tuple(given.shape)}"
        raise HfkdError(
            f"{ONLY_BLOCKS}: {name} of the student has the shape {tuple(own.shape)}, and {source} of the teacher {has}."
        )


def _check_left_out(names: set[str], blocks: Mapping[str, Sequence[int]]) -> None:
    """Check that the weights that the student does not get belong to whole blocks."""
    for name in sorted(names):
        place = _place(name, blocks)
        if place is None or place[1] in blocks[place[0]]:
            raise HfkdError(f"{ONLY_BLOCKS}: the student has no place for {name} of the teacher.")


def _classifier(
    student: PreTrainedModel, teacher: Teacher, own: dict[str, Tensor], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights of the student's classifier: the teacher's rows for its classes, or its own."""
    if not own or not teacher.has_classifier or not own.keys() <= given.keys():
        return own
    names = class_names_of(student)
    teaching: Any = _network(teacher.model)
    classes = len(class_names_of(teacher.model)) or teaching.num_classes  # of timm
    indices = teacher.class_indices
    if indices is not None:
        check_class_indices(indices, len(names), classes)
    else:
        try:
            indices = match_classes(names, teacher.model, classes)
        except HfkdError:
            logger.warning("The student's classes are not the teacher's, so its classifier starts from new weights.")
            return own
    if indices is None:
        return {name: given[name] for name in own}
    # A classifier may begin with a norm over its input, which has no rows for classes.
    return {name: given[name][list(indices)] if len(given[name]) == classes else given[name] for name in own}
