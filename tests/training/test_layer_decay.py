"""Layer-wise learning rates: timm's, from a recipe and from code, also for hfkd's own networks."""

from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import DIGITS_RECIPE, Plain, config, images
from timm.optim import param_groups_layer_decay

import hfkd.models  # noqa: F401  (registers the architectures)
from hfkd import DistillationTrainer, load_student
from hfkd.commands.train import train_teacher
from hfkd.training.optimization import layer_scales

RECIPE = DIGITS_RECIPE | {
    "train_split": "train[:48]",
    "num_train_epochs": 2,
    "learning_rate": 0.1,
    "weight_decay": 0.01,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "layer_decay": 0.5,
    "save_strategy": "epoch",
    "logging_steps": 1,
    "lr_scheduler_type": "linear",
    "disable_tqdm": True,
}


def rates_of(trainer):
    names = {parameter: name for name, parameter in trainer.distiller.named_parameters()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {names[parameter]: group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}


def test_the_rates_of_a_run_are_timms_and_it_resumes_to_the_bit():
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    trainer = train_teacher(["r.yaml", "--output_dir", "whole"])
    network = trainer.model.timm_model
    names = {parameter: name for name, parameter in network.named_parameters()}
    expected = {
        f"student.timm_model.{names[parameter]}": 0.1 * group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=0.5)
        for parameter in group["params"]
    }
    rates = rates_of(trainer)
    assert rates == pytest.approx(expected) and len(rates) == len(names)
    # Stem, three blocks and the classifier.
    assert sorted(set(rates.values())) == pytest.approx([0.1 / 16, 0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == pytest.approx(0.1), "the classifier's"
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.01, 0.0}

    again = train_teacher(["r.yaml", "--output_dir", "again", "--resume_from_checkpoint", "whole/checkpoint-3"])
    assert rates_of(again) == rates
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_what_a_loss_owns_has_the_whole_rate():
    student, teacher = (load_student("cifar_resnet8", num_classes=10) for _ in range(2))
    arguments = config(layer_decay=0.5, learning_rate=1.0, losses={"fitnet": {}})
    trainer = DistillationTrainer(student, teacher, arguments, train_dataset=images(16))
    groups = trainer.create_optimizer().param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    owned = list(trainer.distiller.losses.parameters())
    assert owned and all(rates[parameter] == 1.0 for parameter in owned) and min(rates.values()) == 1 / 16


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "mobilenetv4_conv_small", "pvt_tiny", "t2t_vit_7"]
)
def test_scales_of_a_network(name):
    network = timm.create_model(name, num_classes=10)
    scales = layer_scales(network, 0.5)
    by_name = {path: scales[parameter] for path, parameter in network.named_parameters()}
    assert by_name[f"{network.default_cfg['classifier']}.weight"] == 1.0
    rates = list(dict.fromkeys(by_name.values()))
    assert len(rates) > 5 and min(rates) == 0.5 ** (len(rates) - 1), "each layer has half the next one's rate"


@pytest.mark.parametrize(
    "name",
    [
        *("cifar_resnet20", "cifar_resnet18", "cifar_wrn_16_1", "cifar_vgg8"),
        *("cifar_mobilenetv2_050", "cifar_shufflenetv1", "cifar_shufflenetv2"),
    ],
)
def test_hfkds_own_networks_tell_their_layers(name):
    network = timm.create_model(name, num_classes=10)
    scales = layer_scales(network, 0.5)
    ordered = [scales[parameter] for parameter in network.parameters()]
    assert ordered == sorted(ordered) and len(set(ordered)) > len(network.feature_info), "deeper layers learn faster"


def test_refused():
    with pytest.raises(ValueError, match=r"layer_decay needs a network of timm .*and Plain does not"):
        DistillationTrainer(Plain(), None, config(layer_decay=0.5), train_dataset=images(16))
    student = load_student("cifar_resnet8", num_classes=10)
    optimizers = torch.optim.SGD(student.parameters(), 0.1), None
    with pytest.raises(ValueError, match="layer_decay sets the learning rates of an optimizer that hfkd makes"):
        DistillationTrainer(student, None, config(layer_decay=0.5), train_dataset=images(16), optimizers=optimizers)
