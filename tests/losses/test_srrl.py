import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch import nn
from torch.autograd import gradcheck
from transformers import ResNetConfig, ResNetForImageClassification

from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.losses.srrl import SRRLLoss, srrl_loss
from hfkd.networks.features import Outputs
from hfkd.networks.wrapping import wrap_timm

TINY_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 10}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classifier(width, classes):
    layer = nn.Linear(width, classes, dtype=torch.float64).requires_grad_(False)
    layer.load_state_dict({"weight": random(classes, width, seed=8), "bias": random(classes, seed=9)})
    return layer


def outputs(embedding, logits=None, layer=None):
    return Outputs(logits, logits, {"embedding": embedding}, layer)


def test_golden(feature_golden):
    (student,) = feature_golden.inputs("student_pooled")
    layer = classifier(16, 10)
    layer.load_state_dict(feature_golden.weights("teacher_classifier"))
    teacher = outputs(feature_golden.tensor("teacher_pooled"), feature_golden.tensor("teacher_logits"), layer)
    loss = SRRLLoss()
    loss.setup(outputs(student), teacher)
    weights = feature_golden.weights("srrl")
    renamed = {name.replace("transfer.0", "conv").replace("transfer.1", "bn"): weights[name] for name in weights}
    loss.projector.double().load_state_dict(renamed)
    feature_golden.check("srrl/total", loss(outputs(student), teacher, {}), student_pooled=student)


def test_gradcheck():
    teacher, logits, layer = random(4, 5, seed=1), random(4, 3, seed=2), classifier(5, 3)
    assert gradcheck(lambda own: srrl_loss(own, teacher, logits, layer), random(4, 5).requires_grad_())


def test_the_function_is_two_squared_differences():
    own, teacher, layer = random(4, 5), random(4, 5, seed=1), classifier(5, 3)
    logits = F.linear(teacher, layer.weight, layer.bias)
    expected = (own - teacher).pow(2).mean() + ((own - teacher) @ layer.weight.T).pow(2).mean()
    torch.testing.assert_close(srrl_loss(own, teacher, logits, layer), expected)
    assert srrl_loss(teacher, teacher, logits, layer) == 0


def test_half_precision_is_widened():
    own, teacher, layer = random(4, 5).half(), random(4, 5, seed=1).half(), classifier(5, 3).float()
    value = srrl_loss(own, teacher, layer(teacher.float()).half(), layer)
    assert value.dtype == torch.float32


def test_the_projector_learns_and_the_teachers_classifier_does_not():
    student, layer = random(6, 4).float(), classifier(5, 3).float()
    before = copy.deepcopy(layer.state_dict())
    teacher = outputs(random(6, 5, seed=1).float(), random(6, 3, seed=2).float(), layer)
    loss = SRRLLoss()
    loss.setup(outputs(student), teacher)
    assert sorted(loss.state_dict()) == [
        *("projector.bn.bias", "projector.bn.num_batches_tracked", "projector.bn.running_mean"),
        *("projector.bn.running_var", "projector.bn.weight", "projector.conv.weight"),
    ]
    value = loss(outputs(student), teacher, {})
    projected = loss.projector(student[..., None, None]).flatten(1)
    torch.testing.assert_close(value, srrl_loss(projected, *teacher.features.values(), teacher.logits, layer))
    value.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert all(torch.equal(before[name], layer.state_dict()[name]) for name in before)
    assert loss.weight == 1 and not loss.reads_logits


def test_clear_errors():
    layer = classifier(5, 3)
    with pytest.raises(ValueError, match=r"embeddings \(B, 5\).*got \(4, 6\) and \(4, 5\)"):
        srrl_loss(random(4, 6), random(4, 5), random(4, 3), layer)
    with pytest.raises(ValueError, match=r"embeddings \(B, 5\).*got \(4, 6\) and \(4, 6\)"):
        srrl_loss(random(4, 6), random(4, 6), random(4, 3), layer)
    with pytest.raises(ValueError, match=r"teacher logits \(4, 3\).*got \(4, 2\)"):
        srrl_loss(random(4, 5), random(4, 5), random(4, 2), layer)
    with pytest.raises(ValueError, match="weight is -1"):
        SRRLLoss(weight=-1.0)


def test_a_teacher_with_two_heads_is_refused(tmp_path):
    teacher = Teacher(timm.create_model("deit_tiny_distilled_patch16_224", **TINY_VIT))
    with pytest.raises(ValueError, match="losses.srrl: .*must be one linear layer. This teacher's"):
        trainer(tmp_path, load_student("cifar_resnet8", num_classes=10), teacher)


def trainer(folder, student, teacher, **changes):
    settings = {"num_train_epochs": 5, "optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-2}
    return DistillationTrainer(
        student,
        teacher,
        config(folder, **(settings | changes)),
        train_dataset=images(16, augment=False),
        losses={"srrl": SRRLLoss()},
    )


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "logit_standardization": True}])
def test_a_transformer_learns_from_a_convolutional_network(tmp_path, changes):
    torch.manual_seed(0)
    tiny = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=10)
    student = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
    training = trainer(tmp_path, wrapped(student), ResNetForImageClassification(tiny), **changes)
    before = copy.deepcopy(training.distiller.state_dict())
    training.train()
    terms = [entry["loss_srrl"] for entry in train_logs(training)]
    assert terms[-1] < 0.9 * terms[0]
    learnt = dict(training.distiller.named_parameters())
    assert [name for name, value in learnt.items() if torch.equal(value, before[name])] == []


def wrapped(vit):
    """A student as `load_student` gives it, of sizes that only timm's own arguments have."""
    return wrap_timm(vit, list(map(str, range(10))), {key: TINY_VIT[key] for key in list(TINY_VIT)[:-1]})
