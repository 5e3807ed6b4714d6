import copy

import pytest
import timm
import torch
from helpers import Plain
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
)

from hfkd import load_student
from hfkd.losses import ReviewKDLoss
from hfkd.losses.feature_maps import MapPairsLoss, as_map
from hfkd.networks.features import (
    EMBEDDING,
    Taps,
    find_classifier,
    find_layer,
    forward_views,
    has_two_heads,
    settle_layers,
    train_heads_apart,
)

BATCH = {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def test_stage_indices_and_paths_of_a_wrapped_model():
    student = load_student("cifar_resnet20", num_classes=5).eval()
    taps = Taps(student, [1, "layer3", 1])
    outputs = forward_views(student, BATCH, taps)
    assert {layer: tuple(feature.shape) for layer, feature in outputs.features.items()} == {
        1: (2, 16, 32, 32),
        "layer3": (2, 64, 8, 8),
    }
    with pytest.raises(ValueError, match="does not call the layer 1"):  # nothing is kept from one batch to the next
        taps.take()
    inner = student.timm_model
    expected = inner.forward_intermediates(BATCH["pixel_values"], indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(outputs.features[1], expected)


@pytest.mark.parametrize(
    "name, settings, layers",
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8}, [0, 11]),
        ("pit_ti_224", {"img_size": 64}, ["transformers.0.blocks.0", "transformers.2.blocks.3"]),
        ("t2t_vit_7", {"img_size": 32}, [0, 6]),
        ("pvt_tiny", {"img_size": 64}, [0, 7]),
        ("pvt_v2_b0", {}, ["stages.0.blocks.0", "stages.3.blocks.1"]),
        ("convit_tiny", {"img_size": 32, "patch_size": 8}, [0, 11]),
    ],
)
def test_blocks_of_vision_transformers_are_maps(name, settings, layers):
    model = timm.create_model(name, num_classes=5, **settings).eval()
    side = settings.get("img_size", 64)
    outputs = forward_views(model, {"pixel_values": torch.rand(2, 3, side, side)}, Taps(model, layers))
    for layer in layers:
        feature = as_map(outputs.features[layer])
        assert feature.shape[0] == 2 and feature.shape[2] == feature.shape[3]


def test_new_taps_take_the_place_of_the_old():
    """Those of an earlier trainer would keep its last batch, and copying the network would fail on its graph."""
    model = load_student("cifar_resnet8", num_classes=5)
    old = Taps(model, ["layer1", EMBEDDING])
    model(BATCH["pixel_values"])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    forward_views(model, BATCH, Taps(model, ["layer2"]))
    copy.deepcopy(model)
    old.take()
    with pytest.raises(ValueError, match="does not call the layer 'layer1'"):
        forward_views(model, BATCH, old)


def test_features_are_those_of_the_weak_view():
    model = Plain().eval()
    taps = Taps(model, ["conv"])
    outputs = forward_views(model, BATCH | {"pixel_values_strong": torch.zeros(2, 3, 32, 32)}, taps)
    torch.testing.assert_close(outputs.features["conv"], model.conv(BATCH["pixel_values"]))
    assert outputs.strong.features == {}


def test_a_transformers_model_is_tapped_by_path():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config).eval()
    outputs = forward_views(model, BATCH, Taps(model, ["resnet.encoder.stages.1"]))
    assert outputs.features["resnet.encoder.stages.1"].shape[:2] == (2, 8)
    with pytest.raises(ValueError, match="no stage indices.*module path"):
        find_layer(model, 1)


@pytest.mark.parametrize(
    "name, settings, width",
    [
        ("cifar_wrn_16_2", {}, 128),  # the classifier reads what follows the deepest stage
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}, 192),
        ("pvt_tiny", {"img_size": 32}, 512),
        ("mobilenetv3_small_050", {}, 1024),
    ],
)
def test_the_embedding_is_what_the_classifier_reads(name, settings, width):
    model = timm.create_model(name, num_classes=5, **settings).eval()
    outputs = forward_views(model, BATCH, Taps(model, [EMBEDDING]))
    assert outputs.embedding.shape == (2, width)
    expected = model.forward_head(model.forward_features(BATCH["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(outputs.embedding, expected)
    torch.testing.assert_close(find_classifier(model)(outputs.embedding), outputs.logits)


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet10t"])
def test_the_input_of_an_activation_is_tapped_before_it_is_overwritten(name):
    """timm's activations work in place."""
    model = timm.create_model(name, num_classes=5).eval()
    path = [path for path, _ in model.named_modules() if path.endswith("act2")][-1]
    outputs = forward_views(model, BATCH, Taps(model, [path, f"{path}:input"]))
    before, after = outputs.features[f"{path}:input"], outputs.features[path]
    assert before.min() < 0
    torch.testing.assert_close(before.relu(), after)
    before.sum().backward()  # an overwritten map could not be differentiated
    with pytest.raises(ValueError, match="no layer 'layer9.act'"):
        Taps(model, ["layer9.act:input"])


def test_the_embedding_of_other_models():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    for model, width in ((ResNetForImageClassification(config), 12), (Plain(classes=5), 8)):
        outputs = forward_views(model.eval(), BATCH, Taps(model, [EMBEDDING]))
        assert outputs.embedding.shape == (2, width)
        torch.testing.assert_close(find_classifier(model)(outputs.embedding), outputs.logits)
    with pytest.raises(ValueError, match="Conv2d has no linear layer that could be its classifier"):
        Taps(torch.nn.Conv2d(3, 5, 3), [EMBEDDING])


def test_the_embedding_of_two_heads_is_the_distillation_heads():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32, patch_size=8).eval()
    outputs = forward_views(model, BATCH, Taps(model, [EMBEDDING]))
    torch.testing.assert_close(outputs.embedding, model.forward_features(BATCH["pixel_values"])[:, 1])


def test_an_embedding_is_one_vector_an_image():
    class Dense(Plain):
        def forward(self, pixel_values):
            return self.fc(self.conv(pixel_values).permute(0, 2, 3, 1)).mean(dim=(1, 2))

    model = Dense()
    taps = Taps(model, [EMBEDDING])
    with pytest.raises(ValueError, match=r"The input of the classifier \(Linear\) has shape \(2, 8, 8, 8\)"):
        forward_views(model, BATCH, taps)


def test_stages_count_from_the_end_too():
    model = timm.create_model("cifar_resnet8", num_classes=5)
    assert find_layer(model, -1) is model.layer3 and find_layer(model, -4) is find_layer(model, 0)
    with pytest.raises(ValueError, match="no stage -5"):
        find_layer(model, -5)


def test_layers_that_are_left_open():
    """Every stage but the stem; what is named stays."""
    losses = [MapPairsLoss(), MapPairsLoss(student_layers=[2]), ReviewKDLoss([1, 2])]
    settle_layers(losses, timm.create_model("cifar_resnet8"), timm.create_model("cifar_vgg8"))
    assert [loss.student_layers for loss in losses] == [[1, 2, 3], [2], [1, 2]]
    assert [loss.teacher_layers for loss in losses] == [[1, 2, 3, 4]] * 2 + [[1, 2, 3, 4, EMBEDDING]]
    with pytest.raises(ValueError, match="Plain has no stage indices"):
        settle_layers([MapPairsLoss()], Plain(), timm.create_model("cifar_vgg8"))


def test_clear_errors():
    student = load_student("cifar_resnet8", num_classes=5)
    with pytest.raises(ValueError, match="no layer 'layer9'. Near are .*layer3"):
        Taps(student, ["layer9"])
    with pytest.raises(ValueError, match="no stage 7. Stages: 0 .*, 3 "):
        Taps(student, [7])
    taps = Taps(student.eval(), [""])  # the whole network gives logits, no map, and a path of its own
    assert forward_views(student, BATCH, taps).features[""].shape == (2, 5)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "pit_ti_distilled_224"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_two_heads(name, wrapped):
    """Each head by itself in training where that is asked for, else their mean."""
    torch.manual_seed(0)
    if wrapped:
        model = load_student(name, num_classes=5, image_size=64)
        inner = model.timm_model
    else:
        model = inner = timm.create_model(name, num_classes=5, img_size=64)
    assert has_two_heads(model)
    batch = {"pixel_values": torch.rand(2, 3, 64, 64)}
    model.train()
    train_heads_apart(model, True)
    outputs = forward_views(model, batch, two_heads=True)
    tokens = inner.forward_features(batch["pixel_values"])
    torch.testing.assert_close(outputs.class_logits, inner.head(tokens[:, 0]))
    torch.testing.assert_close(outputs.logits, inner.head_dist(tokens[:, 1]))
    evaluated = forward_views(model.eval(), batch, two_heads=True)
    torch.testing.assert_close(evaluated.logits, (outputs.logits + outputs.class_logits) / 2)
    assert evaluated.class_logits is evaluated.logits
    train_heads_apart(model.train(), False)
    torch.testing.assert_close(forward_views(model, batch).logits, evaluated.logits)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pit_ti_224"])
def test_one_head_stays_one(name):
    model = timm.create_model(name, num_classes=5, img_size=32).train()
    assert not has_two_heads(model)
    outputs = forward_views(model, BATCH)
    assert outputs.class_logits is outputs.logits


def test_two_heads_of_a_transformers_deit():
    config = DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=5
    )
    model = DeiTForImageClassificationWithTeacher(config).train()
    assert has_two_heads(model)
    raw = model(BATCH["pixel_values"])
    outputs = forward_views(model, BATCH, two_heads=True)
    assert torch.equal(outputs.class_logits, raw.cls_logits) and torch.equal(outputs.logits, raw.distillation_logits)
    assert torch.equal(forward_views(model, BATCH).logits, raw.logits)
    assert torch.equal(forward_views(model.eval(), BATCH, two_heads=True).logits, raw.logits)


@pytest.mark.parametrize("training", [False, True])
def test_two_tensors_are_no_logits(training):
    class Pair(Plain):
        def forward(self, pixel_values):
            return super().forward(pixel_values), pixel_values.mean(dim=(2, 3))

    with pytest.raises(TypeError, match="Pair must return logits.*got tuple"):
        forward_views(Pair().train(training), BATCH)


def test_maps_of_a_swin_transformer_have_their_channels_first():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=32, window_size=2).eval()
    outputs = forward_views(model, BATCH, Taps(model, [0, 1]))
    assert [tuple(outputs.features[layer].shape) for layer in (0, 1)] == [(2, 96, 8, 8), (2, 192, 4, 4)]


def test_a_layer_that_is_not_called():
    model = Plain()
    model.spare = torch.nn.Identity()
    with pytest.raises(ValueError, match="does not call the layer 'spare'"):
        forward_views(model, BATCH, Taps(model, ["conv", "spare"]))
