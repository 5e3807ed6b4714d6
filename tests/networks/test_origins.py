"""Where weights come from, in words, by the name alone."""

import pytest

from hfkd.networks.origins import student_weights, teacher_weights


@pytest.mark.parametrize(
    "name, pretrained, words",
    [
        ("cifar_resnet8", False, "random weights"),
        ("resnet18", False, "random weights"),
        ("resnet18", True, "timm's pretrained weights a1_in1k"),
        ("resnet10t.c3_in1k", False, "timm's pretrained weights c3_in1k"),
        ("runs/t/teacher", False, "weights from the folder runs/t/teacher"),
        ("microsoft/resnet-50", False, "weights from the Hub, microsoft/resnet-50"),
        ("hf-hub:timm/resnet18.a1_in1k", True, "weights from the Hub, timm/resnet18.a1_in1k"),
    ],
)
def test_of_a_student(name, pretrained, words):
    assert student_weights(name, pretrained) == words


def test_of_a_teacher():
    assert teacher_weights("resnet18") == "timm's pretrained weights a1_in1k"
    assert teacher_weights("cifar_resnet56", "best.pth") == "weights from the file best.pth"
    assert teacher_weights("runs/t/teacher") == "weights from the folder runs/t/teacher"
