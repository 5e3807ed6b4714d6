"""T2T-ViT and PVT against numbers of the official releases, and against timm's and transformers' interfaces.

`golden/models_vit.json` is laid out as `golden/models_cifar.json`; its logits are float32, for 224 x 224 images. The
interface is tested on small images, where the architectures are the same but for their tables of positions.
"""

import json

import pytest
import timm
import torch
from helpers import GOLDEN as GOLDEN_FOLDER
from helpers import aligned, probe_weight, wave
from timm.layers import DropPath
from torch import nn
from transformers import AutoModelForImageClassification

from hfkd import load_student
from hfkd.models.t2t_vit import Performer, sinusoid_table
from hfkd.networks.wrapping import exported_state_dict

GOLDEN = json.loads((GOLDEN_FOLDER / "models_vit.json").read_text())
BLOCKS = {"t2t_vit_7": 7, "t2t_vit_10": 10, "t2t_vit_12": 12, "t2t_vit_14": 14, "pvt_tiny": 8, "pvt_small": 16}
ONE_OF_EACH_FAMILY = ["t2t_vit_7", "pvt_tiny"]
FROZEN = ["pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"]  # of T2T-ViT
SIDE = 64  # of the small images; at 32, PVT attends to one key and its queries get no gradient


def small(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, img_size=SIDE, num_classes=5, **kwargs).eval()


def small_images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_every_registered_architecture_has_golden_numbers():
    assert sorted(timm.list_models(["t2t_vit_*", "pvt_tiny", "pvt_small"])) == sorted(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_names_shapes_and_logits_are_those_of_the_official_release(name):
    golden = GOLDEN[name]
    model = timm.create_model(name, num_classes=golden["num_classes"]).eval()
    state_dict = model.state_dict()
    assert [[key, list(tensor.shape)] for key, tensor in state_dict.items()] == golden["state_dict"]
    assert sum(tensor.numel() for tensor in state_dict.values()) == golden["parameters"]
    assert [key for key, _ in model.named_buffers()] == (FROZEN if name.startswith("t2t") else [])

    model.load_state_dict({key: probe_weight(key, tensor) for key, tensor in state_dict.items()})
    images = wave((2, 3, 224, 224), 0.11).float()
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        logits = model.forward_head(features)
    torch.testing.assert_close(logits, torch.tensor(golden["probe_logits"]), rtol=0, atol=1e-5)
    assert len(maps) == BLOCKS[name]
    for info, feature_map in zip(model.feature_info, maps, strict=True):
        side = 224 // info["reduction"]
        assert feature_map.shape == (2, info["num_chs"], side, side)


def test_the_position_table_is_sinusoid():
    model = small("t2t_vit_7")
    table = model.pos_embed[0]
    assert table.shape == (1 + (SIDE // 16) ** 2, 256)
    position, channel = 13, 100
    angle = torch.tensor(position / 10000 ** (channel / 256), dtype=torch.float64)
    torch.testing.assert_close(table[position, channel : channel + 2].double(), torch.stack([angle.sin(), angle.cos()]))
    assert torch.equal(sinusoid_table(3, 256)[0], table[:3])


def test_performer_attention_approximates_softmax_attention():
    torch.manual_seed(0)
    performer = Performer(8, 8, features=65536)
    k, q, v = torch.randn(3, 2, 10, 8) * torch.tensor([0.4, 0.4, 1.0]).reshape(3, 1, 1, 1)
    expected = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
    given = performer._attend(k, q, v)
    torch.testing.assert_close(given, expected, rtol=0, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(performer._attend(k, q, v), given)  # in float32 all the same
    assert (expected - v.mean(dim=1, keepdim=True)).abs().max() > 0.3  # which weighting all alike would not give


def test_random_features_are_orthogonal():
    w = small("t2t_vit_7").tokens_to_token.attention1.w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_forward_is_head_of_features(name, global_pool):
    model, images = small(name, global_pool=global_pool), small_images()
    features = model.forward_features(images)
    embedding = model.forward_head(features, pre_logits=True)
    pooled = features[:, 0] if global_pool == "token" else features[:, 1:].mean(dim=1)
    assert torch.equal(embedding, pooled) and embedding.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(embedding), model(images))


@pytest.mark.parametrize(("name", "tapped"), [("t2t_vit_7", (0, 3, 6)), ("pvt_tiny", (0, 3, 7))])
def test_intermediates_are_what_the_blocks_give(name, tapped):
    model, images, seen = small(name), small_images(), []
    for index in tapped:
        block = model.get_submodule(model.feature_info[index]["module"])
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    last, tokens = model.forward_intermediates(images, indices=tapped, output_fmt="NLC")
    assert torch.equal(last, model.forward_features(images))
    maps = model.forward_intermediates(images, indices=tapped, intermediates_only=True)
    for index, hooked, sequence, feature_map in zip(tapped, seen, tokens, maps, strict=False):
        side = SIDE // model.feature_info[index]["reduction"]
        assert feature_map.shape == (2, model.feature_info[index]["num_chs"], side, side)
        assert torch.equal(sequence, hooked[:, -side * side :])
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), sequence)
    (normed,) = model.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed, last[:, 1:])


def test_pvt_counts_blocks_over_all_stages():
    modules = [info["module"] for info in small("pvt_tiny").feature_info]
    assert [modules[index] for index in (0, 3, 7)] == ["block1.0", "block2.1", "block4.1"]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_intermediates_stop_early(name):
    model, images = small(name), small_images()
    model.get_submodule(model.feature_info[3]["module"]).register_forward_hook(lambda *_: pytest.fail("ran on"))
    stopped_at, (only,) = model.forward_intermediates(images, [2], stop_early=True, output_fmt="NLC")
    assert torch.equal(stopped_at[:, -only.shape[1] :], only)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_features_only(name):
    backbone = timm.create_model(name, features_only=True, img_size=SIDE).eval()
    maps = backbone(small_images())
    assert [feature_map.shape[1] for feature_map in maps] == backbone.feature_info.channels()
    assert [SIDE // feature_map.shape[2] for feature_map in maps] == backbone.feature_info.reduction()
    assert backbone.feature_info.reduction() == ([4, 8, 16, 32] if name == "pvt_tiny" else [16] * 3)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_reset_classifier(name):
    model, images = small(name), small_images()
    features = model.forward_features(images)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.num_classes == 7
    assert 0.015 < model.get_classifier().weight.std() < 0.025  # Z-score needs logits that differ
    model.reset_classifier(0, global_pool="avg")
    assert torch.equal(model(images), features[:, 1:].mean(dim=1))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), features)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_one_step_moves_every_parameter(name):
    model = small(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    nn.functional.cross_entropy(model(small_images()), torch.tensor([1, 4])).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_dropping_is_for_training_only(name):
    model, images = small(name, drop_path_rate=0.3, drop_rate=0.5), small_images()
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx(torch.linspace(0, 0.3, BLOCKS[name]).tolist())
    assert torch.equal(model(images), model(images))
    features = model.forward_features(images)
    model.train()
    assert not torch.equal(model.forward_features(images), features)
    assert (model.forward_head(features, pre_logits=True) == 0).float().mean() > 0.3


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_gradient_checkpointing_leaves_gradients_as_they_are(name):
    model, images = small(name), small_images()
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_configuration(name):
    model = small(name)
    cfg = model.default_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["interpolation"]) == ((3, 224, 224), 1000, "bicubic")
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert timm.create_model(name, img_size=SIDE).num_classes == 1000


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("img_size", [32, (64, 96)])
def test_other_image_sizes_and_channels(name, img_size):
    model = timm.create_model(name, img_size=img_size, in_chans=1, num_classes=5).eval()
    images = torch.randn(2, 1, *model.img_size)
    features, maps = model.forward_intermediates(images)
    assert torch.equal(model.forward_head(features), model(images)) and model(images).shape == (2, 5)
    for info, feature_map in zip(model.feature_info, maps, strict=True):
        assert feature_map.shape[2:] == tuple(side // info["reduction"] for side in model.img_size)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"img_size is 100; PVT .* 32.*\(96, 96\) or \(128, 128\)"):
        timm.create_model("pvt_tiny", img_size=100)
    with pytest.raises(ValueError, match=r"\(64, 50\); T2TViT .* 16.*\(64, 48\) or \(64, 64\)"):
        timm.create_model("t2t_vit_7", img_size=(64, 50))
    with pytest.raises(ValueError, match=r"Nearest \(height, width\): \(32, 32\)$"):
        timm.create_model("pvt_tiny", img_size=8)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), this PVT takes \(3, 64, 64\)"):
        small("pvt_tiny")(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="global_pool is 'max'.*'token'"):
        small("pvt_tiny", global_pool="max")
    with pytest.raises(ValueError, match="'NHWC'.*'NCHW' or 'NLC'"):
        small("t2t_vit_7").forward_intermediates(small_images(), output_fmt="NHWC")


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_half_precision_and_one_compiled_graph(name):
    torch.manual_seed(0)
    model, images = small(name), small_images()
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
            torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), half)
        assert half.dtype == torch.bfloat16 and model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    assert not torch.equal(half.float(), expected)
    # bf16 keeps 8 bits, and eight blocks of it are off by 1 to 4 % of the logits' spread, depending on the processor.
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.06 * expected.std().item())


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_transformers_and_timm_load_a_saved_student(name):
    student = load_student(name, class_names=["ant", "bee", "cat"]).eval()
    student.save_pretrained("saved", state_dict=exported_state_dict(student), save_original_format=False)
    loaded = aligned(AutoModelForImageClassification.from_pretrained("saved"))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits = student(images).logits
        output = loaded(images, output_hidden_states=True)
        from_timm = timm.create_model("local-dir:saved", pretrained=True).eval()
        assert torch.equal(from_timm(images), logits)
    assert torch.equal(output.logits, logits) and len(output.hidden_states) == BLOCKS[name]
    trained = {key for key, parameter in loaded.timm_model.named_parameters() if parameter.requires_grad}
    assert loaded.timm_model.state_dict().keys() - trained == ({*FROZEN} if name == "t2t_vit_7" else set())
