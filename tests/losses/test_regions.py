import pytest
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch import nn
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses import LOSSES, DKDLoss, KDLoss, build_losses
from hfkd.losses.regions import PerImageLoss, region_logits, region_weights
from hfkd.networks.features import AVERAGED_MAP, EMBEDDING, Outputs

WITH_REGIONS = [name for name, loss in LOSSES.items() if issubclass(loss, PerImageLoss)]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class ReleasedNKD(PerImageLoss):
    """NKD as SDD's release has it, in which the label stays among the others."""

    def __init__(self, gamma, temperature, **settings):
        super().__init__(**settings)
        self.gamma, self.temperature = gamma, temperature

    def per_image(self, student_logits, teacher_logits, batch):
        column = batch["labels"][:, None]
        teacher, student = (
            F.softmax(teacher_logits, 1).gather(1, column),
            F.log_softmax(student_logits, 1).gather(1, column),
        )
        soft = F.softmax(teacher_logits / self.temperature, 1)
        others = (soft * F.log_softmax(student_logits / self.temperature, 1)).sum(dim=1)
        return -(teacher * student).squeeze(1) - self.gamma * self.temperature**2 * others


def network(feature_map, weight, bias):
    """Outputs of a network that averages a map for a linear layer."""
    classifier = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)
    embedding = feature_map.mean(dim=(2, 3))
    logits = classifier(embedding)
    return Outputs(logits, logits, {AVERAGED_MAP: feature_map, EMBEDDING: embedding}, classifier=classifier)


def networks(batch_size=3, classes=5):
    return tuple(
        network(random(batch_size, width, 4, 4, seed=width), random(classes, width), random(classes))
        for width in (3, 4)
    )


METHODS = {
    "sdd_kd": lambda settings, regions: KDLoss(settings["T"], regions=regions),
    "sdd_dkd": lambda settings, regions: DKDLoss(
        settings["alpha"], settings["beta"], settings["T"], warmup_epochs=0.0, regions=regions
    ),
    "sdd_nkd_as_released": lambda settings, regions: ReleasedNKD(settings["gamma"], settings["T"], regions=regions),
}


@pytest.mark.parametrize("method", METHODS)
def test_golden(new_feature_golden, method):
    golden = new_feature_golden.tensor
    for case, settings in cases(new_feature_golden, method):
        student_map = golden("sdd/student_map").clone().requires_grad_()
        student, teacher = (
            network(one, golden(f"sdd/{role}_classifier/weights/weight"), golden(f"sdd/{role}_classifier/weights/bias"))
            for role, one in (("student", student_map), ("teacher", golden("sdd/teacher_map")))
        )
        released = case.split("/")[1]
        regions = [int(side) for side in released.removeprefix("M=").split("-")]
        summed = region_logits(teacher.averaged_map, teacher.classifier, regions).sum(1)  # in any order
        torch.testing.assert_close(summed, golden(f"sdd/{released}/teacher_regions").sum(2), rtol=1e-9, atol=1e-9)
        loss = METHODS[method](settings, regions)
        loss.logit_standardization = bool(settings["zscore"])
        loss.setup(student, teacher)
        value = loss(student, teacher, {"labels": golden("sdd/labels")})
        value.backward()
        classifier = {f"student_classifier/{key}": part.grad for key, part in student.classifier.named_parameters()}
        new_feature_golden.check(case, value, student_map=student_map.grad, **classifier)


def cases(golden, case):
    for name in golden.values:
        if name.startswith(f"{case}/"):
            parts = [part.split("=") for part in name.split("/")[2:]]
            yield name, {key: float(value) for key, value in parts}


def test_one_region_is_the_image():
    student, _ = networks()
    torch.testing.assert_close(region_logits(student.averaged_map, student.classifier, [1])[:, 0], student.logits)


def test_results_name_regions_where_there_are_some():
    assert "regions" not in build_losses({"kd": {}}, False)["kd"].settings()
    assert build_losses({"kd": {"regions": [1, 2]}}, False)["kd"].settings()["regions"] == [1, 2]


def test_where_the_teacher_changes_its_mind_counts_twice():
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    logits = torch.stack([torch.stack([right, wrong, right]), torch.stack([wrong, wrong, right])])
    assert region_weights(logits, torch.tensor([0, 0])).tolist() == [[1, 2, 1], [1, 1, 2]]


@pytest.mark.parametrize("zscore", [False, True])
@pytest.mark.parametrize("name", WITH_REGIONS)
def test_every_method_of_images_is_one_of_regions(name, zscore):
    """Where all regions are alike the loss is that of the images."""
    student, teacher = networks()
    even = [one.averaged_map.mean((2, 3), keepdim=True).expand_as(one.averaged_map) for one in (student, teacher)]
    for outputs, feature_map in zip((student, teacher), even, strict=True):
        outputs.features[AVERAGED_MAP] = feature_map
    batch = {"labels": torch.tensor([0, 4, 2]), "progress": torch.tensor(5.0)}
    values = []
    for settings in ({}, {"regions": [1, 2, 4]}):
        (loss,) = build_losses({name: settings}, logit_standardization=zscore).values()
        loss.setup(student, teacher)
        values.append(loss(student, teacher, batch))
    torch.testing.assert_close(values[1], values[0])


def test_gradcheck():
    student, teacher = networks(batch_size=2)
    loss = KDLoss(2.0, regions=[1, 2])
    batch = {"labels": torch.tensor([0, 4])}

    def value(feature_map):
        student.features[AVERAGED_MAP] = feature_map
        return loss(student, teacher, batch)

    assert gradcheck(value, random(2, 3, 4, 4).requires_grad_())


def test_a_mixed_image_has_the_label_of_its_largest_share():
    student, teacher = networks()
    labels = torch.tensor([0, 4, 2])
    shares = F.one_hot(labels, 5) * 0.6 + 0.08
    loss = KDLoss(regions=[1, 2])
    assert loss(student, teacher, {"labels": labels}) == loss(student, teacher, {"labels": shares})


@pytest.mark.parametrize("zscore", [False, True])
def test_the_students_classifier_learns_from_regions(zscore):
    student, teacher = (load_student("cifar_resnet8", num_classes=10) for _ in range(2))
    before = student.timm_model.fc.weight.detach().clone()
    losses = {"kd": {"regions": [1, 2, 4]}, "dkd": {}}
    args = config(max_steps=1, ce_weight=0.0, losses=losses, logit_standardization=zscore)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=images(8))
    trainer.train()
    log = train_logs(trainer)[-1]
    assert log["loss_kd"] > 0 and log["loss_dkd"] > 0 and not torch.equal(student.timm_model.fc.weight, before)


@pytest.mark.parametrize("regions", [[], [2], [1], [1, 3], [4, 1], "1 2", 2])
def test_regions_begin_with_the_image(regions):
    with pytest.raises(ValueError, match=r"regions is .*: give \[1, 2\], \[1, 4\] or \[1, 2, 4\], or leave it out"):
        KDLoss(regions=regions)


def test_a_base_without_values():
    with pytest.raises(NotImplementedError, match="PerImageLoss does not define per_image"):
        PerImageLoss()(*networks(), {})
    with pytest.raises(ValueError, match='reduction is \'sum\': give "mean" or "none"'):
        KDLoss.per_image.__globals__["kd_loss"](random(2, 3), random(2, 3), 1.0, reduction="sum")
