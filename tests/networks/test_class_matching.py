import pytest
from timm.data import ImageNetInfo
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hfkd.networks.class_matching import match_classes

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
DESCRIPTIONS = ImageNetInfo("imagenet-1k").label_descriptions()


def teacher(names):
    """A transformers classifier with these classes."""
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=len(names), id2label=dict(enumerate(names))
    )
    return ResNetForImageClassification(config)


class TimmLike(nn.Module):
    num_classes = 1000


@pytest.mark.parametrize(
    "student, names, expected",
    [
        (["ant", "bee", "cat"], ["ant", "bee", "cat"], None),
        (["ant", "bee"], ["cat", "bee", "ant"], [2, 1]),
        (["Maple Tree", "oak_tree"], ["oak tree", "maple_tree", "rose"], [1, 0]),
        (["ant", "bee"], ["bee", "ant"], [1, 0]),
        (["0", "1"], ["0", "1"], None),
        (["0", "1", "2"], ["2", "1", "0"], [2, 1, 0]),
        (["0", "1"], ["ant", "bee"], None),  # the student's classes have no names
        (["ant", "bee"], ["LABEL_0", "LABEL_1"], None),  # the teacher's have none
    ],
)
def test_by_name(student, names, expected):
    assert match_classes(student, teacher(names), len(names)) == expected


@pytest.mark.parametrize(
    "student, names, message",
    [
        (["ant", "bee"], ["ant", "cat"], "2 classes and the student 2.*no 'bee'"),
        (["ant", "bee"], ["ant", "cat", "dog"], "3 classes and the student 2.*no 'bee'"),
        (["ant", "ant"], ["ant", "cat", "dog"], "both need distinct names"),
        (["0", "1"], ["ant", "bee", "cat"], "both need distinct names"),
        (["ant", "bee"], ["LABEL_0", "LABEL_1", "LABEL_2"], "both need distinct names"),
    ],
)
def test_clear_errors(student, names, message):
    with pytest.raises(ValueError, match=message + ".*Set teacher_class_indices"):
        match_classes(student, teacher(names), len(names))


def test_a_subset_of_imagenet():
    """By description, or by the WordNet ids that name the folders of an imagefolder; the model need not say them."""
    for names in (SYNSETS, DESCRIPTIONS):
        assert match_classes([names[7], names[3]], TimmLike(), 1000) == [7, 3]
        assert match_classes(names, TimmLike(), 1000) is None
    assert match_classes([SYNSETS[7], SYNSETS[3]], teacher(DESCRIPTIONS), 1000) == [7, 3]


def test_a_name_that_two_classes_share_tells_nothing():
    assert sum(name.startswith("crane") for name in DESCRIPTIONS) == 2
    with pytest.raises(ValueError, match="Set teacher_class_indices"):
        match_classes(["crane", DESCRIPTIONS[0]], TimmLike(), 1000)


def test_lists_of_one_data_set_may_differ_in_a_few_names():
    """ImageNet as the Hub has it names its two cranes and maillots otherwise than timm."""
    almost = [*DESCRIPTIONS[:500], "crane2", *DESCRIPTIONS[501:]]
    assert match_classes(almost, TimmLike(), 1000) is None


def test_a_thousand_other_classes_are_not_imagenet():
    others = [f"kind {letter}{number}" for letter in "ab" for number in range(500)]
    with pytest.raises(ValueError, match="no 'n01440764'"):
        match_classes([SYNSETS[0], SYNSETS[1]], teacher(others), 1000)
