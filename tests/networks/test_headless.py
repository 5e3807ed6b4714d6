"""Teachers without a classifier, and teachers with other classes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    dynamic_module_utils,
)

from hfkd import DistillationTrainer, load_student, load_teacher
from hfkd.errors import HfkdError
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.features import InputSpec
from hfkd.networks.teacher import Teacher, TeacherEnsemble
from hfkd.networks.wrapping import wrap_timm
from tests.helpers import Plain, config, images, train_logs

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SMALL |= {"image_size": 48, "intermediate_size": 16}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
STAGES = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
SPEC = InputSpec(32, CIFAR_MEAN, CIFAR_STD)
FEATURES = {"losses": {"token_mse": {}}, "logit_standardization": False, "max_steps": 2}


def saved(model, folder):
    model.save_pretrained(folder)
    BitImageProcessor(crop_size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return saved(Dinov2Model(Dinov2Config(**SMALL)), tmp_path_factory.mktemp("headless") / "dinov2")


def outputs_of(teacher, layers=(-1, "embedding"), pixels=None):
    batch = {"pixel_values": torch.rand(2, 3, 32, 32) if pixels is None else pixels}
    teacher.prepare(CPU, None, False, layers=layers)
    teacher.align_classes(["cat", "dog"], batch, required=False)
    return teacher(batch)


def towers(model_class, config_class, **settings):
    return model_class(config_class(vision_config=SMALL, text_config=TEXT, **settings))


@pytest.mark.parametrize(
    ("model", "vision", "prefix"),
    [
        (lambda: Dinov2Model(Dinov2Config(**SMALL)), Dinov2Model, 1),
        (
            lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)),
            Dinov2WithRegistersModel,
            5,
        ),
        (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, num_register_tokens=4)), DINOv3ViTModel, 5),
        (lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**STAGES)), DINOv3ConvNextModel, 1),
        (lambda: ViTModel(ViTConfig(**SMALL)), ViTModel, 1),
        (lambda: ConvNextModel(ConvNextConfig(**STAGES)), ConvNextModel, None),
        (lambda: towers(CLIPModel, CLIPConfig, projection_dim=8), CLIPVisionModel, 1),
        (lambda: towers(SiglipModel, SiglipConfig), SiglipVisionModel, 0),
        (lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)), SiglipVisionModel, 0),
    ],
    ids=["dinov2", "registers", "dinov3", "dinov3-convnext", "vit", "convnext", "clip", "siglip", "siglip-vision"],
)
def test_folders_of_transformers(model, vision, prefix, tmp_path):
    """Size and normalisation are the image processor's; the ViTs, made for 48 pixels, see 32."""
    folder = saved(model(), tmp_path / "folder")
    pixels = torch.rand(2, 3, 32, 32)
    tower = vision.from_pretrained(folder).eval()
    options = {} if prefix is None or "DINOv3" in vision.__name__ else {"interpolate_pos_encoding": True}
    expected = tower(pixels, **options if "Dinov2" not in vision.__name__ else {})
    teacher = load_teacher(folder)
    outputs = outputs_of(teacher, pixels=pixels)
    assert teacher.input_spec == InputSpec(32, (0.4, 0.4, 0.4), teacher.input_spec.std)
    assert not teacher.has_classifier and not teacher.shares_classes and outputs.logits.shape == (2, 0)
    features = expected.last_hidden_state
    if prefix is not None:
        features = features[:, prefix:].transpose(1, 2)
        side = round(features.shape[2] ** 0.5)
        features = features.unflatten(2, (side, side))
    torch.testing.assert_close(outputs.features[-1], features)
    torch.testing.assert_close(outputs.embedding, expected.pooler_output.flatten(1))


def test_a_vit_without_a_pooler(tmp_path):
    """DINO's are published so: transformers would make a random one."""
    folder = saved(ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), tmp_path / "folder")
    pixels = torch.rand(2, 3, 32, 32)
    expected = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()(pixels, interpolate_pos_encoding=True)
    outputs = outputs_of(load_teacher(folder), pixels=pixels)
    torch.testing.assert_close(outputs.embedding, expected.last_hidden_state[:, 0])


class Backbone(nn.Module):
    """A module of nobody's library."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 8, 8, stride=8), kind

    def forward(self, pixel_values):
        found = self.conv(pixel_values)
        if self.kind == "tokens":
            return torch.cat([found.mean(dim=(2, 3))[:, None], found.flatten(2).transpose(1, 2)], dim=1)
        return found if self.kind == "map" else found.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("model", "side", "width"),
    [
        (lambda: timm.create_model("test_vit", num_classes=0, img_size=32), 2, 64),
        (lambda: timm.create_model("test_resnet", num_classes=0), 1, 96),
        (lambda: wrap_timm(timm.create_model("test_resnet", num_classes=0), []), 1, 96),
        (lambda: timm.create_model("test_convnext", num_classes=0), 1, 64),
        (lambda: Backbone("tokens"), 4, 8),
        (lambda: Backbone("map"), 4, 8),
        (lambda: Backbone("vector"), 1, 8),
    ],
    ids=["timm's tokens", "timm's map", "the wrapper", "convnext", "tokens", "map", "vector"],
)
def test_modules(model, side, width):
    network = model()
    known = None if not isinstance(network, Backbone) else False
    outputs = outputs_of(Teacher(network, input_spec=SPEC, has_classifier=known))
    assert outputs.features[-1].shape == (2, width, side, side) and outputs.embedding.shape == (2, width)
    if isinstance(network, Backbone):
        torch.testing.assert_close(outputs.embedding, outputs.features[-1].mean(dim=(2, 3)))


def test_weights_of_an_architecture_without_its_classifier(tmp_path):
    """A file tells how many classes there are; none is as good a number as any."""
    given = timm.create_model("cifar_resnet8", num_classes=0)
    save_file(given.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_teacher("cifar_resnet8", str(tmp_path / "weights.safetensors"))
    assert not teacher.has_classifier
    torch.testing.assert_close(teacher.model.backbone.conv1.weight, given.conv1.weight)


def test_layers_have_the_backbones_names(dinov2):
    """Stages are the blocks and what the network returns; tokens of any layer lose their prefix."""
    layers = [0, -2, "encoder.layer.1", "encoder.layer.0.norm1:input", "layernorm:affine", -1]
    features = outputs_of(load_teacher(dinov2), layers).features
    assert all(features[layer].shape == (2, 16, 4, 4) for layer in layers if layer != "layernorm:affine")
    assert torch.equal(features[-2], features["encoder.layer.1"]) and features["layernorm:affine"].shape == (2, 16)
    with pytest.raises(HfkdError, match="Dinov2Model has no layer 'encoder.layers.1'. Near are encoder.layer.1"):
        outputs_of(load_teacher(dinov2), ["encoder.layers.1"])
    with pytest.raises(HfkdError, match="Dinov2Model has no stage 3. Stages: 0 .encoder.layer.0., .*, 2 .last_map."):
        outputs_of(load_teacher(dinov2), [3])


def trained(student, teacher, tmp_path, eval_set=True, resume=None, **changes):
    settings = config(tmp_path, **FEATURES | changes)
    data = {"train_dataset": images()} | ({"eval_dataset": images(augment=False)} if eval_set else {})
    trainer = DistillationTrainer(student, teacher, settings, **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_training_at_several_levels_without_agreement(dinov2, tmp_path, capsys):
    """A CNN's stages learn from a ViT's blocks; what is printed does not speak of the teacher's classes."""
    levels = {"student_layers": [-2, -1], "teacher_layers": [0, -1]}
    losses = {"token_mse": levels, "feature_queue": {"size": 16}, "at": levels, "vid": levels}
    student = load_student("cifar_resnet8", num_classes=10)
    before = student.state_dict()["timm_model.conv1.weight"].clone()
    trainer = trained(student, load_teacher(dinov2), tmp_path, losses=losses)
    logs, metrics = train_logs(trainer), trainer.evaluate()
    assert logs and all(f"loss_{name}" in log for log in logs for name in losses)
    assert "eval_top1" in metrics and metrics.keys().isdisjoint({"eval_agreement", "eval_teacher_top1"})
    assert len(trainer.distiller.losses["token_mse"].projectors) == 2
    assert not torch.equal(before, student.state_dict()["timm_model.conv1.weight"])
    printed = capsys.readouterr().out
    assert "dinov2" in printed and "no classifier" in printed and "The teacher" not in printed


@pytest.mark.parametrize("loss", ["sp", "pkt", "rkd", "cc", "crd", "srd", "vkd", "fitnet", "nst", "mgd", "itrd"])
def test_other_losses_of_features(loss, dinov2, tmp_path):
    arguments = {"student_layers": [-1], "teacher_layers": [-1]} if loss in ("sp", "fitnet", "nst", "mgd") else {}
    losses = {loss: arguments}
    trainer = trained(
        load_student("cifar_resnet8", num_classes=10), dinov2, tmp_path, False, losses=losses, max_steps=1
    )
    assert any(term.startswith(f"loss_{loss}") for term in train_logs(trainer)[0])


def test_a_teacher_with_other_classes(tmp_path):
    """Its features are taken, and its classes, which nothing compares, are left alone."""
    student, teacher = load_student("cifar_resnet8", num_classes=10), timm.create_model("cifar_resnet8", num_classes=7)
    trainer = trained(student, teacher, tmp_path)
    assert not trainer.teacher.shares_classes and trainer.teacher.has_classifier
    assert "eval_agreement" not in trainer.evaluate()
    with pytest.raises(HfkdError, match="The teacher has 7 classes and the student 10"):
        trained(student, teacher, tmp_path, losses={"kd": {"temperature": 4.0}})
    same = trained(student, timm.create_model("cifar_resnet8", num_classes=10), tmp_path)
    assert "eval_agreement" in same.evaluate()


def test_a_student_without_a_classifier(dinov2, tmp_path):
    student = load_student("cifar_resnet8", num_classes=0)
    trainer = trained(student, load_teacher(dinov2), tmp_path, False, ce_weight=0.0)
    assert trainer.num_classes == 0 and not trainer.has_classifier
    named = trained("cifar_resnet8", load_teacher(dinov2), tmp_path, False, ce_weight=0.0)
    assert named.model.timm_model.num_classes == 0
    bare = trained(timm.create_model("cifar_resnet8", num_classes=0), dinov2, tmp_path, False, ce_weight=0.0)
    assert bare.model.state_dict().keys() == named.model.state_dict().keys() == student.state_dict().keys()
    with pytest.raises(HfkdError, match="student has no classifier, and ce_weight is 1"):
        trained(student, load_teacher(dinov2), tmp_path, False)
    with pytest.raises(HfkdError, match=r"student has no classifier, and the losses \['kd'\] read logits"):
        trained(student, Plain(), tmp_path, False, ce_weight=0.0, losses={"kd": {"temperature": 4.0}})
    with pytest.raises(HfkdError, match="it must be a timm architecture, .*dinov2 is neither"):
        load_student(dinov2, num_classes=0)


def test_a_backbone_resumes_to_the_bit(dinov2, tmp_path):
    """Queue and projectors included."""
    settings = {"losses": {"token_mse": {}, "feature_queue": {"size": 24}}, "ce_weight": 0.0, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = trained("cifar_resnet8", dinov2, tmp_path / "whole", False, **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = trained("cifar_resnet8", dinov2, tmp_path / "resumed", False, checkpoint, **settings)
    expected, given = whole.distiller.state_dict(), resumed.distiller.state_dict()
    assert "losses.feature_queue.queue" in given and given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize("loss", ["kd", "srrl", "simkd", "cat_kd"])
def test_a_loss_of_logits_or_a_classifier_is_refused(loss, dinov2, tmp_path):
    losses = {loss: {"temperature": 4.0} if loss == "kd" else {}, "pkt": {}}
    with pytest.raises(HfkdError, match=rf"\['{loss}'\] read logits or a classifier, and the teacher .* has none.*tok"):
        trained(load_student("cifar_resnet8", num_classes=10), load_teacher(dinov2), tmp_path, losses=losses)


def test_refused_teachers(dinov2, tmp_path):
    with pytest.raises(HfkdError, match="mean of their logits, and dinov2 has no classifier"):
        TeacherEnsemble([load_teacher(dinov2), Teacher(Plain())], standardized=False)
    with pytest.raises(HfkdError, match="teacher_class_indices is for a teacher with classes, and dinov2 has no"):
        load_teacher(dinov2, class_indices=[0, 1])
    with pytest.raises(HfkdError, match="CLIPModel takes more than images: give its vision tower"):
        Teacher(towers(CLIPModel, CLIPConfig, projection_dim=8))
    with pytest.raises(HfkdError, match="ViTMAEModel leaves patches out at random"):
        Teacher(ViTMAEModel(ViTMAEConfig(**SMALL)))
    with pytest.raises(HfkdError, match=r"Backbone must return logits .*Teacher\(model, has_classifier=False\)"):
        outputs_of(Teacher(Backbone("map"), input_spec=SPEC), layers=[])
    with pytest.raises(HfkdError, match=r"student_layers: -1 gives one place .* the teacher 4 x 4: give larger images"):
        trained(load_student("test_resnet", num_classes=10, image_size=32), load_teacher(dinov2), tmp_path)
    network = Teacher(Dinov2Model(Dinov2Config(**SMALL)))
    with pytest.raises(HfkdError, match=r"cuts images into patches of 8 pixels, and these have \(4, 4\)"):
        outputs_of(network, pixels=torch.rand(2, 3, 4, 4))


def test_code_that_comes_with_a_backbone(tmp_path, monkeypatch):
    """It is run where the user trusts it, and refused elsewhere."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = Dinov2Model(Dinov2Config(**SMALL))
    model._weight_conversions = []  # saved under today's names: for a type of its own, former ones are not converted
    folder = saved(model, tmp_path / "own")
    Path(folder, "code.py").write_text(
        "from transformers import Dinov2Config, Dinov2Model\n"
        "class OwnConfig(Dinov2Config):\n    model_type = 'own_vit'\n"
        "class OwnViT(Dinov2Model):\n    config_class = OwnConfig\n"
    )
    path = Path(folder, "config.json")
    auto_map = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnViT"}
    own = {"model_type": "own_vit", "architectures": ["OwnViT"], "auto_map": auto_map}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(FileNotFoundError, match="comes with code of its own, which was not run.*: true"):
        load_teacher(folder)
    teacher = load_teacher(folder, trust_remote_code=True)
    assert type(teacher.network).__name__ == "OwnViT" and not teacher.has_classifier
    assert outputs_of(teacher).features[-1].shape == (2, 16, 4, 4)
