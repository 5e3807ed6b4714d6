"""Students that start from blocks of their teacher: networks of timm, of transformers and of hfkd, and mistakes."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hfkd import Teacher, inherit_blocks, load_student, load_teacher
from hfkd.cli import main
from hfkd.commands.search import build_search_trainer
from hfkd.networks.wrapping import wrap_timm
from hfkd.recipe.reading import parse_recipe

NAMES = ["ant", "bee", "cat"]
BLOCKS = {"layer1": [1], "layer2": [0], "layer3": [0]}


def pixels(size=32):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(architecture, names=NAMES):
    torch.manual_seed(1)
    model = load_student(architecture, names)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # else all norms are alike
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight)
    return model.eval()


def test_a_cnn_is_its_teacher_without_the_other_blocks():
    model, student = network("cifar_resnet20"), load_student("cifar_resnet8", NAMES).eval()
    inherit_blocks(student, Teacher(model), BLOCKS)
    cut = copy.deepcopy(model)
    for path, taken in BLOCKS.items():
        blocks = getattr(cut.timm_model, path)
        setattr(cut.timm_model, path, nn.Sequential(*(blocks[index] for index in taken)))
    assert torch.equal(student(pixels()).logits, cut(pixels()).logits)
    assert not torch.equal(student(pixels()).logits, model(pixels()).logits)


def test_the_weights_are_copies():
    model, student = network("cifar_resnet8"), load_student("cifar_resnet8", NAMES)
    inherit_blocks(student, Teacher(model), {path: [0] for path in BLOCKS})
    before = model.timm_model.conv1.weight.clone()
    student.timm_model.conv1.weight.data.zero_()
    assert torch.equal(model.timm_model.conv1.weight, before)


def test_a_vision_transformer_with_two_heads():
    settings = {"img_size": 32, "embed_dim": 24, "num_heads": 3}
    deep, shallow = (
        timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=depth, **settings) for depth in (4, 2)
    )
    student = wrap_timm(shallow, NAMES, settings | {"depth": 2}).eval()
    inherit_blocks(student, Teacher(deep.eval()), {"blocks": [1, 3]})
    deep.blocks = nn.Sequential(deep.blocks[1], deep.blocks[3])
    assert torch.equal(student(pixels()).logits, deep(pixels()))


def vit(folder, depth, names):
    """A small ViT of transformers in a folder."""
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
    ViTForImageClassification(ViTConfig(num_hidden_layers=depth, **shape, **classes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.mark.parametrize(
    "indices, rows", [(None, [2, 0]), ([1, 0], [1, 0])], ids=["matched by name", "teacher_class_indices"]
)
def test_a_model_of_transformers_and_the_rows_of_the_students_classes(indices, rows):
    vit("deep", 4, NAMES)
    vit("shallow", 2, ["cat", "ant"])
    student, teacher = load_student("shallow", ["cat", "ant"]), load_teacher("deep", class_indices=indices)
    path = next(name for name in teacher.model.state_dict() if ".3." in name).partition(".3.")[0]
    inherit_blocks(student, teacher, {path: [1, 3]})
    assert torch.equal(student.classifier.weight, teacher.model.classifier.weight[rows])
    own, given = student.get_submodule(path)[1].state_dict(), teacher.model.get_submodule(path)[3].state_dict()
    assert own and all(torch.equal(own[name], given[name]) for name in given)


def test_a_classifier_that_begins_with_a_norm():
    """LeViT has one over its 16 channels."""
    settings = {"img_size": 32, "embed_dim": (16, 16, 16), "num_heads": (1, 1, 1), "key_dim": 8}
    deep = timm.create_model("levit_128s", num_classes=3, depth=(2, 1, 1), **settings)
    nn.init.uniform_(deep.head.bn.weight)
    model_args = settings | {"depth": (1, 1, 1)}
    names = ["0", "1"]
    own = wrap_timm(timm.create_model("levit_128s", num_classes=2, **model_args), names, model_args)
    blocks = {"stages.0.blocks": [1]}
    inherit_blocks(own, Teacher(deep, class_indices=[2, 0]), blocks)
    assert torch.equal(own.timm_model.head.linear.weight, deep.head.linear.weight[[2, 0]])
    assert torch.equal(own.timm_model.head.bn.weight, deep.head.bn.weight)


def test_other_classes_leave_the_classifier_as_it_is(caplog):
    model, student = network("cifar_resnet8"), load_student("cifar_resnet8", ["oak", "elm"])
    before = student.timm_model.fc.weight.clone()
    inherit_blocks(student, Teacher(model), {path: [0] for path in BLOCKS})
    assert torch.equal(student.timm_model.fc.weight, before)
    assert torch.equal(student.timm_model.conv1.weight, model.timm_model.conv1.weight)
    assert "its classifier starts from new weights" in caplog.text


@pytest.mark.parametrize("names", [[], NAMES], ids=["student without a classifier", "student with one"])
def test_a_teacher_without_a_classifier(names):
    settings = {"img_size": 32, "embed_dim": 24, "num_heads": 3}
    given = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=0, **settings)
    model_args = settings | {"depth": 2}
    own = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=len(names), **model_args), names, model_args)
    before = copy.deepcopy(own.state_dict())
    inherit_blocks(own, Teacher(given), {"blocks": [0, 3]})
    assert torch.equal(own.timm_model.blocks[1].mlp.fc1.weight, given.blocks[3].mlp.fc1.weight)
    kept = {name for name, value in own.state_dict().items() if name.startswith("timm_model.head.")}
    assert len(kept) == 2 * bool(names) and all(torch.equal(own.state_dict()[name], before[name]) for name in kept)


def test_a_student_without_a_classifier():
    settings = {"img_size": 32, "embed_dim": 24, "num_heads": 3}
    given = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=3, **settings)
    model_args = settings | {"depth": 2}
    own = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=0, **model_args), [], model_args)
    inherit_blocks(own, Teacher(given), {"blocks": [0, 3]})
    assert torch.equal(own.timm_model.norm.weight, given.norm.weight)


@pytest.mark.parametrize(
    "teacher, student, blocks, message",
    [
        ("20", "8", {"blocks": [0]}, r"blocks is no list of blocks of the student, which has layer1 \(1\), layer2"),
        ("20", "8", {"layer1": [1, 2]}, r"the student has 1 blocks in layer1, and 2 of the teacher's are named \(1, 2"),
        ("20", "8", {"layer1": [3]}, "the teacher's blocks in layer1 are 0 to 2, and 3 is named"),
        ("20", "8", {"layer1": [1], "layer2": [0]}, "of layer3 the student has 1 and the teacher 3: name those"),
        ("20", "8", BLOCKS | {"layer2": [1]}, r"layer2.0.conv1.weight of the student has the shape \(32, 16, 3, 3\)"),
        ("20", "8x4", BLOCKS, r"conv1.weight of the student has .* of the teacher has the shape \(16, 3, 3, 3\)"),
        ("8", "20", {path: [0, 0, 0] for path in BLOCKS}, "layer2.1.conv1.weight of the student"),
        ("20", "20", {"layer1": [0, 1, 1]}, None),
    ],
)
def test_networks_that_do_not_fit(teacher, student, blocks, message):
    given, own = network(f"cifar_resnet{teacher}"), load_student(f"cifar_resnet{student}", NAMES)
    if message is None:
        return inherit_blocks(own, Teacher(given), blocks)
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match=message):
        inherit_blocks(own, Teacher(given), blocks)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_nothing_of_a_block_that_is_taken_is_dropped():
    """A teacher with norms of queries and keys has all weights of a student without them, and more."""
    settings = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2}
    given = timm.create_model("vit_tiny_patch16_224", num_classes=3, qk_norm=True, **settings)
    own = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings), NAMES, settings)
    with pytest.raises(ValueError, match=r"the student has no place for blocks.\d.attn.[qk]_norm"):
        inherit_blocks(own, Teacher(given), {"blocks": [0, 1]})


@pytest.mark.parametrize("more", [[], ["--teacher_cache", "auto"]], ids=["live", "cache that fills itself"])
def test_from_the_command_line(capsys, more):
    model = network("cifar_resnet14", [str(index) for index in range(10)]).timm_model
    save_file(model.state_dict(), "teacher.safetensors")
    blocks = "{layer1: [1], layer2: [0], layer3: [0]}"
    main(
        "distill --dataset_name digits --train_split train[:64] --eval_split test[:32] --teacher cifar_resnet14 "
        "--teacher_checkpoint teacher.safetensors --student cifar_resnet8 --output_dir run --max_steps 1 "
        "--learning_rate 0 --weight_decay 0 --warmup_steps 0".split()
        + ["--teacher_blocks", blocks, *more]
    )
    assert "weights of the teacher's blocks layer1 1, layer2 0, layer3 0" in capsys.readouterr().out
    written = load_file("run/student/model.safetensors")
    assert torch.equal(written["layer1.0.conv1.weight"], model.layer1[1].conv1.weight)
    assert torch.equal(written["fc.weight"], model.fc.weight)


def test_every_trial_of_a_search_starts_from_them():
    network("cifar_resnet14", [str(index) for index in range(10)]).save_pretrained("teacher")
    Path("r.yaml").write_text(
        "{student: cifar_resnet8, teacher: teacher, dataset_name: digits, train_split: 'train[:64]', losses: {kd: {}},"
        "teacher_blocks: {layer1: [1], layer2: [0], layer3: [0]}}"
    )
    *settings, _ = parse_recipe(["r.yaml"])
    trainer = build_search_trainer(*settings, held_out=0.25)
    first, second = (trainer.call_model_init().state_dict() for _ in range(2))
    given = load_file("teacher/model.safetensors")
    assert torch.equal(first["timm_model.layer1.0.conv1.weight"], given["timm_model.layer1.1.conv1.weight"])
    assert first and all(torch.equal(first[name], second[name]) for name in first)
