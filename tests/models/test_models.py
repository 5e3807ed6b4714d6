"""The CIFAR architectures against numbers of the published implementations, and against timm's interface.

`golden/models_cifar.json` holds, for each model, the names and shapes of its state dict, its parameter count
and its logits for one input under one pattern of weights, computed in float64 by the release in `source`.
"""

import json
from dataclasses import dataclass

import pytest
import timm
import torch
from helpers import GOLDEN as GOLDEN_FOLDER
from helpers import aligned, probe_weight, wave
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

import hfkd.models  # noqa: F401  registers the architectures
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD

GOLDEN = json.loads((GOLDEN_FOLDER / "models_cifar.json").read_text())
ONE_OF_EACH_FAMILY = [
    "cifar_resnet8",
    "cifar_resnet18",
    "cifar_wrn_16_1",
    "cifar_vgg8",
    "cifar_mobilenetv2_050",
    "cifar_shufflenetv1",
    "cifar_shufflenetv2",
]


@dataclass
class Probed:
    name: str
    model: nn.Module
    images: Tensor
    features: Tensor
    logits: Tensor


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def probed(request: pytest.FixtureRequest) -> Probed:
    """A model in float64 and eval mode under the probe weights, and what it says of the probe input."""
    model = timm.create_model(request.param).double().eval()
    model.load_state_dict({name: probe_weight(name, tensor) for name, tensor in model.state_dict().items()})
    model.requires_grad_(False)
    images = wave((2, 3, 32, 32), 0.11)
    features = model.forward_features(images)
    return Probed(request.param, model, images, features, model.forward_head(features))


def test_every_registered_architecture_has_golden_numbers():
    assert sorted(timm.list_models("cifar_*")) == sorted(GOLDEN)


def test_names_shapes_and_order_are_those_of_published_checkpoints(probed):
    golden = GOLDEN[probed.name]
    names_and_shapes = [[name, list(tensor.shape)] for name, tensor in probed.model.state_dict().items()]
    assert names_and_shapes == golden["state_dict"]
    assert sum(parameter.numel() for parameter in probed.model.parameters()) == golden["parameters"]


def test_logits_are_those_of_the_published_implementation(probed):
    golden = torch.tensor(GOLDEN[probed.name]["probe_logits"], dtype=torch.float64)
    torch.testing.assert_close(probed.logits, golden, rtol=1e-9, atol=0)


def test_forward_is_head_of_features_in_channels_last_too(probed):
    assert probed.features.shape[1] == probed.model.num_features
    embedding = probed.model.forward_head(probed.features, pre_logits=True)
    assert embedding.shape == (2, probed.model.head_hidden_size)
    assert torch.equal(probed.model.get_classifier()(embedding), probed.logits)
    model = probed.model.to(memory_format=torch.channels_last)
    logits = model(probed.images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, probed.logits, rtol=1e-9, atol=1e-12)


def test_intermediates_are_the_described_stages(probed):
    model, seen = probed.model, {}
    handles = [
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _, __, output, name=info["module"]: seen.update({name: output})
        )
        for info in model.feature_info
    ]
    last, maps = model.forward_intermediates(probed.images)
    for handle in handles:
        handle.remove()
    assert torch.allclose(last, probed.features, rtol=1e-9, atol=1e-12)
    for info, feature_map in zip(model.feature_info, maps, strict=True):
        side = 32 // info["reduction"]
        assert feature_map.shape == (2, info["num_chs"], side, side)
        assert feature_map is seen[info["module"]]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_norm_makes_the_deepest_map_the_one_the_head_reads(name):
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    (deepest,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    info = model.feature_info[-1]
    assert deepest.shape[1] == info.get("num_chs_norm", info["num_chs"])
    assert torch.equal(model.forward_head(deepest), model(images))


def test_one_step_moves_every_parameter(probed):
    # In eval mode: in train mode the mean that BatchNorm subtracts takes any shift just before it along.
    model = probed.model.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    nn.functional.cross_entropy(model(probed.images), torch.tensor([1, 7])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    model.requires_grad_(False)
    assert not still


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_reset_classifier(name):
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    embedding = model.forward_head(model.forward_features(images), pre_logits=True)
    first = model.get_classifier()
    model.reset_classifier(7)
    assert model.get_classifier() is not first and model.num_classes == 7
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), embedding)
    model.reset_classifier(5, global_pool="catavgmax")
    assert model(images).shape == (2, 5)
    assert model.head_hidden_size == 2 * model.num_features == model.get_classifier().in_features


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_timm_options(name):
    model = timm.create_model(name, pretrained=False, in_chans=1, drop_rate=0.5, features_only=False).eval()
    cfg = model.pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == (CIFAR_MEAN, CIFAR_STD, (3, 32, 32))
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["num_classes"]) == ("bicubic", 1.0, 100)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 1
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(model(images), model(images))
    features = model.forward_features(images)
    model.train()
    assert (model.forward_head(features, pre_logits=True) == 0).float().mean() > 0.3


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_features_only_gives_the_stage_maps(name):
    backbone = timm.create_model(name, features_only=True, out_indices=(1, -1)).eval()
    maps = backbone(torch.randn(2, 3, 32, 32))
    assert [feature_map.shape[1] for feature_map in maps] == backbone.feature_info.channels()
    assert [32 // feature_map.shape[2] for feature_map in maps] == backbone.feature_info.reduction()


def test_intermediates_take_indices_as_in_timm():
    model = timm.create_model("cifar_wrn_16_1").eval()
    images = torch.randn(2, 3, 32, 32)
    last, maps = model.forward_intermediates(images)
    assert len(maps) == 4
    assert not torch.equal(last, maps[-1])  # the last BatchNorm and ReLU come after the map
    for indices, expected in [(2, [2, 3]), ([0, -2], [0, 2]), ([1], [1])]:
        chosen = model.forward_intermediates(images, indices=indices, intermediates_only=True)
        assert all(torch.equal(got, maps[index]) for got, index in zip(chosen, expected, strict=True))
    stopped_at, (only,) = model.forward_intermediates(images, indices=[1], stop_early=True)
    assert stopped_at is only and torch.equal(only, maps[1])
    with pytest.raises(ValueError, match="'NLC'.*'NCHW'"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("name", ["cifar_wrn_16_1", "cifar_mobilenetv2_050", "cifar_shufflenetv1"])
def test_compiles_to_one_graph(name):
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def test_gradient_checkpointing_leaves_gradients_as_they_are():
    model = timm.create_model("cifar_resnet8")
    images = torch.randn(2, 3, 32, 32)
    model(images).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).square().mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_transformers_and_timm_load_what_the_wrapper_saves(name, tmp_path):
    model = timm.create_model(name, num_classes=10).eval()
    pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if value}
    config = TimmWrapperConfig(architecture=name, model_args={}, pretrained_cfg=pretrained_cfg, num_labels=10)
    wrapper = TimmWrapperForImageClassification(config).eval()
    wrapper.timm_model.load_state_dict(model.state_dict())
    wrapper.save_pretrained(tmp_path, state_dict=model.state_dict(), save_original_format=False)

    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    from_transformers = aligned(AutoModelForImageClassification.from_pretrained(tmp_path))
    output = from_transformers(images, output_hidden_states=True)
    assert torch.equal(wrapper(images).logits, logits)
    assert torch.equal(output.logits, logits)
    assert len(output.hidden_states) == len(model.feature_info)
    from_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(from_timm(images), logits)
