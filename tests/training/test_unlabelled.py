"""`DistillationTrainer` on images without labels, and on batches of images with and without labels."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import Plain, config, images, train_logs
from torch.utils.data import Subset

from hfkd import DistillationTrainer
from hfkd.data import ImageDataset, MixedImageDataset, NoAugmentation, WeakAugmentation
from hfkd.errors import HfkdError
from hfkd.losses import LOSSES, dkd_loss, kd_loss
from hfkd.recipe.reading import load_recipe
from hfkd.training.unlabelled import TermMetrics

MAPS = {"student_layers": ["conv"], "teacher_layers": ["conv"]}


def unlabelled(count=16, seed=0, augment=True, class_names=()):
    """`images` without labels."""
    source = images(count, seed=seed)
    transform = WeakAugmentation() if augment else NoAugmentation()
    settings = {"transform": transform, "mean": source.mean, "std": source.std, "seed": seed}
    return ImageDataset(source.images, torch.full((count,), -100), class_names, **settings)


def trainer_of(losses, train_dataset=None, eval_dataset=None, **changes):
    torch.manual_seed(0)
    networks = Plain(), Plain(width=12)
    train_dataset = unlabelled() if train_dataset is None else train_dataset
    changes = {"ce_weight": 0.0} | changes
    return DistillationTrainer(
        *networks, config(**changes), train_dataset=train_dataset, eval_dataset=eval_dataset, losses=losses
    )


def test_loss_terms_are_those_of_the_images():
    """Also of a moving average, with layers that are tapped, and with losses of two views."""
    evaluated = unlabelled(10, 1, augment=False)
    losses = {"kd": {"temperature": 2.0}, "crld": {}, "token_mse": MAPS}
    trainer = trainer_of(losses, eval_dataset=evaluated, ema_decay=0.5, per_device_eval_batch_size=5)
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    pixels = evaluated.__getitems__(range(10))["pixel_values"]
    with torch.no_grad():
        student, teacher = trainer.average.module(pixels), trainer.teacher.model(pixels)
    assert metrics["eval_loss_kd"] == pytest.approx(kd_loss(student, teacher, 2.0).item(), rel=1e-4)
    same = (student.argmax(1) == teacher.argmax(1)).float().mean().item()
    assert metrics["eval_agreement"] == pytest.approx(100 * same) and "eval_top1" not in metrics
    terms = [value for name, value in metrics.items() if name.startswith("eval_loss_")]
    assert len(terms) > 2 and metrics["eval_loss"] == pytest.approx(sum(terms)) != before["eval_loss"]
    assert [row["eval_loss"] for row in trainer.results.rows] == [before["eval_loss"], metrics["eval_loss"]]


def test_the_loss_alone_is_that_of_the_terms():
    """Without the agreement, which is 100 % here."""
    network = Plain()
    losses = {"kd": {}, "token_mse": MAPS}
    settings = {"per_device_eval_batch_size": 5, "ce_weight": 0.0}
    found = []
    for alone in (False, True):
        arguments = config(**settings, prediction_loss_only=alone)
        pair = copy.deepcopy(network), copy.deepcopy(network)
        evaluated = unlabelled(10, 1, augment=False)
        trainer = DistillationTrainer(
            *pair, arguments, train_dataset=unlabelled(), eval_dataset=evaluated, losses=losses
        )
        found.append(trainer.evaluate())
    assert found[0]["eval_agreement"] == 100 and "eval_agreement" not in found[1]
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-5)


def test_an_agreement_without_terms_is_no_loss():
    """`dkd` reads labels, so that nothing of it is measured here."""
    evaluated = unlabelled(8, 1, augment=False)
    settings = {"ce_weight": 1.0, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    with pytest.raises(HfkdError, match="no evaluation gives 'loss'"):
        trainer_of({"dkd": {}}, images(16), evaluated, **settings)
    trainer_of({"dkd": {}}, images(16), evaluated, metric_for_best_model="agreement", **settings)


def test_a_backbone_learns_from_mixed_images_with_labels():
    network = timm.create_model("cifar_resnet8", num_classes=0)
    arguments = config(ce_weight=0.0, mixup=0.8, dataloader_drop_last=True, max_steps=1)
    pair = network, copy.deepcopy(network)
    trainer = DistillationTrainer(*pair, arguments, train_dataset=images(16), losses={"token_mse": {}})
    trainer.train()
    assert train_logs(trainer)[0]["loss_token_mse"] > 0


def test_images_that_do_not_count():
    metrics = TermMetrics(uncounted=-101)
    labels = torch.tensor([-100, -101, -100])
    rows = metrics.rows({"loss_kd": torch.tensor(2.0)}, torch.tensor([True, False]), labels)
    assert rows.tolist() == [[2.0, 100.0], [2.0, 0.0], [2.0, 0.0]]


def test_an_evaluation_does_not_change_the_training():
    losses = {"kd": {}, "feature_queue": {"size": 24}, "vkd": MAPS}
    states = []
    for strategy in ("no", "steps"):
        evaluated = unlabelled(8, 1, augment=False)
        trainer = trainer_of(losses, eval_dataset=evaluated, eval_strategy=strategy, eval_steps=1)
        trainer.train()
        states.append(copy.deepcopy(trainer.distiller.state_dict()))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_predictions_without_labels_are_logits():
    output = trainer_of({"kd": {}}).predict(unlabelled(6, augment=False))
    assert output.predictions.shape == (6, 10) and output.label_ids is None


@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_of_a_backbone_are_embeddings(labelled):
    network = timm.create_model("cifar_resnet8", num_classes=0)
    data = images(6, augment=False) if labelled else unlabelled(6, augment=False)
    arguments = config(ce_weight=0.0)
    pair = network, copy.deepcopy(network)
    trainer = DistillationTrainer(*pair, arguments, train_dataset=images(16), losses={"token_mse": {}})
    output = trainer.predict(data)
    with torch.no_grad():
        expected = network.eval()(torch.stack([row["pixel_values"] for row in data]))
    assert output.label_ids is None and "test_top1" not in output.metrics
    torch.testing.assert_close(torch.from_numpy(output.predictions), expected)


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixing_without_labels(settings, monkeypatch):
    trainer = trainer_of({"kd": {}}, dataloader_drop_last=True, **settings)
    seen, forward = [], trainer.distiller.forward
    monkeypatch.setattr(trainer.distiller, "forward", lambda batch, *rest: seen.append(batch) or forward(batch, *rest))
    trainer.train()
    assert len(seen) == 2 and all((batch["labels"] == -100).all() for batch in seen)
    plain = trainer.train_dataset.__getitems__(seen[1]["index"].tolist())["pixel_values"]
    assert not torch.equal(seen[1]["pixel_values"], plain)  # and student and teacher get the same mixed images
    assert train_logs(trainer)[-1]["loss_kd"] > 0


def test_a_patient_teacher_reads_no_labels():
    """The settings of the recipe give the same student with and without labels, to the bit."""
    recipe = load_recipe("cifar100/patient/resnet20")
    settings = {name: recipe[name] for name in ("ce_weight", "mixup", "dataloader_drop_last", "lr_scheduler_type")}
    states = []
    for train_dataset in (images(16), unlabelled(16)):
        trainer = trainer_of(recipe["losses"], train_dataset, **settings)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert recipe["lr_milestones"] is None and recipe["num_train_epochs"] == 1200
    assert load_recipe("cifar100/patient/resnet20_unlabelled") == recipe | {"label_column": "none"}


@pytest.mark.parametrize(
    "losses, changes, message",
    [
        ({"kd": {}}, {"ce_weight": 1.0}, "ce_weight is 1, .*and the training images have none"),
        ({"kd": {"regions": [1, 2]}}, {}, r"The losses \['kd'\] read labels"),
        ({}, {}, "The training images have no labels, and there is no loss to learn from"),
        *(({name: {}}, {}, "read labels") for name in sorted(LOSSES) if LOSSES[name].reads_labels),
    ],
)
def test_what_needs_labels(losses, changes, message):
    with pytest.raises(HfkdError, match=message):
        trainer_of(losses, **changes)


def test_every_loss_that_reads_labels_says_so():
    """Of images without labels, such a loss would read class -100."""
    assert {name for name, loss in LOSSES.items() if loss.reads_labels} == {
        *("dkd", "nkd", "wsld", "rld", "ofa", "ca_mkd", "tf_kd", "uskd", "crd")
    }


# ---- Mixed batches -------------------------------------------------------------------------------------------------


def mixed(labelled=12, others=20, added=6, batch_size=8):
    parts = images(labelled), unlabelled(others, 1)
    return MixedImageDataset(*parts, unlabelled_images=added, batch_size=batch_size)


@pytest.mark.parametrize("subset", [False, True])
def test_terms_of_a_mixed_batch(subset):
    """Cross-entropy and losses that read labels are means over the images with labels, others over all."""
    data = Subset(mixed(), range(2, 8)) if subset else mixed()
    losses = {"kd": {}, "dkd": {"warmup_epochs": 0}, "crd": {"negatives": 4, "dimension": 4}}
    trainer = trainer_of(losses, data, ce_weight=1.0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert len(batch["labels"]) == 8 and (batch["labels"] >= 0).tolist() == [True] * 2 + [False] * 6
    _, terms = trainer.compute_loss(trainer.distiller, batch, return_outputs=True)
    with torch.no_grad():
        student, teacher = trainer.model(batch["pixel_values"]), trainer.teacher.model(batch["pixel_values"])
    labels = batch["labels"][:2]
    assert torch.allclose(terms["loss_ce"], F.cross_entropy(student[:2], labels))
    assert torch.allclose(terms["loss_kd"], kd_loss(student, teacher, 4.0))
    assert torch.allclose(terms["loss_dkd"], dkd_loss(student[:2], teacher[:2], labels, 1.0, 8.0, 4.0), rtol=1e-3)
    trainer.train()
    assert trainer.state.max_steps == (3 if subset else 6)  # an epoch takes each image with labels once
    trained = trainer.distiller.losses["crd"]
    assert len(trained.student_memory) == (6 if subset else 12)


def test_the_last_mixed_batch_is_smaller():
    trainer = trainer_of({"kd": {}}, mixed(labelled=11), ce_weight=1.0)
    sizes = [len(batch["labels"]) for batch in trainer.get_train_dataloader()]
    assert sizes == [8] * 5 + [7]
    trainer.train()


def test_a_users_loss_of_labels_gets_the_labelled_images():
    seen = []

    def label_loss(outputs, labels, num_items_in_batch):
        seen.append((len(outputs.logits), labels.min().item(), num_items_in_batch))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = DistillationTrainer(Plain(), None, config(), train_dataset=mixed(), compute_loss_func=label_loss)
    trainer.train()
    assert {(rows, number) for rows, _, number in seen} == {(2, 2)} and min(low for _, low, _ in seen) >= 0
