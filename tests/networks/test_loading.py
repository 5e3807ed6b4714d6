import json
from pathlib import Path

import pytest
import timm
import torch
from helpers import aligned
from hub_stand_in import hub_stand_in
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hfkd import load_student, load_teacher
from hfkd.networks import sources
from hfkd.networks.features import InputSpec
from hfkd.networks.input_spec import input_spec, known_input_spec
from hfkd.networks.loading import load_pretrained
from hfkd.networks.wrapping import exported_state_dict

IMAGENET = InputSpec(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_class_names_size_and_normalisation_travel():
    student = load_student("resnet10t", class_names=["ant", "bee"], image_size=32).eval()
    assert input_spec(student) == IMAGENET
    student.save_pretrained("student")
    loaded = AutoModelForImageClassification.from_pretrained("student").eval()
    assert loaded.config.id2label == {0: "ant", 1: "bee"} and input_spec(loaded) == IMAGENET
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels).logits, student(pixels).logits)
    size = AutoImageProcessor.from_pretrained("student").val_transforms.transforms[0].size
    assert size == 32  # no enlarging before the crop: that is how hfkd prepared the training images


def test_a_vision_transformer_at_another_size_loads_again():
    student = load_student("deit_tiny_patch16_224", num_classes=3, image_size=64).eval()
    student.save_pretrained("vit")
    loaded = AutoModelForImageClassification.from_pretrained("vit").eval()
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(pixels).logits, student(pixels).logits)


def test_a_timm_student_keeps_timms_initialisation():
    torch.manual_seed(0)
    expected = timm.create_model("cifar_resnet8", num_classes=3).state_dict()
    torch.manual_seed(0)
    given = load_student("cifar_resnet8", num_classes=3).timm_model.state_dict()
    assert all(torch.equal(expected[name], given[name]) for name in expected)


def test_a_student_from_weights_gets_a_new_classifier():
    first = load_student("cifar_resnet8", num_classes=3)
    first.save_pretrained("first")
    second = load_student("first", num_classes=5)
    assert second(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)
    assert torch.equal(second.timm_model.conv1.weight, first.timm_model.conv1.weight)
    with pytest.raises(ValueError, match="image_size=64 is for a timm architecture"):
        load_student("first", num_classes=5, image_size=64)


def test_a_student_from_weights_is_saved_with_its_own_class_names():
    load_student("cifar_resnet8", class_names=["ant", "bee"]).save_pretrained("first")
    load_student("first", class_names=["cat", "dog", "eel"]).save_pretrained("second")
    second = AutoModelForImageClassification.from_pretrained("second")
    assert list(second.config.id2label.values()) == ["cat", "dog", "eel"]
    assert json.loads(Path("second/config.json").read_text())["label_names"] == ["cat", "dog", "eel"]


def test_a_transformers_model_from_a_folder():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4)
    ResNetForImageClassification(config).save_pretrained("resnet")
    processor = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    processor.save_pretrained("resnet")
    student = load_student("resnet", num_classes=6)
    assert student.num_labels == 6 and input_spec(student) == InputSpec(48, (0.1,) * 3, (0.2,) * 3)
    teacher = load_teacher("resnet")
    assert teacher.name == "resnet" and teacher.parameter_count() == sum(p.numel() for p in teacher.model.parameters())


def test_clear_errors():
    with pytest.raises(ValueError, match="class_names or num_classes"):
        load_student("cifar_resnet8")
    with pytest.raises(ValueError, match="'cifar_resnet57' is no timm architecture.*cifar_resnet56"):
        load_student("cifar_resnet57", num_classes=2)
    with pytest.raises(ValueError, match="cifar_resnet8 has no pretrained weights.*teacher_checkpoint"):
        load_teacher("cifar_resnet8")
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        load_teacher("cifar_resnet8", "nothing.pth")
    load_student("cifar_resnet8", num_classes=3).save_pretrained("folder")
    with pytest.raises(ValueError, match="is for a timm architecture"):
        load_teacher("folder", "nothing.pth")
    torch.save(timm.create_model("cifar_resnet8", num_classes=7).state_dict(), "seven.pth")
    assert load_teacher("cifar_resnet8", "seven.pth").model.num_classes == 7
    with pytest.raises(ValueError, match="does not take patch_size: .*unexpected keyword"):
        load_student("cifar_resnet8", num_classes=2, patch_size=4)
    with pytest.raises(ValueError, match="drop_path_rate=0.1 is for a timm architecture"):
        load_student("folder", num_classes=3, drop_path_rate=0.1)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "convit_tiny"])
def test_patches_must_divide_the_image(name):
    with pytest.raises(ValueError, match="image_size: .*patches of 16 pixels, every 16, .* divide 40. Take 32 or 48"):
        load_student(name, num_classes=2, image_size=40)
    with pytest.raises(ValueError, match="divide 8. Take 16,"):
        load_student(name, num_classes=2, image_size=8)
    assert load_student(name, num_classes=2, image_size=40, patch_size=8).num_labels == 2


def test_pits_patches_overlap():
    with pytest.raises(ValueError, match="patches of 16 pixels, every 8, .* divide 39. Take 32 or 40"):
        load_student("pit_ti_224", num_classes=2, image_size=39)
    assert load_student("pit_ti_224", num_classes=2, image_size=40).num_labels == 2


@pytest.mark.parametrize("name, multiple", [("t2t_vit_7", 16), ("pvt_tiny", 32)])
def test_other_transformers_say_what_sizes_they_take(name, multiple):
    with pytest.raises(ValueError, match=f"multiples of {multiple}"):
        load_student(name, num_classes=2, image_size=3 * multiple + 8)


def test_a_students_shape_and_preparation_travel():
    student = load_student(
        "deit_tiny_patch16_224", ["ant", "bee"], image_size=32, patch_size=8, drop_path_rate=0.1, crop_pct=0.875
    )
    assert student.timm_model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    student.eval().save_pretrained("folder", state_dict=exported_state_dict(student), save_original_format=False)
    loaded = AutoModelForImageClassification.from_pretrained("folder").eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(aligned(loaded)(images).logits, student(images).logits)
    assert loaded.config.pretrained_cfg["crop_pct"] == 0.875
    assert timm.create_model("local-dir:folder", pretrained=True).patch_embed.patch_size == (8, 8)


@pytest.mark.parametrize(
    "name", ["mixer_s32_224", "deit_tiny_distilled_patch16_224", "pit_ti_distilled_224", "t2t_vit_7", "pvt_v2_b0"]
)
def test_no_head_starts_at_zero(name):
    """The Z-score divides by the spread of the logits."""
    classifiers = load_student(name, num_classes=5).timm_model.get_classifier()
    for classifier in classifiers if isinstance(classifiers, tuple) else [classifiers]:
        assert classifier.weight.std() > 1e-3


def test_a_teacher_that_timm_saved():
    """timm's own save writes num_classes among the model's arguments, which transformers refuses."""
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, "saved", model_args={"num_classes": 3}, safe_serialization=True)
    teacher = load_teacher("saved")
    assert load_student("saved", num_classes=2).num_labels == 2
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(teacher.model(images).logits, model.eval()(images))
    assert teacher.input_spec.image_size == 176


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_teacher_from_the_hub(monkeypatch, dtype):
    """The real client against a server on loopback; a timm model as timm's own repositories hold it, and in bf16."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    timm.models.save_for_hf(model, "repository", safe_serialization=True)
    with hub_stand_in("repository", "someone/resnet10t", monkeypatch) as hub:
        teacher = load_teacher("someone/resnet10t")
        assert any(name == "model.safetensors" for name in hub.asked)
    assert teacher.name == "someone/resnet10t" and teacher.input_spec.image_size == 176
    teacher.prepare(torch.device("cpu"), dtype, True, teacher.input_spec)
    pixels = torch.rand(2, 3, 176, 176)
    logits = teacher({"pixel_values": pixels}).logits
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(logits, model(pixels), **tolerance)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": False}, 256),
    ],
)
def test_the_side_of_a_transformers_teacher_is_what_it_crops(settings, expected):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained("teacher")
    assert known_input_spec(ResNetForImageClassification(config)) is None
    BitImageProcessor(**settings, image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained("teacher")
    assert load_teacher("teacher").input_spec == InputSpec(expected, (0.1,) * 3, (0.2,) * 3)
    BitImageProcessor(**settings, do_normalize=False).save_pretrained("teacher")
    assert load_teacher("teacher").input_spec == InputSpec(expected, (0.0,) * 3, (1.0,) * 3)


def test_a_teacher_that_takes_bgr_is_refused():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained("teacher")
    MobileViTImageProcessor(do_flip_channel_order=True).save_pretrained("teacher")
    with pytest.raises(ValueError, match="BGR: True.*expected a side in pixels and RGB"):
        load_teacher("teacher")


# ---- Where weights come from -----------------------------------------------------------------------------------------


def run_folder(role, num_classes=3):
    load_student("cifar_resnet8", num_classes=num_classes).save_pretrained(f"runs/a/{role}")
    Path("runs/a/results.json").write_text(json.dumps({"role": role}))
    return load_file(f"runs/a/{role}/model.safetensors")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_runs_folder(role):
    saved = run_folder(role)
    for model in (load_teacher("runs/a").model, load_student("runs/a", num_classes=3)):
        assert torch.equal(model.timm_model.fc.weight, saved["timm_model.fc.weight"])
    assert load_teacher("runs/a").name == "cifar_resnet8"


def test_a_runs_folder_without_a_model():
    Path("runs/a/checkpoint-3").mkdir(parents=True)
    Path("runs/a/results.json").write_text("{}")
    with pytest.raises(ValueError, match="runs/a is the folder of a run that has no trained model yet"):
        load_teacher("runs/a")
    Path("runs/b").mkdir()
    with pytest.raises(ValueError, match="runs/b has no model that can be loaded"):
        load_student("runs/b", num_classes=2)


def test_damaged_files(tmp_path):
    load_student("cifar_resnet8", ["a", "b"]).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in written.items() if key != "pretrained_cfg"}))
    with pytest.raises(ValueError, match="does not hold the size and the normalisation of its images"):
        input_spec(load_pretrained(str(tmp_path)))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="has no weights that can be loaded.*incomplete"):
        load_pretrained(str(tmp_path))
    config.write_text(json.dumps(written | {"num_classes": 0.5}))
    with pytest.raises(ValueError, match="has no model that can be loaded"):
        load_pretrained(str(tmp_path))


def test_a_hub_id_without_a_network():
    for name in ("timm/resnet10t.c3_in1k", "hf-hub:timm/resnet10t.c3_in1k"):
        with pytest.raises(ValueError, match="^timm/resnet10t.c3_in1k has no model .* HF_HUB_OFFLINE is set"):
            load_student(name, num_classes=2)


def test_timms_prefixes(monkeypatch):
    model = timm.create_model("resnet10t", num_classes=5).eval()
    timm.models.save_for_hf(model, "repository", safe_serialization=True)
    with hub_stand_in("repository", "timm/resnet10t.c3_in1k", monkeypatch):
        teacher = load_teacher("hf-hub:timm/resnet10t.c3_in1k")
        assert torch.equal(teacher.model.timm_model.conv1[0].weight, model.conv1[0].weight)
        assert teacher.hub_id == teacher.name == "timm/resnet10t.c3_in1k"
    assert load_teacher("local-dir:repository").model.num_labels == 5


def test_a_tag_names_weights(monkeypatch):
    """A student takes them, or is refused; random ones in silence would look like pretrained ones."""
    for load in (lambda name: load_student(name, num_classes=3), load_teacher):
        with pytest.raises(
            ValueError, match="resnet10t.c3_in1k has no pretrained weights that can be loaded.*resnet10t, "
        ):
            load("resnet10t.c3_in1k")
        with pytest.raises(
            ValueError, match="resnet10t has no pretrained weights 'c4'. Did you mean 'resnet10t.c3_in1k'"
        ):
            load("resnet10t.c4")
    model = timm.create_model("resnet10t")
    timm.models.save_for_hf(model, "repository", safe_serialization=True)
    with hub_stand_in("repository", "timm/resnet10t.c3_in1k", monkeypatch):
        student = load_student("resnet10t.c3_in1k", num_classes=3, image_size=32)
    assert torch.equal(student.timm_model.conv1[0].weight, model.conv1[0].weight)
    assert student.timm_model.fc.weight.shape[0] == 3
    student.save_pretrained("student")
    loaded = AutoModelForImageClassification.from_pretrained("student")
    assert torch.equal(loaded.timm_model.fc.weight, student.timm_model.fc.weight)


def save_backbone(folder):
    """A network as self-supervised training leaves it."""
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    Dinov2Model(Dinov2Config(**settings)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)


def test_a_backbone_is_a_student_and_no_classifier(monkeypatch):
    save_backbone("backbone")
    with pytest.raises(
        ValueError, match="backbone .*its classifier is not in the checkpoint .classifier.bias, classifi"
    ):
        load_pretrained("backbone")
    assert not load_teacher("backbone").has_classifier
    told = []
    monkeypatch.setattr(sources.logger, "warning", told.append)
    assert load_student("backbone", num_classes=2).num_labels == 2  # as many as the configuration says
    assert ["new classifier for 2 classes; the checkpoint has none" in line for line in told] == [True]
    load_student("cifar_resnet8", num_classes=3).save_pretrained("three")
    load_student("three", num_classes=3)
    load_student("three", num_classes=5)
    assert ["new classifier for 5 classes; the checkpoint has one for 3" in line for line in told] == [False, True]


def test_weights_that_are_not_in_the_checkpoint():
    load_student("cifar_resnet8", num_classes=3).save_pretrained("model")
    weights = load_file("model/model.safetensors")
    lacking = {name: value for name, value in weights.items() if name != "timm_model.conv1.weight"}
    assert len(lacking) < len(weights)
    save_file(lacking, "model/model.safetensors", metadata={"format": "pt"})
    for load in (lambda name: load_student(name, num_classes=3), load_teacher):
        with pytest.raises(
            ValueError, match="model lacks weights of TimmWrapper.*: timm_model.conv1.weight. They would"
        ):
            load("model")
    whole = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    save_file(whole, "model/model.safetensors", metadata={"format": "pt"})
    load_teacher("model")
