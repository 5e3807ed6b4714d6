"""The feature methods as a recipe names them, on networks of any library."""

import pytest
import timm
import torch
from helpers import Plain, config, images
from torch import nn
from torch.utils.data import Subset
from transformers import ResNetConfig, ResNetForImageClassification

from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.data import ImageSource, LazyImageDataset, RandomResizedCrop, load_image_splits
from hfkd.data.subsets import training_labels
from hfkd.losses import LOSSES
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.wrapping import wrap_timm

MAPS = ("fitnet", "at", "sp", "vid", "semckd")
EMBEDDINGS = ("pkt", "crd", "srrl")
TINY_VIT = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2}


def transformers_resnet():
    settings = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 10}
    return ResNetForImageClassification(ResNetConfig(**settings))


def tiny_vit():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY_VIT)
    return wrap_timm(model, [str(index) for index in range(10)], TINY_VIT)


def cifar_resnet():
    return load_student("cifar_resnet8", num_classes=10)


# Beside each network, layers whose maps have any sides: what a recipe would name.
NETWORKS = {
    "timm CNN": (cifar_resnet, [1, -1]),
    "timm ViT": (tiny_vit, [1, "blocks.3"]),
    "transformers CNN": (transformers_resnet, ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]),
}


def trainer(losses, student=None, teacher=None, **changes):
    student, teacher = student or cifar_resnet(), teacher or cifar_resnet()
    args = config(losses=losses, **changes)
    return DistillationTrainer(student, Teacher(teacher), args, train_dataset=images(16))


@pytest.mark.parametrize("method", MAPS + EMBEDDINGS)
@pytest.mark.parametrize(
    "student, teacher",
    [("timm ViT", "transformers CNN"), ("timm CNN", "timm ViT"), ("transformers CNN", "timm CNN")],
)
def test_mixed_families(method, student, teacher):
    """Beside KD, from a recipe's mapping: every learnt part moves and every term is finite."""
    torch.manual_seed(0)
    (build_student, student_layers), (build_teacher, teacher_layers) = NETWORKS[student], NETWORKS[teacher]
    settings = {"student_layers": student_layers, "teacher_layers": teacher_layers} if method in MAPS else {}
    if method == "crd":
        settings = {"negatives": 20}
    trained = trainer({"kd": {}, method: settings}, build_student(), build_teacher(), max_steps=2)
    before = {name: value.detach().clone() for name, value in trained.distiller.losses.named_parameters()}
    trained.train()
    log = trained.state.log_history[0]
    assert torch.tensor([log["loss_ce"], log["loss_kd"], log[f"loss_{method}"]]).isfinite().all()
    assert log[f"loss_{method}"] != 0
    still = [name for name, value in trained.distiller.losses.named_parameters() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.parametrize("method", MAPS + EMBEDDINGS)
def test_the_defaults_need_no_layers(method):
    """As in `losses={"kd": {"temperature": 4.0}, "semckd": {"weight": 400.0}}`."""
    settings = {"negatives": 20} if method == "crd" else {}
    trained = trainer({"kd": {"temperature": 4.0}, method: settings}, max_steps=1, bf16=True)
    trained.train()
    assert trained.state.log_history[0][f"loss_{method}"] > 0


def test_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match="no layer 'layer9'. Near are .*layer3"):
        trainer({"at": {"student_layers": ["layer9"], "teacher_layers": [1]}})
    with pytest.raises(ValueError, match=r"no stage 9. Stages: 0 \(act1\), .*3 \(layer3\)"):
        trainer({"at": {"student_layers": [1], "teacher_layers": [9]}})


def test_a_layer_that_gives_no_map():
    with pytest.raises(ValueError, match=r"losses.vid: student_layers: 'global_pool': the layer gives \(2, 64\)"):
        trainer({"vid": {"student_layers": ["global_pool"], "teacher_layers": [1]}})

    class Pairs(Plain):
        def __init__(self):
            super().__init__()
            self.conv = Listing()

        def forward(self, pixel_values):
            return self.fc(self.conv(pixel_values)["map"].mean(dim=(2, 3)))

    class Listing(nn.Module):
        def forward(self, pixel_values):
            return {"map": pixel_values.repeat(1, 3, 1, 1)[:, :8]}

    with pytest.raises(ValueError, match="The layer 'conv' returns dict, not a tensor: name another layer"):
        trainer({"sp": {"student_layers": ["conv"], "teacher_layers": [1]}}, student=Pairs())


def test_lists_of_different_length():
    with pytest.raises(
        ValueError, match="losses.at: student_layers is .1, 2. and teacher_layers .1.: give lists of equal"
    ):
        trainer({"at": {"student_layers": [1, 2], "teacher_layers": [1]}})
    with pytest.raises(ValueError, match="losses.vid: student_layers is .1. and teacher_layers .1, 2, 3.: give lists"):
        trainer({"vid": {"student_layers": [1]}})


def test_without_stages_layers_must_be_named():
    with pytest.raises(ValueError, match="ResNetForImageClassification has no stage indices.*by their module paths"):
        trainer({"at": {}}, student=transformers_resnet())


@pytest.mark.parametrize("losses", [{"at": {}}, {"pkt": {}}])
def test_an_ensemble_has_neither_maps_nor_embeddings(losses):
    with pytest.raises(ValueError, match="an ensemble .* has no layers in common"):
        args = config(losses=losses)
        DistillationTrainer(cifar_resnet(), [cifar_resnet(), cifar_resnet()], args, train_dataset=images(8))


def test_a_last_batch_of_one_image():
    """BatchNorm over one value would fail at the end of the first epoch."""
    data, networks = images(17), (cifar_resnet(), Teacher(cifar_resnet()))
    pooled = {"student_layers": ["layer1"], "teacher_layers": ["global_pool.pool"]}  # (B, 64, 1, 1)
    for losses in ({"srrl": {}}, {"simkd": {"teacher_layer": "embedding"}}, {"fitnet": pooled}, {"semckd": pooled}):
        with pytest.raises(ValueError, match="needs 2 images in every batch, and the last of 17 in batches of 8 has 1"):
            DistillationTrainer(*networks, config(losses=losses), train_dataset=data)
    DistillationTrainer(*networks, config(losses={"srrl": {}}, dataloader_drop_last=True), train_dataset=data).train()
    DistillationTrainer(*networks, config(losses={"simkd": {}}), train_dataset=data).train()


def test_the_labels_of_a_subset():
    """CRD draws its negatives from the rows that are trained on."""
    whole = images(12, classes=4)
    part = Subset(Subset(whole, [1, 3, 5, 7, 8]), [4, 0, 2])  # rows 8, 1 and 5
    ignored = ImageSource.IGNORED
    assert training_labels(part).tolist() == [ignored, 1, *[ignored] * 3, 1, *[ignored] * 2, 0, *[ignored] * 3]
    assert torch.equal(training_labels(whole), whole.labels)
    args = config(losses={"crd": {"negatives": 5}})
    trained = DistillationTrainer(cifar_resnet(), Teacher(cifar_resnet()), args, train_dataset=part)
    assert len(trained.distiller.losses["crd"].student_memory) == 3
    trained.train()


def test_no_stand_ins_from_beside_a_subset():
    split, _ = load_image_splits("digits")
    transform = RandomResizedCrop(8, CIFAR_MEAN, CIFAR_STD)
    for skip in (False, True):
        part = Subset(LazyImageDataset(split, transform=transform, skip_bad_images=skip), range(20))
        if not skip:
            assert (training_labels(part) >= 0).sum() == 20
            continue
        with pytest.raises(ValueError, match="with skip_bad_images an image outside the subset may replace"):
            training_labels(part)


def test_ddp_leaves_the_memory_to_the_loss():
    """It would broadcast all of it before every forward."""
    left = trainer({"kd": {}, "crd": {"negatives": 20}}).distiller._ddp_params_and_buffers_to_ignore
    memories = ["student_memory", "teacher_memory", "log_normalizers", "places"]
    assert left == [f"losses.crd.{name}" for name in memories]


def test_compiled_trainers_one_after_the_other():
    """Networks of one class with other taps: torch.compile keeps code by class."""
    compiled = {"max_steps": 1, "torch_compile": True, "torch_compile_backend": "eager"}
    for losses in ({"kd": {}}, {"sp": {}}):
        terms = []
        for changes in ({"max_steps": 1}, compiled):
            torch.manual_seed(0)
            trained = trainer(losses, **changes)
            trained.train()
            terms.append(trained.state.log_history[0]["loss"])
        assert terms[0] == pytest.approx(terms[1], rel=1e-5)


def test_crd_compiled_has_the_same_gradients():
    """The memories change between its forward and its backward pass, of which torch.compile must not make anything."""
    states = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.manual_seed(0)
        trained = trainer({"kd": {}, "crd": {"negatives": 5}}, max_steps=1, **changes)
        trained.train()
        states.append(trained.distiller.losses.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


def test_an_instance_serves_one_trainer_after_the_other():
    """With networks of other widths."""
    for method in ("fitnet", "vid", "semckd"):
        loss = LOSSES[method](student_layers=[-1], teacher_layers=[-1])
        for student in (tiny_vit(), cifar_resnet()):
            args = config(losses={}, max_steps=1)
            data = {"train_dataset": images(16), "losses": {method: loss}}
            trained = DistillationTrainer(student, Teacher(cifar_resnet()), args, **data)
            trained.train()
            value = trained.state.log_history[0][f"loss_{method}"]
            assert value != 0 and torch.tensor(value).isfinite()
            assert trained.distiller.losses[method] is loss
