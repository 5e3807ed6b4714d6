"""The student that SimKD makes: built around the one given, trained, resumed, exported and loaded again."""

import copy
import json
import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import Plain, aligned, config, images, train_logs
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfkd import DistillationTrainer, Teacher, load_student, load_teacher
from hfkd.commands.evaluate import evaluate
from hfkd.commands.train import distill
from hfkd.losses import ATLoss, KDLoss, PKTLoss, SimKDLoss, SPLoss
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.features import InputSpec, find_layer, has_two_heads
from hfkd.networks.input_spec import input_spec
from hfkd.networks.loading import load_pretrained
from hfkd.networks.simkd_student import SimKDStudent
from hfkd.networks.wrapping import wrap_timm

TINY_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
TINY_HF_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
BATCH = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def cifar(name="cifar_resnet8", classes=10):
    return load_student(name, num_classes=classes)


def wrapped(name, **settings):
    model = timm.create_model(name, num_classes=10, **settings)
    return wrap_timm(model, list(map(str, range(10))), settings)


def tiny_vit():
    return wrapped("vit_tiny_patch16_224", **TINY_VIT)


def tiny_resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=10)
    )


def build(student, teacher, loss=None, output_dir="run", **changes):
    settings = {"ce_weight": 0.0, "channels_last": False}
    return DistillationTrainer(
        student,
        teacher,
        config(output_dir, **(settings | changes)),
        train_dataset=images(16, augment=False),
        eval_dataset=images(10, seed=1, augment=False),
        losses={"simkd": loss or SimKDLoss()},
    )


def check_training(trainer):
    """All of the student learns but the classifier, and every parameter that may learn gets a gradient."""
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    frozen = [name for name, value in parameters.items() if torch.equal(value, before[name])]
    assert frozen == ["timm_model.classifier.weight", "timm_model.classifier.bias"]
    trainer.distiller.zero_grad()
    trainer.compute_loss(trainer.distiller.train(), next(iter(trainer.get_train_dataloader()))).backward()
    assert [name for name, value in parameters.items() if value.requires_grad and value.grad is None] == []
    terms = [entry["loss_simkd"] for entry in train_logs(trainer)]
    assert terms[-1] < terms[0]


def check_export(trainer, folder="student"):
    """Both libraries give the logits of the trained student."""
    trainer.save_model(folder)
    expected = trainer.model.eval()(BATCH).logits
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(aligned(loaded)(BATCH).logits, expected)
    assert loaded.config.id2label == trainer.model.config.id2label
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(BATCH), expected)
    return loaded, expected


def test_the_student_around_the_one_given(caplog):
    """Its weights stay, what lies behind the map goes, the classifier is the teacher's; the one given is left alone."""
    given, teacher = cifar(), cifar("cifar_resnet14")
    before, classifier = copy.deepcopy(given.state_dict()), copy.deepcopy(teacher.timm_model.fc.state_dict())
    with caplog.at_level(logging.WARNING, logger="hfkd.networks.simkd_rebuild"):
        trainer = build(given, teacher)
    inner = trainer.model.timm_model
    assert isinstance(inner, SimKDStudent) and trainer.model.config.architecture == "simkd_student"
    own = inner.backbone.state_dict()
    assert {f"timm_model.{name}" for name in own} == {name for name in before if "fc." not in name}
    assert all(torch.equal(value, before[f"timm_model.{name}"]) for name, value in own.items())
    assert all(torch.equal(value, classifier[name]) for name, value in inner.classifier.state_dict().items())
    assert [tuple(layer.weight.shape) for layer in inner.projector if isinstance(layer, nn.Conv2d)] == [
        *((32, 64, 1, 1), (32, 32, 3, 3), (64, 32, 1, 1))
    ]
    beyond = sum(value.numel() for name, value in inner.named_parameters() if not name.startswith("backbone."))
    assert inner.extra_parameters == beyond == 64 * 32 + 9 * 32**2 + 32 * 64 + 2 * (32 + 32 + 64) + 64 * 10 + 10
    assert f"{beyond:,} parameters beyond the trunk" in caplog.text
    check_training(trainer)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


@pytest.mark.parametrize(
    "name, settings, gone",
    [
        ("cifar_shufflenetv2", {}, {"conv2", "bn2", "linear"}),  # as released: before its last convolution
        ("cifar_wrn_16_1", {}, {"bn1", "fc"}),
        ("deit_tiny_distilled_patch16_224", TINY_VIT, {"norm", "head", "head_dist"}),
        ("mobilenetv3_small_050", {}, {"conv_head", "classifier"}),
    ],
)
def test_nothing_is_left_behind_the_map(name, settings, gone):
    student = wrapped(name, **settings)
    trainer = build(student, tiny_resnet(), SimKDLoss(teacher_layer="resnet.encoder.stages.1"))
    assert set(trainer.model.config.model_args["removed"]) == gone
    names = {key.removeprefix("timm_model.") for key in student.state_dict()}
    kept = {key for key in names if key.split(".")[0] not in gone}
    assert trainer.model.timm_model.backbone.state_dict().keys() == kept
    assert not has_two_heads(trainer.model)
    loaded, _ = check_export(trainer)
    assert input_spec(loaded) == input_spec(student)


def test_an_earlier_stage_ends_the_student():
    trainer = build(cifar(), cifar("cifar_resnet14"), SimKDLoss(factor=8, student_layer=2))
    assert trainer.model.config.model_args["removed"] == ["layer3", "fc"]
    assert trainer.model.timm_model.projector[0].weight.shape == (8, 32, 1, 1)
    assert trainer.model.timm_model.forward_features(BATCH).shape == (4, 64, 8, 8), "a larger map is averaged"
    check_training(trainer)


def test_a_convolutional_teacher_and_a_transformer_in_bf16():
    trainer = build(tiny_vit(), cifar("cifar_resnet14"), SimKDLoss(factor=4), bf16=True, num_train_epochs=2)
    check_training(trainer)
    check_export(trainer)


def test_a_teacher_of_transformers():
    trainer = build(cifar(), tiny_resnet(), SimKDLoss(teacher_layer="resnet.encoder.stages.1"))
    assert trainer.model.timm_model.forward_features(BATCH).shape == (4, 12, 4, 4)
    check_training(trainer)


def test_a_teacher_with_a_class_token():
    teacher = tiny_vit().timm_model
    trainer = build(cifar(), Teacher(teacher), SimKDLoss(teacher_layer="embedding"), num_train_epochs=4)
    assert trainer.model.timm_model.forward_features(BATCH).shape == (4, 24, 1, 1)
    check_training(trainer)
    with pytest.raises(ValueError, match="teacher_layer is -1, but the average of its map"):
        build(cifar(), Teacher(teacher))


@pytest.mark.parametrize("layer", ["act2", -1])
def test_a_teacher_that_averages_what_follows_its_deepest_stage(layer):
    teacher = cifar("cifar_shufflenetv2")
    if layer == -1:
        with pytest.raises(ValueError, match="losses.simkd: teacher_layer is -1, .*Name the layer"):
            build(cifar(), teacher)
    else:
        assert build(cifar(), teacher, SimKDLoss(teacher_layer=layer)).model.timm_model.num_features == 1024


@pytest.mark.parametrize("architecture", [ViTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_a_student_of_transformers(architecture):
    """Its last hidden state is the map; the names of its weights survive, which transformers would change."""
    settings = (ViTConfig if architecture is ViTForImageClassification else DeiTConfig)(**TINY_HF_VIT)
    given = architecture(settings)
    trainer = build(given, cifar("cifar_resnet14"), num_train_epochs=2)
    own = trainer.model.timm_model.backbone.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in given.base_model.state_dict().items())
    check_training(trainer)
    loaded, expected = check_export(trainer)
    assert input_spec(loaded) == InputSpec(32, CIFAR_MEAN, CIFAR_STD), "it says nothing of its images: the data's"
    loaded.save_pretrained("again")
    assert torch.equal(aligned(load_pretrained("again")).eval()(BATCH).logits, expected)


def test_classes_in_another_order_and_a_teacher_at_another_size():
    """The classifier's rows are those of the student's classes; the map is measured at the teacher's own size."""
    teacher = load_student("resnet10t", [f"class {index}" for index in (9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10)], 11, 64)
    weight = teacher.timm_model.fc.weight.detach().clone()
    student = load_student("cifar_resnet8", [f"class {index}" for index in range(10)])
    trainer = build(student, teacher)
    assert torch.equal(trainer.model.timm_model.classifier.weight, weight[:10].flip(0))
    assert trainer.model.timm_model.teacher_size == (2, 2)
    assert trainer.model.config.id2label[3] == "class 3"


def test_a_classifier_without_bias():
    teacher = cifar("cifar_resnet14")
    teacher.timm_model.fc.register_parameter("bias", None)
    assert not build(cifar(), teacher).model.timm_model.classifier.bias.any()


def resumable(output_dir, **changes):
    torch.manual_seed(0)
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "bf16": True}
    return build(cifar(), cifar("cifar_resnet14"), None, output_dir, **(settings | changes))


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}])
def test_resumed_is_identical(changes):
    whole, resumed = resumable("whole", **changes), resumable("resumed", **changes)
    whole.train()
    resumed.train(resume_from_checkpoint="whole/checkpoint-3")
    expected, given = whole.distiller.state_dict(), resumed.distiller.state_dict()
    assert expected.keys() == given.keys()
    assert [name for name in expected if not torch.equal(expected[name], given[name])] == []


def test_the_best_checkpoint_comes_back():
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5}
    trainer = resumable("best", bf16=False, metric_for_best_model="eval_loss", **settings)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    check_export(trainer)


def test_a_run_from_its_recipe():
    """The exported student evaluates as in training and teaches; test_export.py loads one in a fresh process."""
    cifar("cifar_resnet14").save_pretrained("teacher")
    trainer = distill([recipe()])
    results = json.loads(Path("run/results.json").read_text())
    assert results["parameters"] == sum(value.numel() for value in trainer.model.parameters())
    metrics = evaluate(["run/student"])
    assert metrics["eval_top1"] == results["last"]["top1"]
    teacher = load_teacher("run/student")
    teacher.prepare(torch.device("cpu"), None, False)
    torch.testing.assert_close(teacher({"pixel_values": BATCH}).logits, trainer.model.cpu().eval()(BATCH).logits)


def recipe():
    settings = {
        "student_name_or_path": "cifar_resnet8",
        "teacher_name_or_path": "teacher",
        "dataset_name": "digits",
        "train_split": "train[:128]",
        "eval_split": "test[:50]",
        "losses": {"simkd": {"factor": 4}},
        "ce_weight": 0.0,
        "output_dir": "run",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 64,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    Path("simkd.yaml").write_text(yaml.safe_dump(settings))
    return "simkd.yaml"


def test_a_loaded_student_takes_other_classes():
    """It is then a network as any other: all of it learns."""
    trainer = build(cifar(), cifar("cifar_resnet14"))
    trainer.save_model("student")
    student = load_student("student", num_classes=3)
    assert student(BATCH).logits.shape == (4, 3) and all(value.requires_grad for value in student.parameters())
    torch.testing.assert_close(student.timm_model.projector[0].weight, trainer.model.timm_model.projector[0].weight)
    student.timm_model.reset_classifier(0)
    assert student.timm_model(BATCH).shape == (4, 64)


def test_clear_errors():
    teacher = cifar("cifar_resnet14")
    for loss, message in [
        (SimKDLoss(student_layer=7), "student_layer: CifarResNet has no stage 7. Stages: 0 "),
        (SimKDLoss(teacher_layer=7), "teacher_layer: CifarResNet has no stage 7"),
        (SimKDLoss(teacher_layer="layer9"), "teacher_layer: CifarResNet has no layer 'layer9'. Near are"),
        (SimKDLoss(teacher_layer=1), r"teacher_layer is 1, but the average of its map \(2, 16, 32, 32\) is not"),
        (SimKDLoss(factor=65), "factor is 65: it must not be above the teacher's 64 channels"),
    ]:
        with pytest.raises(ValueError, match=f"losses.simkd: {message}"):
            build(cifar(), teacher, loss)
    with pytest.raises(ValueError, match="the student is a Plain, which has no stages"):
        build(Plain(), teacher)
    with pytest.raises(ValueError, match="student_layer is 1, and a ResNetForImageClassification has no stage indices"):
        build(tiny_resnet(), teacher, SimKDLoss(student_layer=1))
    with pytest.raises(ValueError, match="need a teacher"):
        build(cifar(), None)
    with pytest.raises(ValueError, match="an ensemble .* has no classifier of its own"):
        build(cifar(), [teacher, cifar("cifar_resnet14")])
    with pytest.raises(ValueError, match=r"\['again', 'simkd'\] each replace the student's classifier"):
        losses = {"simkd": SimKDLoss(), "again": SimKDLoss(), "kd": KDLoss()}
        DistillationTrainer(cifar(), teacher, config(), train_dataset=images(8), losses=losses)


def test_teachers_without_a_linear_classifier():
    convolution = cifar("cifar_resnet14")
    convolution.timm_model.fc = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), nn.Conv2d(64, 10, 1), nn.Flatten())
    two_heads = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **TINY_VIT)
    for teacher, reason in [(convolution, "is a Sequential"), (Teacher(two_heads), "is more than one")]:
        with pytest.raises(ValueError, match=f"one linear layer over its embedding; the classifier of .* {reason}"):
            build(cifar(), teacher)


def test_a_student_that_says_nothing_of_its_images():
    rows = [{"pixel_values": image, "labels": 1} for image in BATCH]
    with pytest.raises(ValueError, match="the size of the images is not known from the data or from the student"):
        DistillationTrainer(
            tiny_resnet(), cifar("cifar_resnet14"), config(), train_dataset=rows, losses={"simkd": SimKDLoss()}
        )


def test_beside_other_losses():
    """The stages of the student given keep their numbers."""
    losses = {"simkd": SimKDLoss(), "at": ATLoss(), "pkt": PKTLoss(), "sp": SPLoss(student_layers=[2])}
    data = {"train_dataset": images(16)}
    trainer = DistillationTrainer(cifar(), cifar("cifar_resnet14"), config(ce_weight=0.0), losses=losses, **data)
    trunk = trainer.model.timm_model.backbone
    assert find_layer(trainer.model, -1) is trunk.layer3 and find_layer(trainer.model, 1) is trunk.layer1
    check_training(trainer)


def test_it_is_not_rebuilt_twice():
    student = build(cifar(), cifar()).model
    with pytest.raises(ValueError, match="losses.simkd: the student already ends in a teacher's classifier"):
        build(student, cifar())


def test_a_teacher_of_an_earlier_run_in_bf16():
    """Its weights are rounded; what the student gets is not."""
    teacher = Teacher(cifar("cifar_resnet14"))
    weight = teacher.model.timm_model.fc.weight.detach().clone()
    first, second = (build(cifar(), teacher, bf16=True) for _ in range(2))
    assert teacher.model.timm_model.fc.weight.dtype == torch.bfloat16
    for trainer in (first, second):
        assert torch.equal(trainer.model.timm_model.classifier.weight, weight)
