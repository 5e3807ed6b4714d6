"""Teachers at their own size, normalisation and classes, alone and several at once."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import Plain, config, images
from torch import nn

from hfkd import DistillationTrainer, Teacher, load_student, load_teacher
from hfkd.losses import standardize
from hfkd.networks.features import InputSpec
from hfkd.networks.teacher import TeacherEnsemble

GIVEN = InputSpec(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
OWN = InputSpec(32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def normalised(pixels, spec):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (pixels - mean) / std


def prepared(teacher, **arguments):
    teacher.prepare(torch.device("cpu"), None, False, **arguments)
    return teacher


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def test_conversion_is_what_one_does_by_hand(pixels):
    """The same images at 32 px and in the teacher's mean and std; both views."""
    model = Plain()
    teacher = prepared(Teacher(model, input_spec=OWN), student_input=GIVEN)
    strong = pixels.flip(-1)
    batch = {"pixel_values": normalised(pixels, GIVEN), "pixel_values_strong": normalised(strong, GIVEN)}
    outputs = teacher(batch)
    for view, original in ((outputs, pixels), (outputs.strong, strong)):
        small = F.interpolate(original, (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(view.logits, model(normalised(small, OWN)), rtol=1e-5, atol=1e-5)


def test_a_teacher_of_the_same_input_sees_the_very_images(pixels):
    batch = {"pixel_values": pixels}
    for spec, given in ((GIVEN, GIVEN), (None, GIVEN)):
        teacher = prepared(Teacher(Plain(), input_spec=spec), student_input=given)
        assert teacher.convert(batch["pixel_values"]) is batch["pixel_values"]


def test_an_enlarged_image_is_itself_again_at_its_own_size():
    """Why no antialiasing: seven times enlarged (nearest here) and sampled at the centres, nothing is lost."""
    small = torch.rand(2, 3, 32, 32)
    large = F.interpolate(small, (224, 224), mode="nearest")
    teacher = prepared(Teacher(Plain(), input_spec=OWN))
    assert torch.equal(teacher.convert(large), small)


def test_the_trainer_converts_for_a_timm_teacher():
    """The data set's normalisation counts, not the student's configuration."""
    train_set = images(8, size=48)
    teacher = timm.create_model("resnet10t", num_classes=10).eval()  # 176 px, ImageNet's mean and std
    trainer = DistillationTrainer(Plain(), teacher, config(losses={"kd": {}}), train_dataset=train_set)
    batch = train_set.__getitems__([0, 1])
    given = InputSpec(48, train_set.mean, train_set.std)
    own = trainer.teacher.input_spec
    assert own.image_size == 176
    pixels = batch["pixel_values"] * torch.tensor(given.std).view(3, 1, 1) + torch.tensor(given.mean).view(3, 1, 1)
    by_hand = normalised(F.interpolate(pixels, (176, 176), mode="bilinear"), own)
    torch.testing.assert_close(trainer.teacher(batch).logits, teacher(by_hand), rtol=1e-4, atol=1e-4)


def test_an_ensemble_is_the_mean_of_its_members(pixels):
    members = [Teacher(Plain(width=width), input_spec=spec) for width, spec in ((4, OWN), (8, None))]
    batch = {"pixel_values": pixels, "pixel_values_strong": pixels.flip(-1)}
    plain = prepared(TeacherEnsemble(members, standardized=False), student_input=GIVEN)(batch)
    scored = prepared(TeacherEnsemble(members, standardized=True), student_input=GIVEN)(batch)
    first, second = (member(batch) for member in members)
    torch.testing.assert_close(plain.logits, (first.logits + second.logits) / 2)
    torch.testing.assert_close(plain.strong.logits, (first.strong.logits + second.strong.logits) / 2)
    torch.testing.assert_close(scored.logits, (standardize(first.logits) + standardize(second.logits)) / 2)


@pytest.mark.parametrize("standardization", [False, True])
def test_an_ensemble_in_the_trainer(standardization):
    args = config(losses={"kd": {}}, logit_standardization=standardization)
    trainer = DistillationTrainer(Plain(), [Plain(width=4), Plain(width=6)], args, train_dataset=images(8))
    assert trainer.teacher.standardized is standardization
    expected = sum(value.numel() for width in (4, 6) for value in Plain(width=width).parameters())
    assert trainer.teacher.parameter_count() == expected
    trainer.train()
    alone = DistillationTrainer(Plain(), [Plain(width=4)], config(losses={"kd": {}}), train_dataset=images(8))
    assert isinstance(alone.teacher, Teacher)


def test_an_ensemble_has_no_layers():
    losses = {"locality_guidance": {"student_layers": ["conv"], "teacher_layers": ["conv"]}}
    with pytest.raises(ValueError, match="ensemble .Plain . Plain. has no layers in common"):
        DistillationTrainer(Plain(), [Plain(), Plain()], config(losses=losses), train_dataset=images(8))


def test_teacher_class_indices_pick_the_columns():
    train_set, teacher = images(8, classes=4), Plain(classes=6)
    args = config(losses={"kd": {}})
    trainer = DistillationTrainer(
        Plain(classes=4), Teacher(teacher, class_indices=[5, 0, 3, 2]), args, train_dataset=train_set
    )
    batch = train_set.__getitems__([0, 1])
    expected = trainer.teacher.model(batch["pixel_values"])[:, [5, 0, 3, 2]]
    assert torch.equal(trainer.teacher(batch).logits, expected)
    torch.testing.assert_close(teacher(batch["pixel_values"])[:, [5, 0, 3, 2]], expected, rtol=1e-5, atol=1e-6)
    trainer.train()
    for indices, message in (([5, 0, 3], "3 entries and the student 4"), ([5, 0, 3, 6], "holds 6; .* 0 ... 5")):
        with pytest.raises(ValueError, match=message):
            DistillationTrainer(
                Plain(classes=4), Teacher(Plain(classes=6), class_indices=indices), args, train_dataset=train_set
            )


def test_classes_are_matched_by_name():
    """The teacher knows the data set's classes, in another order and among others."""
    train_set = images(8, classes=3)
    names = ["other", *reversed(train_set.class_names)]
    load_student("cifar_resnet8", names).save_pretrained("teacher")
    student = load_student("cifar_resnet8", train_set.class_names)
    teacher = load_teacher("teacher")
    trainer = DistillationTrainer(student, teacher, config(losses={"kd": {}}), train_dataset=train_set)
    batch = train_set.__getitems__([0, 1])
    assert torch.equal(teacher(batch).logits, teacher.model(batch["pixel_values"]).logits[:, [3, 2, 1]])
    trainer.train()
    train_set.class_names[0] = "unheard of"
    args = config(losses={"kd": {}})
    with pytest.raises(ValueError, match="4 classes and the student 3.*no 'unheard of'.*teacher_class_indices"):
        DistillationTrainer(Plain(classes=3), load_teacher("teacher"), args, train_dataset=train_set)


def test_a_half_precision_checkpoint_teaches_in_float32_and_bf16():
    load_student("cifar_resnet8", num_classes=10).to(torch.bfloat16).save_pretrained("half")
    batch = images(4).__getitems__([0, 1, 2, 3])
    logits = {}
    for dtype in (None, torch.bfloat16):
        teacher = load_teacher("half")
        teacher.prepare(torch.device("cpu"), dtype, True, layers=[0])
        logits[dtype] = teacher(batch).logits
        assert logits[dtype].dtype is torch.float32
        kept = {module.weight.dtype for module in teacher.model.modules() if isinstance(module, nn.Conv2d)}
        assert kept == {dtype or torch.float32}
    torch.testing.assert_close(logits[None], logits[torch.bfloat16], rtol=0.05, atol=0.05)


def test_a_student_without_class_names_takes_the_data_sets():
    """Else numbers would say nothing, and the teacher's order would be taken for the data set's."""
    train_set = images(8, classes=3)
    load_student("cifar_resnet8", train_set.class_names[::-1]).save_pretrained("teacher")
    student = load_student("cifar_resnet8", num_classes=3)
    trainer = DistillationTrainer(student, load_teacher("teacher"), config(losses={"kd": {}}), train_dataset=train_set)
    batch = train_set.__getitems__([0, 1])
    raw = trainer.teacher.model(batch["pixel_values"]).logits
    assert torch.equal(trainer.teacher(batch).logits, raw.flip(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_classifier_of_a_teacher(dtype):
    """A copy in float32 whatever the run's precision, for the student's classes, in their order."""
    model = Plain(classes=6)
    weight = model.fc.weight.detach().clone()
    teacher = Teacher(model, class_indices=[5, 0, 3, 2])
    teacher.prepare(torch.device("cpu"), dtype, False, layers=["embedding"])
    batch = {"pixel_values": torch.rand(2, 3, 32, 32)}
    teacher.align_classes(list("abcd"), batch)
    outputs = teacher(batch)
    assert torch.equal(outputs.classifier.weight, weight[[5, 0, 3, 2]])
    assert not any(parameter.requires_grad for parameter in outputs.classifier.parameters())
    tolerance = {} if dtype is None else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(outputs.classifier(outputs.embedding), outputs.logits, **tolerance)
    teacher.prepare(torch.device("cpu"), dtype, False)
    assert teacher(batch).classifier is None, "nobody asks for it"


def test_two_averaged_heads_are_no_classifier():
    teacher = Teacher(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, img_size=32, patch_size=8))
    prepared(teacher, layers=["embedding"])
    batch = {"pixel_values": torch.rand(2, 3, 32, 32)}
    assert teacher(batch).classifier is not None
    teacher.align_classes(list("abcd"), batch)
    assert teacher(batch).classifier is None


def test_an_ensembles_standardized_logits_are_not_for_mlkd():
    args = config(losses={"mlkd": {}}, logit_standardization=True)
    with pytest.raises(ValueError, match="'mlkd' also reads logits that are not standardized.*one teacher"):
        DistillationTrainer(Plain(), [Plain(), Plain()], args, train_dataset=images(8))
    plain = config(losses={"mlkd": {}})
    DistillationTrainer(Plain(), [Plain(), Plain()], plain, train_dataset=images(8)).train()
