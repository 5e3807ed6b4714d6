"""A teacher that one device does not hold: `device_map`, here over the memory and the disk of one machine."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import Plain, config, images
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hfkd import DistillationTrainer, Teacher, load_teacher
from hfkd.commands.build import load_teachers
from hfkd.networks.teacher import check_placement
from hfkd.recipe.arguments import ModelArguments

# Half of it in memory, half on the disk, from where its parts come for their own forward.
DEVICE_MAP = {
    **{"vit.embeddings": "cpu", "vit.layers.0": "cpu", "vit.layers.1": "disk"},
    **{"vit.layernorm": "cpu", "classifier": "disk"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT of transformers with two layers."""
    path = tmp_path_factory.mktemp("run") / "teacher"
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **shape)).save_pretrained(path)
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_spread_it_says_the_same(folder, dtype):
    """Also its layers, and its classifier, whose weights lie on the disk.

    To the bit, so not in channels_last: a spread teacher stays as it was loaded, and another memory format is other
    arithmetic.
    """
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for device_map in (None, DEVICE_MAP):
        teacher = load_teacher(folder, device_map=device_map)
        assert teacher.dispatched == (device_map is not None)
        teacher.prepare(torch.device("cpu"), dtype, False, layers=["vit.layers.1", "embedding"])
        teacher.align_classes([f"LABEL_{index}" for index in range(9, -1, -1)], {"pixel_values": pixels})
        outputs.append(teacher({"pixel_values": pixels}))
    whole, spread = outputs
    assert teacher.model.classifier.weight.is_meta and not teacher.model.vit.layernorm.weight.is_meta
    used = {module.weight.dtype for module in teacher.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert used == {dtype or torch.float32}
    assert torch.equal(spread.logits, whole.logits)
    assert torch.equal(spread.features["vit.layers.1"], whole.features["vit.layers.1"])
    assert torch.equal(spread.classifier.weight, whole.classifier.weight)


def test_from_a_recipe_to_a_training(folder):
    """The student learns what it learns from the teacher in one piece."""
    train_set, eval_set = images(16), images(12, seed=1, augment=False)
    states = []
    for device_map in (None, "auto", DEVICE_MAP):
        arguments = ModelArguments("cifar_resnet8", teacher_name_or_path=folder, teacher_device_map=device_map)
        torch.manual_seed(0)
        args = config(losses={"kd": {}, "sp": {"student_layers": ["conv"], "teacher_layers": ["vit.layers.1"]}})
        trainer = DistillationTrainer(
            Plain(), load_teachers(arguments), args, train_dataset=train_set, eval_dataset=eval_set
        )
        trainer.train()
        states.append((trainer.evaluate()["eval_agreement"], trainer.model.state_dict()))
    for agreement, state in states[1:]:
        assert agreement == states[0][0]
        for name, expected in states[0][1].items():
            # The teacher in one piece is channels_last, the spread one is not: float32 rounds differently.
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_accelerate_offloaded():
    """Not transformers' alone: its weights stay in the memory of the machine."""
    model, pixels = Plain(), torch.rand(2, 3, 32, 32)
    expected = model(pixels)
    teacher = Teacher(cpu_offload(model, torch.device("cpu")))
    teacher.prepare(torch.device("cpu"), None, True)
    assert teacher.model.fc.weight.is_meta
    torch.testing.assert_close(teacher({"pixel_values": pixels}).logits, expected, rtol=0, atol=0)


def test_a_mapping_in_a_recipe():
    assert ModelArguments("deit", teacher_device_map='{"vit": 0, "classifier": "cpu"}').teacher_device_map == {
        "vit": 0,
        "classifier": "cpu",
    }


def test_what_is_refused(folder):
    with pytest.raises(ValueError, match="teacher_device_map is for models of transformers.*cifar_resnet56 is a timm"):
        load_teacher("cifar_resnet56", device_map="auto")
    teacher = load_teacher(folder, device_map=DEVICE_MAP)
    for settings, message in (
        ({"processes": 2}, "vit is spread.*2 processes.*start one process.*shard_teacher"),
        ({"compiled": True}, "torch_compile is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            check_placement(teacher, **{"processes": 1, "compiled": False} | settings)
    with pytest.raises(ValueError, match="already spreads it over devices"):
        teacher.prepare(torch.device("cpu"), None, False, shard=True)
