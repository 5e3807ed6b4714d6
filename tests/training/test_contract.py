"""What a user of transformers' Trainer brings along: metrics, data sets, optimizers and models of their own."""

import copy
import json
import pickle
import random

import datasets
import numpy as np
import pytest
import torch
from helpers import Plain, config, images
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from transformers import EarlyStoppingCallback, TrainingArguments

from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.errors import HfkdError

KD = {"kd": {"temperature": 4.0}}
EPOCHS = {"eval_strategy": "epoch", "num_train_epochs": 2, "logging_strategy": "epoch"}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(student=None, teacher=None, eval_dataset=None, train_dataset=None, args=None, **arguments):
    changes = arguments.pop("changes", {})
    return DistillationTrainer(
        student or Plain(),
        teacher or Plain(),
        args or config(losses=KD, **EPOCHS | changes),
        train_dataset=images(24) if train_dataset is None else train_dataset,
        eval_dataset=images(20, seed=1, augment=False) if eval_dataset is None else eval_dataset,
        **arguments,
    )


def results():
    return json.loads(open("run/results.json").read())


# ---- Metrics -------------------------------------------------------------------------------------------------------


def test_a_metric_of_ones_own_gets_logits():
    shapes = []

    def metric(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return accuracy(prediction) | {"labels": prediction.label_ids}  # what is no number is in no table

    trainer = trainer_of(compute_metrics=metric)
    trainer.train()
    assert shapes == [((20, 10), (20,))] * 2
    row = results()["epochs"][-1]
    assert row["eval_accuracy"] == pytest.approx(row["eval_top1"] / 100) and "eval_agreement" in row
    assert results()["last"]["others"] == {"accuracy": row["eval_accuracy"]}
    assert [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry]
    text = (trainer.export() / "README.md").read_text()
    assert "accuracy" in text and f"{row['eval_accuracy']:.4g}" in text


def test_logits_may_be_preprocessed():
    def metric(prediction):
        classes, highest = prediction.predictions
        assert classes.shape == highest.shape == prediction.label_ids.shape
        return {"accuracy": (classes == prediction.label_ids).mean()}

    def preprocess(logits, labels):
        assert len(logits) == len(labels)
        return logits.argmax(dim=-1), logits.max(dim=-1).values

    trainer = trainer_of(compute_metrics=metric, preprocess_logits_for_metrics=preprocess)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_top1"] / 100)
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions[0].shape == (20,) and prediction.metrics["test_accuracy"] == metrics["eval_accuracy"]


def test_without_a_metric_no_logits_are_kept(monkeypatch):
    kept = []
    monkeypatch.setattr(
        "hfkd.training.metrics.EvaluationMetrics.__call__",
        lambda self, prediction, **kwargs: kept.append([part.shape for part in prediction.predictions]) or {},
    )
    trainer_of().evaluate()
    assert kept == [[(20, 5), (20,), (20,)]]


def test_batch_by_batch():
    seen = []

    def metric(prediction, compute_result):
        seen.append((prediction.predictions.argmax(-1) == prediction.label_ids).float())
        return {"accuracy": torch.cat(seen).mean().item()} if compute_result else None

    trainer = trainer_of(compute_metrics=metric, changes={"batch_eval_metrics": True})
    metrics = trainer.evaluate()
    assert len(seen) == 3 and metrics["eval_accuracy"] == pytest.approx(metrics["eval_top1"] / 100)
    assert trainer_of(changes={"batch_eval_metrics": True}).evaluate()["eval_top1"] == metrics["eval_top1"]


@pytest.mark.parametrize("by_batch", [False, True])
def test_losses_and_inputs_for_metrics(by_batch):
    def metric(prediction):
        predictions, labels = prediction.predictions, prediction.label_ids
        if by_batch:
            assert [len(batch) for batch in predictions] == [8, 8, 4]
            predictions, labels = np.concatenate(predictions), np.concatenate(labels)
        expected = nn.functional.cross_entropy(torch.tensor(predictions), torch.tensor(labels), reduction="none")
        np.testing.assert_allclose(prediction.losses, expected, rtol=1e-5)
        return {"own": len(np.concatenate(prediction.inputs) if by_batch else prediction.inputs)}

    student = load_student("cifar_resnet8", num_classes=10)
    changes = {"include_for_metrics": ["loss", "inputs"], "eval_do_concat_batches": not by_batch}
    trainer = trainer_of(student, compute_metrics=metric, changes=changes)
    assert trainer.evaluate()["eval_own"] == 20
    with pytest.raises(HfkdError, match="include_for_metrics: inputs"):
        trainer_of(compute_metrics=metric, changes=changes)


def test_images_that_do_not_count_reach_no_metric():
    eval_set = images(12, augment=False)
    eval_set.labels[:5] = -100
    counted = []
    trainer = trainer_of(eval_dataset=eval_set, compute_metrics=lambda p: counted.append(len(p.predictions)) or {})
    trainer.evaluate()
    assert counted == [7]


def test_several_evaluation_sets():
    sets = {"a": images(20, seed=1, augment=False), "b": images(12, seed=2, augment=False)}
    best = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "b_top1"}
    trainer = trainer_of(eval_dataset=sets, compute_metrics=accuracy, changes=best)
    trainer.train()
    metrics = trainer.evaluate()
    alone = {name: trainer.evaluate(data) for name, data in sets.items()}
    names = ("top1", "loss", "agreement", "accuracy")
    for name, data in alone.items():
        assert [metrics[f"eval_{name}_{key}"] for key in names] == [data[f"eval_{key}"] for key in names]
    row = results()["epochs"][-1]
    assert row["eval_top1"] == row["eval_a_top1"] and {"eval_b_top1", "eval_b_accuracy"} <= row.keys()
    assert trainer.state.best_metric == max(row["eval_b_top1"] for row in trainer.results.rows)


def test_another_data_set_changes_no_result():
    trainer = trainer_of(changes={"dataloader_num_workers": 1, "dataloader_persistent_workers": True})
    trainer.train()
    rows = copy.deepcopy(trainer.results.rows)
    other = trainer.evaluate(images(4, seed=3, augment=False))
    assert trainer.results.rows == rows and other["eval_top1"] in (0, 25, 50, 75, 100)
    assert trainer.evaluate()["eval_top1"] == rows[-1]["eval_top1"]


def test_no_best_model_needs_no_metric():
    sets = {"a": images(8, augment=False)}
    trainer = trainer_of(eval_dataset=sets)
    trainer.train()  # the default metric is top1, and evaluation gives a_top1
    assert any("eval_a_top1" in entry for entry in trainer.state.log_history)
    assert trainer.state.global_step == trainer.state.max_steps > 0


@pytest.mark.parametrize(
    "wanted, arguments, message",
    [
        (
            "top1",
            {"eval_dataset": {"a": images(8), "b": images(8)}},
            "no evaluation gives 'top1'.*Did you mean 'a_top1'",
        ),
        ("acuracy", {"compute_metrics": accuracy}, "no evaluation gives 'acuracy'. Did you mean 'accuracy'"),
        ("eval_accuracy", {"compute_metrics": accuracy}, None),
        ("accuracy", {}, "Valid: loss, top1, top5, agreement, teacher_top1"),
        ("runtime", {}, None),
        ("accuracy", {"compute_metrics": lambda prediction: prediction.fails}, None),
    ],
)
def test_the_metric_of_the_best_model_is_checked_before_training(wanted, arguments, message):
    changes = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": wanted}
    if message is None:
        trainer_of(changes=changes, **arguments)
        return
    with pytest.raises(HfkdError, match=message):
        trainer_of(changes=changes, **arguments)


def test_a_metric_must_be_a_dictionary():
    with pytest.raises(HfkdError, match="compute_metrics must return a dictionary.*returned 0.5"):
        trainer_of(compute_metrics=lambda prediction: 0.5).evaluate()


# ---- Losses and optimizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_of_ones_own_takes_the_place_of_the_cross_entropy(accumulated):
    def summed(outputs, labels, num_items_in_batch):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def logs(**arguments):
        torch.manual_seed(0)
        changes = {"ce_weight": 0.5, "gradient_accumulation_steps": accumulated}
        trainer = trainer_of(changes=changes, **arguments)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    own, usual = logs(compute_loss_func=summed), logs()
    for left, right in zip(own, usual, strict=True):
        assert left["loss_labels"] == pytest.approx(right["loss_ce"], rel=1e-5) and "loss_ce" not in left
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_an_optimizer_of_ones_own():
    student = Plain()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = trainer_of(student, optimizers=(optimizer, schedule))
    trainer.train()
    assert optimizer.state and schedule.last_epoch == 6
    for losses, message in (({"ctkd": {}}, "'ctkd' has parameters of its own"), (KD, "no parameter of the student")):
        other = student if losses is not KD else Plain()
        with pytest.raises(HfkdError, match=message):
            trainer_of(other, args=config(losses=losses), optimizers=(optimizer, None))


def test_what_losses_own_is_trained_whoever_creates_the_optimizer():
    for by_class in (False, True):
        arguments = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})} if by_class else {}
        trainer = trainer_of(args=config(losses={"ctkd": {}}, lr_milestones=[1]), **arguments)
        if not by_class:
            trainer.create_optimizer_and_scheduler(num_training_steps=3)
        [before] = [parameter.clone() for parameter in trainer.distiller.losses.parameters()]
        trainer.train()
        assert not torch.equal(before, *trainer.distiller.losses.parameters())


def test_training_twice_and_stopping_early():
    changes = {"save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 3}
    trainer = trainer_of(changes=changes, callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=1000)])
    trainer.train()
    assert trainer.state.epoch == 2  # no improvement of 1000 %
    trainer.train()
    assert [row["epoch"] for row in trainer.results.rows] == [1, 2]


# ---- Data ----------------------------------------------------------------------------------------------------------


def with_image_column(count=12):
    pictures = [Image.fromarray(np.full((8, 8, 3), 20 * row, np.uint8)) for row in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [row % 3 for row in range(count)]}, features)
    return data.map(lambda row: {"pixel_values": np.float32(row["image"]).transpose(2, 0, 1) / 255})


def test_a_data_set_that_keeps_its_image_column():
    data = with_image_column()
    args = config(losses=KD, remove_unused_columns=True, **EPOCHS)
    trainer = trainer_of(Plain(3), Plain(3), data, data, args)
    trainer.train()
    assert results()["epochs"][-1]["eval_top1"] > 0 and len(trainer.predict(data).predictions) == 12
    with pytest.raises(HfkdError, match="items make no batch.*remove_unused_columns=True leaves out"):
        trainer_of(Plain(3), Plain(3), data, data)


def test_removing_columns_leaves_hfkds_batches_whole():
    args = config(losses={"mlkd": {}}, remove_unused_columns=True, **EPOCHS)
    trainer = trainer_of(args=args)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps > 0
    # MLKD reads the second view of each image, which the student's forward does not take.
    assert any(name.startswith("loss_mlkd") for entry in trainer.state.log_history for name in entry)


class Folder(TensorDataset):
    """Pairs of image and label, as of torchvision."""

    classes = ("a", "b", "c")

    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, int(label)


def test_pairs_of_image_and_label():
    data = Folder(torch.rand(12, 3, 16, 16), torch.arange(12) % 3)
    for columns in (False, True):
        args = config(losses=KD, remove_unused_columns=columns, **EPOCHS)
        trainer = trainer_of(Plain(3), Plain(3), data, data, args)
        trainer.train()
    assert 0 <= results()["epochs"][-1]["eval_top1"] <= 100
    with pytest.raises(HfkdError, match="must be a pair .* not 3 values"):
        trainer_of(train_dataset=TensorDataset(*[torch.zeros(4)] * 3))
    with pytest.raises(HfkdError, match=r"must hold pixel_values \(B, 3, H, W\), float.* \(2, 3, 8, 8\) torch.uint8"):
        trainer_of(train_dataset=TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long()))


# ---- Names and models ----------------------------------------------------------------------------------------------


def test_names_in_place_of_models(tmp_path):
    load_student("cifar_resnet8", images().class_names, image_size=32).save_pretrained(tmp_path / "teacher")
    trainer = trainer_of("cifar_resnet8", str(tmp_path / "teacher"))
    assert trainer.model.config.id2label[3] == "class 3" and trainer.teacher.input_spec.image_size == 32
    assert trainer.model.config.pretrained_cfg["mean"] == trainer.train_dataset.mean
    folder = Folder(torch.rand(12, 3, 32, 32), torch.arange(12) % 3)
    assert trainer_of("cifar_resnet8", Plain(3), folder, folder).model.config.id2label == {0: "a", 1: "b", 2: "c"}
    with pytest.raises(HfkdError, match=r"does not tell them: pass load_student\('cifar_resnet8', class_names\)"):
        trainer_of("cifar_resnet8", train_dataset=TensorDataset(torch.rand(4, 3, 32, 32), torch.zeros(4).long()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"args": TrainingArguments("run", use_cpu=True)}, "args must be a DistillationConfig, got TrainingArguments"),
        ({"teacher": TrainingArguments("run", use_cpu=True)}, "teacher must be a model.*got TrainingArguments"),
        ({"student": 5}, "student must be a model or its name, got int"),
        ({"teacher": "cifar_resnet200"}, "'cifar_resnet200' is no timm architecture"),
    ],
)
def test_one_line_for_a_wrong_argument(arguments, message):
    with pytest.raises(HfkdError, match=message):
        trainer_of(**arguments)


def everything(model):
    """All that another program could notice of a model."""
    modules = {
        name: (module.training, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    tensors = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    return modules, tensors, {name: value.clone() for name, value in model.state_dict().items()}


def test_a_teacher_is_left_as_it_was():
    teacher = load_student("cifar_resnet14", num_classes=10)
    teacher.train()
    modules, tensors, weights = everything(teacher)
    args = config(losses={"kd": {}, "fitnet": {}}, bf16=True)
    trainer = trainer_of(load_student("cifar_resnet8", num_classes=10), teacher, args=args)
    trainer.train()
    after = everything(teacher)
    assert after[:2] == (modules, tensors)
    for name, value in weights.items():
        assert value.dtype == after[2][name].dtype and torch.equal(value, after[2][name]), name
    teacher.train()(torch.zeros(2, 3, 32, 32)).logits.sum().backward()
    with pytest.raises(HfkdError, match="same object or have weights in common"):
        DistillationTrainer(teacher, Teacher(teacher), config(losses=KD), train_dataset=images())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trained_student_can_be_copied(bf16):
    args = config(losses={"kd": {}, "fitnet": {}, "srrl": {}}, bf16=bf16)
    student = load_student("cifar_resnet8", num_classes=10)
    trainer = trainer_of(student, load_student("cifar_resnet14", num_classes=10), args=args)
    trainer.evaluate()
    trainer.train()
    student.eval()
    for clone in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in clone.modules())
        logits = clone(torch.ones(2, 3, 32, 32)).logits
        assert logits.dtype == torch.float32 and torch.equal(logits, student(torch.ones(2, 3, 32, 32)).logits)
    trainer.train()  # the taps are back


# ---- Batches of one image ------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A network with BatchNorm over its embedding, of the given kind."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.norm, self.dropout, self.fc = norm(3), nn.Dropout(), nn.Linear(3, 10)

    def forward(self, pixel_values):
        return self.fc(self.dropout(self.norm(pixel_values.mean(dim=(2, 3)))))


def state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize(
    "student, count, changes, message",
    [
        (Head, 17, {}, "Set dataloader_drop_last"),
        (Head, 17, {"dataloader_drop_last": True}, None),
        (Head, 18, {}, None),
        (Head, 16, {"per_device_train_batch_size": 1}, "A batch of one image comes up"),
        (lambda: Head(nn.Identity), 17, {}, None),
        (Plain, 17, {"losses": {"srd": {}}}, "'srd' needs 2 images"),
        (Plain, 17, {"losses": {"crd": {"negatives": 4}}}, None),
        (Head, 17, {"gradient_accumulation_steps": 2}, "Expected more than 1 value per channel"),
    ],
)
def test_a_batch_of_one_image_is_tried_before_training(student, count, changes, message):
    arguments = {"student": student(), "args": config(**{"losses": KD} | changes), "train_dataset": images(count)}
    if message is not None:
        with pytest.raises(HfkdError, match=message):
            trainer_of(**arguments)
        return
    trainer_of(**arguments).train()


def test_trying_leaves_no_trace(monkeypatch):
    """Neither in weights, statistics and memories, nor in the random numbers."""

    def begun():
        torch.manual_seed(0)
        student = load_student("cifar_resnet8", num_classes=10)
        student.timm_model.conv1.eval()
        losses = {"crd": {"negatives": 4}, "fitnet": {}}
        teacher = load_student("cifar_resnet14", num_classes=10)
        return trainer_of(student, teacher, args=config(losses=losses), train_dataset=images(25)), state()

    tried, after = begun()
    monkeypatch.setattr("hfkd.training.trainer.check_single_image", lambda *args: asked.append(args))
    asked = []
    untried, expected = begun()
    assert asked and after == expected and not tried.model.timm_model.conv1.training
    own, other = tried.distiller.state_dict(), untried.distiller.state_dict()
    torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
