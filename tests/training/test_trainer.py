import copy
import json

import numpy as np
import pytest
import timm
import torch
from helpers import GOLDEN, Plain, config, images, probe_weight, train_logs
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.data import ImageDataset, NoAugmentation
from hfkd.losses import DistillationLoss, KDLoss, kd_loss
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.wrapping import wrap_timm

KD = {"kd": {"temperature": 4.0}}


def probe(model):
    """The model in float64 under the golden file's weights."""
    model = model.double()
    model.load_state_dict({name: probe_weight(name, value) for name, value in model.state_dict().items()})
    return model


class Float64Images(ImageDataset):
    """Batches in float64, as the golden steps were computed."""

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
        pixels = self.images[torch.tensor(indices)].double() / 255
        return batch | {"pixel_values": (pixels - mean) / std}


def test_twelve_golden_steps():
    """Weighting, weight decay on every parameter, momentum and modes, against the reference code on real images."""
    golden = json.loads((GOLDEN / "training.json").read_text())["kd_zscore"]
    rows = np.load(GOLDEN / "cifar100_rows.npz")
    pixels, labels = torch.from_numpy(rows["images"]).permute(0, 3, 1, 2), torch.from_numpy(rows["labels"]).long()
    data = Float64Images(
        pixels.contiguous(),
        labels,
        [str(i) for i in range(100)],
        transform=NoAugmentation(),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )
    train_set, held_out = torch.utils.data.Subset(data, range(192)), data.__getitems__(list(range(192, 200)))
    student = probe(timm.create_model("cifar_resnet8", num_classes=100).double())
    teacher = probe(timm.create_model("cifar_resnet20", num_classes=100).double())
    args = config(
        losses={"kd": {"temperature": 2.0, "weight": 9.0}},
        logit_standardization=True,
        ce_weight=0.1,
        weight_decay=5e-4,
        decay_all_parameters=True,
        per_device_train_batch_size=16,
        train_sampling_strategy="sequential",
    )
    trainer = DistillationTrainer(student, teacher, args, train_dataset=train_set)
    trainer.train()

    logs = train_logs(trainer)
    assert len(logs) == len(golden["steps"]) == 12
    for log, step in zip(logs, golden["steps"], strict=True):
        assert log["loss_ce"] == pytest.approx(step["loss_ce"], rel=1e-6)
        assert log["loss_kd"] == pytest.approx(step["loss_kd"], rel=1e-6)
        assert log["loss"] == pytest.approx(step["total"], rel=1e-6)
    student.eval()
    final = torch.tensor(golden["final_logits"], dtype=torch.float64)
    torch.testing.assert_close(student(held_out["pixel_values"]), final, rtol=1e-6, atol=1e-6)
    norm = torch.cat([p.detach().flatten() for p in student.parameters()]).norm().item()
    assert norm == pytest.approx(golden["final_parameter_norm"], rel=1e-6)


def transformers_resnet(classes=10):
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=classes)
    )


MODELS = {
    "plain": Plain,
    "timm": lambda: timm.create_model("cifar_resnet8", num_classes=10),
    "wrapped": lambda: load_student("cifar_resnet8", num_classes=10),
    "transformers": transformers_resnet,
}


@pytest.mark.parametrize("teacher_kind", MODELS)
@pytest.mark.parametrize("student_kind", MODELS)
def test_any_student_learns_from_any_teacher(student_kind, teacher_kind):
    torch.manual_seed(0)
    student, teacher = MODELS[student_kind](), MODELS[teacher_kind]()
    before = copy.deepcopy(student.state_dict())
    frozen = copy.deepcopy(teacher.state_dict())
    trainer = DistillationTrainer(
        student, teacher, config(losses=KD, max_steps=2), train_dataset=images(), eval_dataset=images(augment=False)
    )
    trainer.train()
    assert all(not torch.equal(before[name], value) for name, value in student.named_parameters())
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in trainer.teacher.model.modules())
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_top1", "eval_top5", "eval_agreement", "eval_teacher_top1"} <= metrics.keys()


def test_the_teacher_cannot_train():
    teacher = Teacher(timm.create_model("cifar_resnet8"))
    with pytest.raises(RuntimeError, match="eval mode"):
        teacher.model.train()
    with pytest.raises(RuntimeError, match="eval mode"):
        teacher.model.layer1.train()
    teacher.model.eval()
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


def test_a_teacher_in_bf16_serves_bf16_only():
    """Converting its weights once gives the very logits that autocast gives."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet8", num_classes=10).eval()
    batch = images(4).__getitems__([0, 1, 2, 3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(batch["pixel_values"]).float()
    teacher = Teacher(model)
    teacher.prepare(torch.device("cpu"), torch.bfloat16, False, layers=[0])  # with a tap its batch norms are not folded
    assert torch.equal(teacher(batch).logits, expected)
    with pytest.raises(ValueError, match="load the teacher again"):
        DistillationTrainer(Plain(), teacher, config(losses=KD), train_dataset=images())


def test_metrics_are_those_of_the_logits():
    torch.manual_seed(0)
    student, teacher, data = Plain(), Plain(), images(48, augment=False)
    trainer = DistillationTrainer(student, teacher, config(losses=KD), train_dataset=data, eval_dataset=data)
    metrics = trainer.evaluate()
    batch = data.__getitems__(list(range(48)))
    with torch.no_grad():
        logits, teacher_logits = student(batch["pixel_values"]), teacher(batch["pixel_values"])
    labels = batch["labels"]
    top5 = (logits.topk(5).indices == labels[:, None]).any(dim=1).float().mean() * 100
    assert metrics["eval_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item() * 100)
    assert metrics["eval_top5"] == pytest.approx(top5.item())
    agreement = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean().item() * 100
    assert metrics["eval_agreement"] == pytest.approx(agreement)
    teacher_top1 = (teacher_logits.argmax(1) == labels).float().mean().item() * 100
    assert metrics["eval_teacher_top1"] == pytest.approx(teacher_top1)
    assert metrics["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert trainer.evaluate()["eval_agreement"] == metrics["eval_agreement"]  # the second time from memory
    prediction = trainer.predict(data)
    np.testing.assert_allclose(prediction.predictions, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert prediction.metrics["test_top1"] == metrics["eval_top1"]


def test_every_term_is_logged_by_its_own_name():
    losses = {"kd": {"weight": 0.5}, "dkd": {}, "mlkd": {}, "ctkd": {}}
    trainer = DistillationTrainer(
        Plain(), Plain(), config(losses=losses, logit_standardization=True, max_steps=2), train_dataset=images()
    )
    trainer.train()
    log = train_logs(trainer)[0]
    terms = {name: value for name, value in log.items() if name.startswith("loss_")}
    assert set(terms) == {
        "loss_ce",
        "loss_kd",
        "loss_dkd",
        "loss_mlkd_kd",
        "loss_mlkd_class_correlation",
        "loss_mlkd_batch_correlation",
        "loss_ctkd",
    }
    assert log["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
    assert log["ctkd_temperature"] == pytest.approx(1 + 20 * torch.sigmoid(torch.tensor(1.0)).item(), rel=1e-3)
    assert log["images_per_second"] > 0


def test_a_logged_term_is_the_mean_since_the_last_log():
    def run(logging_steps):
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            Plain(), Plain(), config(losses=KD, logging_steps=logging_steps, max_steps=4), train_dataset=images(32)
        )
        trainer.train()
        return [log["loss_kd"] for log in train_logs(trainer)]

    singles, pairs = run(1), run(2)
    assert pairs == pytest.approx([(singles[0] + singles[1]) / 2, (singles[2] + singles[3]) / 2], rel=1e-5)


@pytest.mark.parametrize("losses", [KD, {"dkd": {}}, {"ctkd": {"weight": 0.9}}])
def test_gradient_accumulation_changes_nothing(losses):
    def run(batch_size, accumulation):
        torch.manual_seed(0)
        student = Plain()
        args = config(
            losses=losses,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=3,
        )
        torch.manual_seed(1)
        trainer = DistillationTrainer(student, Plain(), args, train_dataset=images(16))
        trainer.train()
        return trainer

    whole, parts = run(8, 1), run(2, 4)
    assert whole.state.global_step == parts.state.global_step == 6
    for expected, given in zip(whole.distiller.parameters(), parts.distiller.parameters(), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    for expected, given in zip(train_logs(whole), train_logs(parts), strict=True):
        assert given["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("losses", [{"ctkd": {}}, {"ctkd": {"instance_wise": True}}])
def test_what_a_loss_owns_is_trained_and_saved_but_not_shipped(losses, tmp_path):
    args = config(losses=losses, num_train_epochs=2, save_strategy="epoch", weight_decay=5e-4)
    student = load_student("cifar_resnet8", num_classes=10)
    trainer = DistillationTrainer(student, Plain(), args, train_dataset=images(32))
    before = copy.deepcopy(dict(trainer.distiller.losses.named_parameters()))
    assert before
    trainer.train()
    for name, value in trainer.distiller.losses.named_parameters():
        assert not torch.equal(value, before[name]), name
    saved = load_file(f"run/checkpoint-{trainer.state.global_step}/losses.safetensors")
    torch.testing.assert_close(saved, dict(trainer.distiller.losses.state_dict()))
    shipped = load_file(f"run/checkpoint-{trainer.state.global_step}/model.safetensors")
    assert set(shipped) == set(timm.create_model("cifar_resnet8", num_classes=10).state_dict())


def test_a_losses_own_view_of_progress():
    seen = []

    class Watch(KDLoss):
        def forward(self, student, teacher, batch):
            seen.append(batch["progress"].item())
            return super().forward(student, teacher, batch)

    args = config(num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = DistillationTrainer(Plain(), Plain(), args, train_dataset=images(16), losses={"mine": Watch()})
    trainer.train()
    assert seen == pytest.approx([0, 0, 0.5, 0.5, 1, 1, 1.5, 1.5])
    assert "loss_mine" in train_logs(trainer)[0]


def test_learning_rate_drops_after_its_milestones():
    args = config(num_train_epochs=4, lr_milestones=[1, 2.5], learning_rate=0.1)
    trainer = DistillationTrainer(Plain(), None, args, train_dataset=images(16))
    trainer.train()
    rates = [log["learning_rate"] for log in train_logs(trainer)]
    assert rates == pytest.approx([0.1] * 2 + [0.01] * 3 + [0.001] * 3)


@pytest.mark.parametrize("everywhere", [True, False])
def test_weight_decay_groups(everywhere):
    model_args = {"img_size": 32, "patch_size": 8, "depth": 1}
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=10, **model_args)
    with pytest.raises(ValueError, match="another shape at.*Pass the keywords"):
        DistillationTrainer(bare, None, config(), train_dataset=images())
    student = wrap_timm(bare, [str(i) for i in range(10)], model_args)
    args = config(losses={"ctkd": {}}, weight_decay=0.05, decay_all_parameters=everywhere)
    trainer = DistillationTrainer(student, Plain(), args, train_dataset=images())
    decayed, *free = trainer.create_optimizer(trainer.distiller).param_groups
    names = {id(value): name for name, value in trainer.distiller.named_parameters()}
    free_names = {names[id(value)] for group in free for value in group["params"]}
    assert decayed["weight_decay"] == 0.05 and len(decayed["params"]) + len(free_names) == len(names)
    if everywhere:
        assert free == []  # no group is empty
    else:
        assert [group["weight_decay"] for group in free] == [0]
        for name in ("cls_token", "pos_embed", "head.bias", "norm.weight"):
            assert f"student.timm_model.{name}" in free_names
        assert "student.timm_model.head.weight" not in free_names
        assert any(name.startswith("losses.ctkd") for name in free_names)


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_losses_are_float32(compiled):
    """Under autocast the networks run in bf16; the loss of the logits they give is exact."""
    seen = {}

    class Watch(DistillationLoss):
        def forward(self, student, teacher, batch):
            seen.update(student=student.logits.dtype, teacher=teacher.logits.dtype)
            return kd_loss(student.logits, teacher.logits, 2.0)

    args = config(bf16=True, max_steps=1, torch_compile=compiled, torch_compile_backend="eager" if compiled else None)
    trainer = DistillationTrainer(Plain(), Plain(), args, train_dataset=images(), losses={"watch": Watch()})
    trainer.train()
    assert seen == {"student": torch.float32, "teacher": torch.float32}
    logits = trainer.model(images().__getitems__([0])["pixel_values"])
    assert logits.dtype == torch.float32  # outside training no autocast is left on the student


def test_wrong_roles_are_refused():
    data = images()
    model = Plain()
    with pytest.raises(ValueError, match="need a teacher"):
        DistillationTrainer(Plain(), None, config(losses=KD), train_dataset=data)
    with pytest.raises(ValueError, match="There is nothing to train on"):
        DistillationTrainer(Plain(), None, config(ce_weight=0), train_dataset=data)
    with pytest.raises(ValueError, match="same object"):
        DistillationTrainer(model, model, config(losses=KD), train_dataset=data)
    with pytest.raises(ValueError, match="teacher has 7 classes and the student 10"):
        DistillationTrainer(Plain(10), Plain(7), config(losses=KD), train_dataset=data)
    with pytest.raises(ValueError, match="student has 4 classes and the data set 10"):
        DistillationTrainer(Plain(4), Plain(4), config(losses=KD), train_dataset=data)
    with pytest.raises(ValueError, match="student has 4 classes and the data set 6"):  # the labels of a sample
        DistillationTrainer(Plain(4), None, config(), train_dataset=Dictionaries(data))
    with pytest.raises(ValueError, match="fp16 needs an accelerator"):
        config(fp16=True)
    with pytest.raises(TypeError, match="must return logits"):
        DistillationTrainer(nn.Conv2d(3, 3, 1), None, config(), train_dataset=data)


class Dictionaries(torch.utils.data.Dataset):
    """A user's own data set: one sample at a time, one view, no index."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        return {"pixel_values": sample["pixel_values"], "labels": sample["labels"].item()}


def test_a_subset_is_augmented_anew_in_every_epoch():
    """A Subset hides the data set that must hear of the epoch, and of the second view."""
    seen = []

    class Watch(KDLoss):
        def forward(self, student, teacher, batch):
            seen.append(batch["pixel_values"][0].clone())
            return super().forward(student, teacher, batch)

    part = torch.utils.data.Subset(images(16), range(4))
    args = config(num_train_epochs=2, train_sampling_strategy="sequential")
    losses = {"mine": Watch(), "mlkd": {}}
    DistillationTrainer(Plain(), Plain(), args, train_dataset=part, losses=losses).train()
    assert len(seen) == 2 and not torch.equal(*seen)


def test_one_teacher_for_two_trainers():
    teacher, data = Plain(), images()
    for _ in range(2):
        DistillationTrainer(Plain(), teacher, config(losses=KD, max_steps=1), train_dataset=data).train()
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())


def test_ones_own_data_set():
    data = Dictionaries(images(augment=False))
    args = config(losses=KD, max_steps=2)
    trainer = DistillationTrainer(Plain(), Plain(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_agreement"] <= 100
    with pytest.raises(ValueError, match="'mlkd' needs two views"):
        DistillationTrainer(Plain(), Plain(), config(losses={"mlkd": {}}), train_dataset=data)


def test_dropping_the_last_training_batch_drops_no_test_image():
    """Trainer's own loaders drop it from evaluations, too."""
    args = config(dataloader_drop_last=True, per_device_train_batch_size=4)
    eval_set = images(6, augment=False)
    trainer = DistillationTrainer(Plain(), None, args, train_dataset=images(6), eval_dataset=eval_set)
    assert len(trainer.get_train_dataloader()) == 1
    assert trainer.predict(eval_set).predictions.shape == (6, 10)
    ranked = trainer.predict(eval_set).predictions.argmax(1)
    assert trainer.evaluate()["eval_top1"] == pytest.approx(100 * (ranked == eval_set.labels.numpy()).mean())


class Endless(torch.utils.data.IterableDataset):
    """A user's own stream, of samples."""

    def __iter__(self):
        source = images(8)
        yield from (source[i % 8] for i in range(1000))


def test_a_users_own_stream():
    """Its first samples tell classes and shapes, as those of other data sets do."""
    losses = {"ctkd": {"instance_wise": True}}
    args = config(losses=losses, max_steps=2, mixup=0.5, dataloader_drop_last=True)
    trainer = DistillationTrainer(Plain(), Plain(), args, train_dataset=Endless())
    trainer.train()
    assert trainer.state.global_step == 2 and trainer._mixup is not None
    with pytest.raises(ValueError, match="teacher has 7 classes and the student 10"):
        DistillationTrainer(Plain(), Plain(classes=7), args, train_dataset=Endless())


def test_ignored_labels_count_nowhere():
    """As an undecodable image has it: neither in what evaluate() nor in what predict() says."""
    eval_set = images(12, augment=False)
    eval_set.labels[:9] = -100  # a whole batch, and one image of the next
    trainer = DistillationTrainer(Plain(), Plain(), config(), eval_dataset=eval_set)
    logits = torch.from_numpy(trainer.predict(eval_set).predictions[9:])
    expected = torch.nn.functional.cross_entropy(logits, eval_set.labels[9:]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(eval_set).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.compute_metrics, trainer.args.prediction_loss_only = None, True
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


def test_batches_without_index_are_evaluated():
    """A user's collator may leave it out; the teacher is then asked each time."""
    eval_set = images(8, augment=False)

    def collate(samples):
        return {key: value for key, value in samples.items() if key != "index"}

    trainer = DistillationTrainer(Plain(), Plain(), config(), eval_dataset=eval_set, data_collator=collate)
    assert trainer.evaluate()["eval_agreement"] == trainer.evaluate()["eval_agreement"]
