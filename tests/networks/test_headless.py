"""Teachers without a classifier."""

import pytest
import timm
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hfkd import DistillationTrainer, load_student, load_teacher
from hfkd.errors import HfkdError
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.features import InputSpec
from hfkd.networks.teacher import Teacher
from tests.helpers import config, images, train_logs

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headless") / "dinov2"
    Dinov2Model(Dinov2Config(**SMALL, image_size=48)).save_pretrained(folder)
    BitImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def outputs_of(teacher):
    teacher.prepare(CPU, None, False, layers=[-1, "embedding"])
    teacher.align_classes(["cat", "dog"], {"pixel_values": torch.rand(2, 3, 32, 32)})
    return teacher({"pixel_values": torch.rand(2, 3, 32, 32)})


def test_a_folder_of_dinov2(dinov2):
    teacher = load_teacher(str(dinov2))
    pixels = torch.rand(2, 3, 32, 32)
    expected = Dinov2Model.from_pretrained(dinov2).eval()(pixels)
    teacher.prepare(CPU, None, False, layers=[-1, "embedding"])
    outputs = teacher({"pixel_values": pixels})
    assert teacher.input_spec.image_size == 32 and not teacher.has_classifier and outputs.logits.shape == (2, 0)
    patches = expected.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(outputs.features[-1], patches)
    torch.testing.assert_close(outputs.embedding, expected.pooler_output)


@pytest.mark.parametrize(
    ("model", "side", "width"),
    [
        (lambda: ViTModel(ViTConfig(**SMALL, image_size=48)), 4, lambda model: model.config.hidden_size),
        (lambda: timm.create_model("test_vit", num_classes=0, img_size=32), 2, lambda model: model.num_features),
        (lambda: timm.create_model("test_resnet", num_classes=0), 1, lambda model: model.num_features),
    ],
    ids=["another grid of patches", "timm's tokens", "timm's map"],
)
def test_backbones(model, side, width):
    """The teacher takes the images as large as they are: a ViT made for 48 pixels sees 32."""
    network = model()
    outputs = outputs_of(Teacher(network, input_spec=InputSpec(32, CIFAR_MEAN, CIFAR_STD)))
    channels = width(network)
    assert outputs.features[-1].shape == (2, channels, side, side) and outputs.embedding.shape == (2, channels)


def test_training_without_agreement(dinov2, tmp_path):
    student = load_student("cifar_resnet8", num_classes=10)
    losses = {"token_mse": {"weight": 1.0}}
    settings = config(tmp_path, losses=losses, logit_standardization=False, max_steps=2)
    trainer = DistillationTrainer(
        student, load_teacher(str(dinov2)), settings, train_dataset=images(), eval_dataset=images(augment=False)
    )
    before = student.state_dict()["timm_model.conv1.weight"].clone()
    trainer.train()
    logs = train_logs(trainer)
    metrics = trainer.evaluate()
    assert all("loss_token_mse" in log for log in logs) and logs
    assert "eval_top1" in metrics and "eval_agreement" not in metrics
    assert not torch.equal(before, student.state_dict()["timm_model.conv1.weight"])


def test_a_loss_of_logits_is_refused(dinov2, tmp_path):
    student = load_student("cifar_resnet8", num_classes=10)
    with pytest.raises(
        HfkdError, match=r"\['kd'\] read logits or a classifier, and the teacher .* has none.*token_mse"
    ):
        DistillationTrainer(
            student,
            load_teacher(str(dinov2)),
            config(tmp_path, losses={"kd": {"temperature": 4.0}}),
            train_dataset=images(),
        )
