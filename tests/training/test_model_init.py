"""`DistillationTrainer(model_init=...)`: a fresh student and fresh losses for every training, one teacher for all."""

import copy

import pytest
import torch
from helpers import Plain, config, images
from interrupting import differences, end_of
from torch import nn
from transformers import TrainerCallback

from hfkd import DistillationTrainer, load_student
from hfkd.data import ImageDataset

SETTINGS = {"eval_strategy": "epoch", "num_train_epochs": 2, "lr_scheduler_type": "cosine", "logging_strategy": "epoch"}


class Beginnings(TrainerCallback):
    """Keeps what each training begins with."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        distiller = self.trainer.distiller
        self.seen.append((copy.deepcopy(distiller.state_dict()), distiller.losses["ctkd"], distiller.ce_weight))


def data(size=32):
    return {"train_dataset": images(24, size=size), "eval_dataset": images(10, seed=1, augment=False, size=size)}


def trainer_of(student, teacher, output_dir="run", callbacks=(), **changes):
    return DistillationTrainer(
        None, teacher, config(output_dir, **SETTINGS | changes), model_init=student, callbacks=list(callbacks), **data()
    )


def plain_teacher():
    torch.manual_seed(1)
    return Plain(width=16)


def search(trainer, hp_space, n_trials):
    return trainer.hyperparameter_search(
        hp_space, lambda metrics: metrics["eval_top1"], n_trials, direction="maximize", backend="optuna"
    )


def test_every_trial_begins_anew():
    beginnings, teacher = Beginnings(), plain_teacher()
    trainer = trainer_of(lambda: Plain(), teacher, losses={"ctkd": {}}, ema_decay=0.9, callbacks=[beginnings])
    beginnings.trainer, kept = trainer, trainer.teacher
    weights = []

    def hp_space(trial):
        weights.append(trial.suggest_float("weight", 0.5, 4.0))
        return {"losses": {"ctkd": {"weight": weights[-1]}}, "ce_weight": 0.5, "learning_rate": 0.1}

    best = search(trainer, hp_space, 3)
    assert best.hyperparameters["weight"] in weights and 0 <= best.objective <= 100
    states, losses, ce_weights = zip(*beginnings.seen, strict=True)
    assert differences(states[0], states[1]) == differences(states[0], states[2]) == []
    assert [loss.weight for loss in losses] == weights and len(set(map(id, losses))) == 3 and ce_weights == (0.5,) * 3
    assert trainer.teacher is kept
    assert len(trainer.results.rows) == 2 and trainer.results.facts["losses"]["ctkd"]["weight"] == weights[-1]
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "losses, changes",
    [
        ({"kd": {"temperature": 2.0}, "ctkd": {}}, {"ema_decay": 0.8, "mixup": 0.4, "dataloader_drop_last": True}),
        ({"kd": {}, "vid": {}}, {}),
        ({"simkd": {}}, {"ce_weight": 0.0}),
    ],
)
def test_a_trial_is_the_run_with_its_settings(losses, changes):
    """To the bit, and whatever ran before it."""

    def network(name):
        if "kd" in losses and "vid" not in losses:
            return Plain(width=8 if name == "cifar_resnet8" else 16)
        return load_student(name, [f"class {index}" for index in range(10)], image_size=32)

    changes = changes | {"num_train_epochs": 1}
    teacher = network("cifar_resnet14")
    searching = trainer_of(lambda: network("cifar_resnet8"), copy.deepcopy(teacher), losses=losses, **changes)
    searched = iter([{"losses": {**losses, next(iter(losses)): {"weight": 3.0}}, "learning_rate": 0.2}])
    own = {"losses": losses, "learning_rate": searching.args.learning_rate}
    search(searching, lambda trial: next(searched, own), 2)

    args = config("plain", losses=losses, **SETTINGS | changes)
    torch.manual_seed(args.seed)
    plain = DistillationTrainer(network("cifar_resnet8"), teacher, args, **data())
    plain.train()
    assert differences(end_of(plain), end_of(searching)) == []


def test_train_begins_anew_too():
    trainer = trainer_of(lambda: Plain(), plain_teacher(), losses={"ctkd": {}})
    trainer.train()
    first = end_of(trainer)
    trainer.train()
    assert differences(first, end_of(trainer)) == []
    assert isinstance(trainer.model, Plain) and trainer.evaluate()["eval_top1"] == trainer.results.rows[-1]["eval_top1"]


def test_a_bare_timm_student_is_wrapped_in_every_trial():
    import timm

    student = lambda: timm.create_model("cifar_resnet8", num_classes=10)  # noqa: E731
    trainer = trainer_of(student, plain_teacher(), losses={"kd": {}}, num_train_epochs=1)
    search(trainer, lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)}, 1)
    assert trainer.distiller.student.config.id2label[3] == "class 3"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": Plain()}, "Give a model, or model_init, which makes one: one of the two"),
        ({"model_init": None}, "Give a model, or model_init"),
        ({"losses": {"kd": {}}}, "give them as args.losses"),
        ({"optimizers": (torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), None)}, "incompatible.*`optimizers`"),
    ],
)
def test_what_does_not_go_with_it(arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        DistillationTrainer(
            **{"teacher": Plain(), "args": config(), "model_init": lambda: Plain()} | data() | arguments
        )


def test_a_trial_may_not_learn_from_labels_that_are_not_there():
    source = images(16)
    labels = torch.full((16,), source.IGNORED)
    dataset = ImageDataset(source.images, labels, [], transform=source.transform, mean=source.mean, std=source.std)
    settings = config(losses={"kd": {}}, ce_weight=0.0)
    trainer = DistillationTrainer(None, plain_teacher(), settings, train_dataset=dataset, model_init=lambda: Plain())
    with pytest.raises(ValueError, match="ce_weight is 1, .* and the training images have none"):
        trainer.hyperparameter_search(lambda trial: {"ce_weight": 1.0}, n_trials=1, backend="optuna")
