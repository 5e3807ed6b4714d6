"""Frozen parts of a student, by patterns of their names: from a recipe and from code."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import DIGITS_RECIPE, config, images

from hfkd import DistillationTrainer, load_student
from hfkd.cli import main
from hfkd.commands.train import train_teacher
from hfkd.training.freezing import frozen_names

RECIPE = DIGITS_RECIPE | {
    "train_split": "train[:48]",
    "num_train_epochs": 2,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "decay_all_parameters": True,
    "ema_decay": 0.9,
    "save_strategy": "epoch",
    "disable_tqdm": True,
}
FREEZE = ["--freeze", "conv1", "bn1", "layer[12].*"]


def weights(folder, name="model.safetensors"):
    return safetensors.torch.load_file(Path(folder, name))


def is_frozen(name):
    return name.startswith(("conv1", "bn1", "layer1", "layer2"))


def test_a_run_leaves_frozen_parts_as_they_were_and_resumes_to_the_bit(capsys):
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    trainer = train_teacher(["r.yaml", "--output_dir", "whole", *FREEZE])
    text = capsys.readouterr().out
    trained = sum(value.numel() for name, value in trainer.model.named_parameters() if "layer3" in name or "fc" in name)
    assert f"({trained:,} trained)" in text
    assert json.loads(Path("whole/results.json").read_text())["trained_parameters"] == trained

    first, last = weights("whole/checkpoint-3"), weights("whole/checkpoint-6")
    moving, average = weights("whole/checkpoint-6", "training_weights.safetensors"), weights("whole/teacher")
    start = load_untrained()
    for name in last:
        if is_frozen(name):  # weights, statistics and counters, of the student, its average and the export
            assert all(torch.equal(start[name], each[name]) for each in (first, last, moving, average)), name
        elif last[name].is_floating_point():
            assert not torch.equal(first[name], last[name]), name

    again = train_teacher(
        ["r.yaml", "--output_dir", "again", *FREEZE, "--resume_from_checkpoint", "whole/checkpoint-3"]
    )
    assert again.state.global_step == 6
    assert all(torch.equal(value, weights("again/teacher")[name]) for name, value in average.items())


def load_untrained():
    """The weights that the recipe's run begins with."""
    trainer = train_teacher(
        ["r.yaml", "--output_dir", "untrained", "--learning_rate", "0", "--max_steps", "1", *FREEZE]
    )
    return trainer.distiller.student.timm_model.state_dict()


def test_norms_stay_in_evaluation_mode_and_another_trainer_trains_all():
    student = load_student("cifar_resnet8", num_classes=10)
    network = student.timm_model
    block = network.layer1[0]
    before = block.conv1.weight.clone()
    DistillationTrainer(student, None, config(freeze="layer1", max_steps=1), train_dataset=images(16)).train()
    norms = {name for name, module in network.named_modules() if "bn" in name and not module.training}
    assert norms == {"layer1.0.bn1", "layer1.0.bn2"}
    assert torch.equal(block.conv1.weight, before)
    assert block.bn1.num_batches_tracked == 0 and network.bn1.num_batches_tracked == 1

    DistillationTrainer(student, None, config(max_steps=1), train_dataset=images(16)).train()
    assert not torch.equal(block.conv1.weight, before) and block.bn1.num_batches_tracked == 1


def test_the_student_of_simkd_keeps_its_names():
    teacher, student = (load_student("cifar_resnet8", num_classes=10) for _ in range(2))
    arguments = config(freeze=["layer1.*"], max_steps=1, losses={"simkd": {}}, ce_weight=0.0)
    trainer = DistillationTrainer(student, teacher, arguments, train_dataset=images(16))
    frozen = [name for name, value in trainer.model.timm_model.named_parameters() if not value.requires_grad]
    assert {name.split(".")[1] for name in frozen if name.startswith("backbone")} == {"layer1"}


def test_names_of_a_vit():
    network = timm.create_model("vit_tiny_patch16_224", depth=12)
    names = frozen_names(network, ["patch_embed.*", "blocks.[0-5].*", "cls_token"])
    assert {".".join(name.split(".")[:2]) for name in names if name.startswith("blocks")} == {
        f"blocks.{index}" for index in range(6)
    }
    assert "cls_token" in names and "patch_embed.proj.bias" in names and "pos_embed" not in names


@pytest.mark.parametrize(
    "words, message",
    [
        (["--freeze", "layer4.*"], r"freeze: CifarResNet has no parameter or module 'layer4\.\*'\. Near are layer"),
        (["--freeze", "*"], r"freeze: \* names every parameter of CifarResNet, and nothing would be trained"),
        (["--layer_decay", "0"], "layer_decay must be above 0 and at most 1"),
    ],
)
def test_refused_before_images_are_decoded(words, message, monkeypatch, capsys):
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr("hfkd.commands.build.image_sets", None)
    with pytest.raises(SystemExit) as ending:
        main(["train-teacher", "r.yaml", *words])
    assert ending.value.code == 2
    assert re.search(message, capsys.readouterr().err)
