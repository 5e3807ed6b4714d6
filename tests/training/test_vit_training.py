"""Vision transformers in the trainer: two heads, what is decayed, the schedule, guidance."""

import pytest
import timm
import torch
from helpers import config, images, train_logs
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hfkd import DistillationTrainer, load_student
from hfkd.networks.wrapping import wrap_timm

METHODS = {
    "kd": {"kd": {}},
    "dkd": {"dkd": {"warmup_epochs": 0}},
    "mlkd": {"mlkd": {}},
    "ctkd": {"ctkd": {}},
    "ctkd_instance": {"ctkd": {"instance_wise": True}},
}
GUIDANCE = {"locality_guidance": {"student_layers": [0, 6, 11], "teacher_layers": [1, 2, 3]}}
SMALL_GUIDANCE = {"locality_guidance": {"student_layers": [0, 1], "teacher_layers": [1, 3]}}


def deit(name="deit_tiny_distilled_patch16_224"):
    torch.manual_seed(0)
    return load_student(name, num_classes=10, image_size=32, patch_size=16)


def small_deit():
    """With two of the twelve blocks: enough where only its heads matter."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 48, "num_heads": 2}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **shape)
    return wrap_timm(model, list(map(str, range(10))), shape)


def teacher():
    return timm.create_model("cifar_resnet8", num_classes=10)


def gradients(losses, standardization, ce_weight):
    """Of both heads of a distilled DeiT after one backward pass; an earlier trainer has kept them apart."""
    student = small_deit()
    DistillationTrainer(student, teacher(), config(losses={"kd": {}}), train_dataset=images(8))
    torch.manual_seed(0)
    args = config(losses=losses, logit_standardization=standardization, ce_weight=ce_weight)
    trainer = DistillationTrainer(student, teacher(), args, train_dataset=images(8))
    student.train()
    trainer.compute_loss(trainer.distiller, trainer.train_dataset.__getitems__(range(8))).backward()
    inner = student.timm_model
    return [head.weight.grad for head in (inner.head, inner.head_dist)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("standardization", [False, True])
def test_each_head_learns_from_its_own_loss(method, standardization):
    """The class head's gradient is that of the cross-entropy, the distillation head's does not know of it."""
    once, twice = (gradients(METHODS[method], standardization, ce_weight) for ce_weight in (1.0, 2.0))
    torch.testing.assert_close(twice[0], 2 * once[0])
    torch.testing.assert_close(twice[1], once[1])
    assert once[0].abs().sum() > 0 and once[1].abs().sum() > 0


def test_a_class_head_that_nothing_trains_is_refused():
    with pytest.raises(ValueError, match="ce_weight is 0.*evaluation averages both heads"):
        gradients({"kd": {}}, False, ce_weight=0.0)


def test_without_a_loss_on_logits_both_heads_learn_the_labels():
    """Else the distillation head would stay as it was made, and evaluation averages it in."""
    for losses in ({}, SMALL_GUIDANCE):
        assert all(gradient.abs().sum() > 0 for gradient in gradients(losses, False, ce_weight=1.0))


def test_guidance_composes_with_kd_and_moves_its_projectors():
    args = config(losses={"kd": {"weight": 2.0}, **GUIDANCE}, logit_standardization=True, bf16=True)
    trainer = DistillationTrainer(deit(), teacher(), args, train_dataset=images(16))
    before = {name: value.clone() for name, value in trainer.distiller.losses.state_dict().items()}
    assert [tuple(before[f"locality_guidance.projectors.{i}.weight"].shape) for i in range(3)] == [
        (16, 192, 1, 1),
        (32, 192, 1, 1),
        (64, 192, 1, 1),
    ]
    trainer.train()
    after = trainer.distiller.losses.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert {"loss_ce", "loss_kd", "loss_locality_guidance"} <= train_logs(trainer)[0].keys()


def test_guidance_with_compile():
    """The hooks that tap the layers survive torch.compile."""
    settings = {"losses": SMALL_GUIDANCE, "max_steps": 2}
    eager = DistillationTrainer(small_deit(), teacher(), config("eager", **settings), train_dataset=images(16))
    eager.train()
    args = config("compiled", **settings, torch_compile=True, torch_compile_backend="eager")
    torch.manual_seed(0)
    compiled = DistillationTrainer(small_deit(), teacher(), args, train_dataset=images(16))
    compiled.train()
    for log, expected in zip(train_logs(compiled), train_logs(eager), strict=True):
        assert log["loss_ce"] == pytest.approx(expected["loss_ce"], rel=1e-4)
        assert log["loss_locality_guidance"] > 0


@pytest.mark.parametrize(
    "name, exempt",
    [
        ("deit_tiny_distilled_patch16_224", {"cls_token", "dist_token", "pos_embed"}),
        ("pit_ti_224", {"cls_token", "pos_embed"}),
        ("pvt_tiny", {"cls_token", *(f"pos_embed{stage}" for stage in range(1, 5))}),
        ("t2t_vit_7", {"cls_token"}),
        ("convit_tiny", {"cls_token", "pos_embed"}),
        ("pvt_v2_b0", set()),
    ],
)
def test_what_is_not_decayed(name, exempt):
    """Norms, biases, tokens and position embeddings; every matrix and kernel is."""
    student = load_student(name, num_classes=10, image_size=64)
    trainer = DistillationTrainer(student, None, config(weight_decay=0.05), train_dataset=images(4, size=64))
    decayed = set(trainer.get_decay_parameter_names(trainer.distiller))
    parameters = dict(trainer.distiller.named_parameters())
    prefix = "student.timm_model."
    matrices = {key for key, module in trainer.distiller.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert {f"{key}.weight" for key in matrices} <= decayed
    left = {key.removeprefix(prefix) for key in parameters.keys() - decayed if parameters[key].ndim > 1}
    assert left == exempt
    assert all(parameters[key].ndim > 1 for key in decayed)


def test_what_is_not_decayed_in_a_transformers_vit():
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=10
    )
    trainer = DistillationTrainer(ViTForImageClassification(vit), None, config(), train_dataset=images(4))
    decayed = set(trainer.get_decay_parameter_names(trainer.distiller))
    left = {key for key, value in trainer.distiller.named_parameters() if value.ndim > 1} - decayed
    assert left == {"student.vit.embeddings.cls_token", "student.vit.embeddings.position_embeddings"}


def test_warm_up_then_cosine_to_a_floor():
    """The protocol's schedule: from 5e-7 to 5e-4, then to 5e-6."""
    args = config(
        optim="adamw_torch",
        optim_args=None,
        learning_rate=5e-4,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 5e-6, "warmup_lr_rate": 1e-3},
        warmup_steps=0.25,
        num_train_epochs=20,
        per_device_train_batch_size=2,
    )
    trainer = DistillationTrainer(load_student("cifar_resnet8", num_classes=10), None, args, train_dataset=images(8))
    trainer.train()
    rates = [log["learning_rate"] for log in train_logs(trainer)]
    assert len(rates) == 80
    assert 5e-7 <= rates[0] < 5e-5 and max(rates) == pytest.approx(5e-4, rel=1e-3)
    assert rates.index(max(rates)) in (19, 20) and rates[-1] == pytest.approx(5e-6, rel=0.2)
    assert all(later > earlier for earlier, later in zip(rates[:19], rates[1:20], strict=True))
    assert all(later < earlier for earlier, later in zip(rates[21:], rates[22:], strict=False))


def test_z_score_on_a_zero_initialised_head_does_not_blow_up():
    """After a warm-up's first tiny step such a head's logits differ by about 1e-6, and the Z-score would scale the
    second step's gradients by its inverse; load_student wakes the head of timm's Mixer."""
    torch.manual_seed(0)
    student = load_student("mixer_s32_224", num_classes=10, image_size=32)
    args = config(
        losses={"kd": {"temperature": 2.0, "weight": 9.0}},
        logit_standardization=True,
        optim="adamw_torch",
        optim_args=None,
        learning_rate=5e-7,
        max_grad_norm=1e9,  # has Trainer log the norm
    )
    trainer = DistillationTrainer(student, teacher(), args, train_dataset=images(32))
    trainer.train()
    norms = [log["grad_norm"] for log in train_logs(trainer)]
    assert len(norms) == 4 and max(norms) < 5 * norms[0]


def test_z_score_on_a_head_at_exactly_zero():
    """The user's own: the first step has the gradients of unscaled logits."""
    student = deit()
    for head in (student.timm_model.head, student.timm_model.head_dist):
        nn.init.zeros_(head.weight)
    args = config(losses={"kd": {"weight": 9.0}}, logit_standardization=True, max_grad_norm=1e9, max_steps=1)
    trainer = DistillationTrainer(student, teacher(), args, train_dataset=images(8))
    trainer.train()
    assert train_logs(trainer)[0]["grad_norm"] < 1e3
