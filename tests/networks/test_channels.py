"""Networks that take images of one channel are refused; grey images are not."""

import re

import pytest
import timm
from helpers import config, images
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from hfkd import DistillationTrainer
from hfkd.cli import main
from hfkd.data.decode import to_rgb
from hfkd.networks.wrapping import wrap_timm

GREY = "takes images of 1 channel.s., and hfkd gives every network three"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_grey_network_is_refused_before_images_are_decoded(role, monkeypatch, capsys):
    names = [str(digit) for digit in range(10)]
    network = timm.create_model("cifar_resnet8", in_chans=1, num_classes=10)
    wrap_timm(network, names, {"in_chans": 1}).save_pretrained("grey", save_original_format=False)
    monkeypatch.setattr("hfkd.commands.build.image_sets", None)
    command = {"teacher": ["distill", "--student", "cifar_resnet8"], "student": ["train-teacher"]}[role]
    with pytest.raises(SystemExit) as ending:
        main([command[0], "--dataset_name", "digits", *command[1:], f"--{role}", "grey"])
    assert ending.value.code == 2 and re.search(f"CifarResNet {GREY}", capsys.readouterr().err)


def test_from_code():
    grey = MobileNetV2ForImageClassification(MobileNetV2Config(num_channels=1, num_labels=10, image_size=32))
    bare = timm.create_model("cifar_resnet8", in_chans=1, num_classes=10)
    for student, teacher in ((grey, None), (bare, None), (timm.create_model("cifar_resnet8", num_classes=10), bare)):
        with pytest.raises(ValueError, match=GREY):
            DistillationTrainer(student, teacher, config(losses={"kd": {}} if teacher else {}), train_dataset=images(8))


def test_a_grey_image_has_its_channel_three_times():
    image = Image.effect_noise((8, 8), 50)
    assert image.mode == "L" and all(band.tobytes() == image.tobytes() for band in to_rgb(image).split())
