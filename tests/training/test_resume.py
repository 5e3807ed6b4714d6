"""A run that was cut short and resumed ends bit for bit where the undisturbed one ends."""

import pytest
import torch
from helpers import Plain, config, images, train_logs
from transformers import ViTConfig, ViTForImageClassification

from hfkd import DistillationTrainer, load_student

METHODS = {
    "kd": {"kd": {}},
    "ctkd": {"ctkd": {"weight": 0.9}},
    "ctkd_instance": {"ctkd": {"instance_wise": True}},
    "mlkd": {"mlkd": {}},
    "dkd": {"dkd": {"warmup_epochs": 3}},
    "crd": {"kd": {}, "crd": {"negatives": 20, "dimension": 16}},  # memories, and negatives drawn in every step
}


def build(output_dir, losses, **changes):
    torch.manual_seed(0)
    student = load_student("cifar_resnet8", num_classes=10)
    teacher = load_student("cifar_resnet14", num_classes=10)
    settings = {
        "losses": losses,
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_milestones": [2],
        "weight_decay": 5e-4,
        "decay_all_parameters": True,
    }
    args = config(output_dir, **(settings | changes))
    return DistillationTrainer(student, teacher, args, train_dataset=images(24), eval_dataset=images(10, augment=False))


@pytest.mark.parametrize(
    "method, changes, resume_at",
    [
        ("kd", {}, 6),  # at the end of an epoch
        ("kd", {}, 4),  # in the middle of one
        ("kd", {"gradient_accumulation_steps": 2}, 3),
        ("kd", {"bf16": True}, 4),
        ("kd", {"optim": "adamw_torch", "optim_args": None}, 4),
        ("ctkd", {}, 4),
        ("ctkd_instance", {}, 4),
        ("mlkd", {}, 4),
        ("dkd", {}, 4),
        ("crd", {}, 4),
    ],
)
def test_resumed_is_identical(method, changes, resume_at):
    whole = build("whole", METHODS[method], **changes)
    whole.train()
    resumed = build("resumed", METHODS[method], **changes)
    resumed.train(resume_from_checkpoint=f"whole/checkpoint-{resume_at}")

    assert resumed.state.global_step == whole.state.global_step > resume_at
    expected, given = whole.distiller.state_dict(), resumed.distiller.state_dict()
    assert expected.keys() == given.keys()
    assert [name for name in expected if not torch.equal(expected[name], given[name])] == []
    assert resumed.state.best_metric == whole.state.best_metric
    after = [entry["loss"] for entry in train_logs(whole) if entry["step"] > resume_at]
    assert [entry["loss"] for entry in train_logs(resumed) if entry["step"] > resume_at] == after


def build_vit(output_dir):
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student = ViTForImageClassification(ViTConfig(**settings, image_size=32, patch_size=8, num_labels=10))
    args = config(output_dir, losses={"kd": {}}, num_train_epochs=2, save_strategy="steps", save_steps=1)
    return DistillationTrainer(student, Plain(), args, train_dataset=images(16))


def test_a_vit_of_transformers():
    """transformers saves it under former names of its parameters, unless told otherwise."""
    whole, resumed = build_vit("whole"), build_vit("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint="whole/checkpoint-3")
    expected = whole.model.state_dict()
    loaded = ViTForImageClassification.from_pretrained("whole/checkpoint-4").state_dict()
    for given in (resumed.model.state_dict(), loaded):
        assert [name for name in expected if not torch.equal(expected[name], given[name])] == []


def test_a_checkpoint_of_another_student():
    """Trainer would warn and go on with what fits."""
    build_vit("vit").train()
    other = DistillationTrainer(Plain(), Plain(), config("vit", losses={"kd": {}}), train_dataset=images(16))
    with pytest.raises(ValueError, match="not this student's, which has no parameter '.*', nor 23 others"):
        other.train(resume_from_checkpoint="vit/checkpoint-1")
