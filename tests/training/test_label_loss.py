"""Cross-entropy with class weights and label smoothing, from a recipe."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import DIGITS_RECIPE, Plain, config, images

from hfkd import DistillationTrainer
from hfkd.commands.train import distill, train_teacher
from hfkd.data.subsets import training_labels
from hfkd.training.label_loss import class_weights

RECIPE = DIGITS_RECIPE | {
    "train_split": "train[:32]",
    "per_device_train_batch_size": 32,
    "max_steps": 1,
    "optim": "sgd",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def test_the_first_loss_is_the_weighted_and_smoothed_one():
    """One batch of all images: the logged loss is torch's, of the same logits, class weights and smoothing."""
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    logged = {}
    for name, words in (
        ("plain", []),
        ("both", ["--class_weights", "balanced", "--label_smoothing_factor", "0.2"]),
    ):
        trainer = train_teacher(["r.yaml", "--output_dir", name, *words])
        logged[name] = json.loads(Path(name, "trainer_state.json").read_text())["log_history"][0]["loss"]
    counts = training_labels(trainer.train_dataset).bincount(minlength=10)
    expected = 32 / (10 * counts.clamp(min=1))
    torch.testing.assert_close(trainer.distiller.cross_entropy.weight, expected)
    assert trainer.distiller.cross_entropy.label_smoothing == 0.2
    assert logged["both"] != pytest.approx(logged["plain"], rel=1e-3)


def test_the_loss_is_that_of_torch():
    weights = [1.0, 0.5, *[2.0] * 8]
    dataset = images(20, augment=False)
    arguments = config(class_weights=weights, label_smoothing_factor=0.1)
    trainer = DistillationTrainer(Plain(), None, arguments, train_dataset=dataset)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.distiller, dict(batch))
        logits = trainer.model(batch["pixel_values"])
    expected = F.cross_entropy(logits, batch["labels"], weight=torch.tensor(weights), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"class_weights": "balanced"},
            "class_weights is for the cross-entropy, and compute_loss_func takes its place",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for the cross-entropy"),
    ],
)
def test_a_loss_of_the_users_own_is_refused_beside_them(changes, message):
    def own(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels)

    with pytest.raises(ValueError, match=message):
        DistillationTrainer(Plain(), None, config(**changes), train_dataset=images(20), compute_loss_func=own)


def test_smoothing_is_refused_beside_losses():
    arguments = config(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 is for training from the labels alone"):
        DistillationTrainer(Plain(), Plain(), arguments, train_dataset=images(20), losses={"kd": {}})


def test_the_number_of_weights_is_checked_before_the_student_is_built(monkeypatch):
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr("hfkd.commands.build.build_student", None)
    with pytest.raises(ValueError, match="class_weights has 3 weights, and the data set 10 classes"):
        train_teacher(["r.yaml", "--class_weights", "1", "2", "3"])


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="has 2 weights, and the data set 10 classes"):
        class_weights(["1", "2"], images(20))
    with pytest.raises(ValueError, match="balanced counts the labels.*TensorDataset does not know"):
        class_weights(["balanced"], torch.utils.data.TensorDataset(torch.zeros(2)))


def test_a_loss_function_of_no_weight_is_refused():
    with pytest.raises(ValueError, match="ce_weight, the weight of compute_loss_func, is 0"):
        DistillationTrainer(
            Plain(), Plain(), config(ce_weight=0.0, losses={"kd": {}}), compute_loss_func=F.cross_entropy
        )


def test_class_weights_without_labels_are_refused():
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE | {"losses": {"kd": {}}, "label_column": "none"}))
    with pytest.raises(ValueError, match="class_weights weigh the cross-entropy .* and .* have none"):
        distill(["r.yaml", "--class_weights", "balanced", "--teacher", "cifar_resnet8"])
