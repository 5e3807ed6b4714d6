import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from hfkd.losses.base import ReusedClassifier
from hfkd.losses.simkd import SimKDLoss, simkd_loss
from hfkd.networks import simkd_student as simkd
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(classifier=None, **features):
    logits = random(2, 5)
    return Outputs(logits, logits, features, classifier)


def taught(feature_map, classifier, **changes):
    """Outputs of a teacher that averages a map."""
    features = {"embedding": feature_map.mean(dim=(2, 3))} | changes
    return Outputs(None, None, {-1: feature_map} | features, classifier)


@pytest.mark.parametrize("factor", [2, 4])
def test_golden(feature_golden, monkeypatch, factor):
    """The loss, and the logits of the student that it makes: the projector's weights have the reference's places."""
    case = f"simkd/factor={factor}"
    monkeypatch.setattr(simkd, "trunk_map", lambda trunk, stage, images: images)
    student = simkd.SimKDStudent(10, 8, 16, (4, 4), factor, architecture="cifar_resnet8", stage=3).double()
    weights = feature_golden.weights(case)
    student.projector.load_state_dict({name.removeprefix("transfer."): value for name, value in weights.items()})
    student.classifier.load_state_dict(feature_golden.weights("teacher_classifier"))
    (student_map,) = feature_golden.inputs("student_map_2")
    projected = student.forward_features(student_map)
    logits, expected = student.forward_head(projected), feature_golden.tensor(f"{case}/logits")
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()
    teacher = taught(feature_golden.tensor("teacher_map_2"), student.classifier)
    loss = SimKDLoss(factor=factor)
    loss.setup(outputs(projector=projected), teacher)
    feature_golden.check(case, loss(outputs(projector=projected), teacher, {}), student_map_2=student_map)


def test_gradcheck():
    assert gradcheck(lambda own: simkd_loss(own, random(2, 3, 4, 4, seed=1)), random(2, 3, 2, 2).requires_grad_())


def test_a_larger_map_of_the_teacher_is_averaged():
    own, teacher = random(2, 3, 2, 2), random(2, 3, 4, 4, seed=1)
    halved = teacher.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(simkd_loss(own, teacher), (own - halved).pow(2).mean())
    assert simkd_loss(teacher.half(), teacher.half()).dtype == torch.float32


def test_what_it_asks_for():
    loss = SimKDLoss(factor=4, student_layer=2, teacher_layer="act")
    assert loss.reuses_classifier == ReusedClassifier(student_layer=2, teacher_layer="act", factor=4)
    assert loss.student_layers == ["projector"] and loss.teacher_layers == ["act", "embedding"]
    assert loss.weight == 1 and not loss.reads_logits and not list(loss.parameters())
    assert SimKDLoss().reuses_classifier == ReusedClassifier(-1, -1, 2)


def test_the_embedding_as_a_map():
    teacher = outputs(nn.Linear(3, 5), embedding=random(2, 3))
    loss = SimKDLoss(teacher_layer="embedding")
    student = outputs(projector=random(2, 3, 1, 1, seed=1))
    loss.setup(student, teacher)
    expected = (student.features["projector"].flatten(1) - teacher.embedding).pow(2).mean()
    torch.testing.assert_close(loss(student, teacher, {}), expected)


def test_the_classifier_must_read_the_average_of_the_map():
    teacher_map, classifier = random(2, 3, 4, 4), nn.Linear(3, 5)
    student = outputs(projector=teacher_map)
    SimKDLoss().setup(student, taught(teacher_map, classifier))
    nearly = teacher_map.mean(dim=(2, 3)) * 1.01  # as far as bf16 takes them
    SimKDLoss().setup(student, taught(teacher_map, classifier, embedding=nearly))
    for embedding in (2 * nearly, random(2, 7)):
        with pytest.raises(ValueError, match="teacher_layer is -1, but the average of its map .*Name embedding if"):
            SimKDLoss().setup(student, taught(teacher_map, classifier, embedding=embedding))
    with pytest.raises(ValueError, match="SimKD needs a teacher whose classifier is one linear layer"):
        SimKDLoss().setup(outputs(), taught(teacher_map, None))


def test_clear_errors():
    with pytest.raises(ValueError, match="factor is 0: give a whole number, 1 or above"):
        SimKDLoss(factor=0)
    with pytest.raises(ValueError, match="student_layer is 'layer3': give a stage index"):
        SimKDLoss(student_layer="layer3")
    with pytest.raises(ValueError, match=r"teacher_layer is \[1\]: give a stage index, a module path or embedding"):
        SimKDLoss(teacher_layer=[1])
    with pytest.raises(ValueError, match=r"same \(B, C\), got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        simkd_loss(random(2, 3, 4, 4), random(2, 4, 4, 4))
