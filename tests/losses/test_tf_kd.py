import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, Plain, config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.commands.train import check_teacher_is_used
from hfkd.losses.tf_kd import TfKDLoss, tf_kd_loss
from hfkd.networks.features import Outputs
from hfkd.recipe.reading import parse_recipe


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    """With (1 - alpha) of the cross-entropy, as released."""
    labels = new_golden.tensor("labels")
    for case, settings in new_golden.cases("tfkd_reg"):
        student, _ = new_golden.inputs()
        alpha, temperature, multiplier = (settings[key] for key in ("alpha", "T", "multiplier"))
        value = TfKDLoss(alpha, temperature, multiplier)(Outputs(student, student), None, {"labels": labels})
        value = value + (1 - alpha) * F.cross_entropy(student, labels)
        value.backward()
        new_golden.check(case, value, student=student.grad)


def test_a_high_temperature_makes_the_target_uniform():
    logits, labels = random(4, 5), torch.tensor([0, 4, 2, 2])
    uniform = F.kl_div(F.log_softmax(logits, 1), torch.full_like(logits, 0.2), reduction="none").mean()
    torch.testing.assert_close(tf_kd_loss(logits, labels, 1e6), uniform, rtol=1e-5, atol=0)
    sharp = torch.full((4, 5), 0.0025, dtype=torch.float64).scatter(1, labels[:, None], 0.99)
    assert tf_kd_loss(sharp / 0.5, labels, 0.5).abs() < 1e-12


def test_gradcheck():
    labels = torch.tensor([0, 4, 2, 2])
    assert gradcheck(lambda logits: tf_kd_loss(logits, labels, 20.0), random(4, 5).requires_grad_())


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_any_logits_give_finite_values(scale):
    logits = (scale * random(4, 5)).float().requires_grad_()
    value = tf_kd_loss(logits, torch.tensor([0, 4, 2, 2]), 20.0)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_no_teacher_is_needed():
    args = config(max_steps=2, losses={"tf_kd": {}})
    trainer = DistillationTrainer(Plain(), None, args, train_dataset=images(16), eval_dataset=images(8))
    trainer.train()
    assert train_logs(trainer)[-1]["loss_tf_kd"] > 0 and trainer.results.facts["teacher"] is None
    assert "eval_agreement" not in trainer.evaluate()


def test_the_others_still_need_one():
    args = config(losses={"tf_kd": {}, "kd": {}})
    with pytest.raises(ValueError, match=r"The losses \['kd'\] need a teacher"):
        DistillationTrainer(Plain(), None, args, train_dataset=images(8))


def test_a_teacher_beside_it_is_not_asked():
    def refuse(*arguments):
        raise AssertionError("the teacher ran in training")

    args = config(max_steps=1, losses={"tf_kd": {}})
    trainer = DistillationTrainer(Plain(), Plain(), args, train_dataset=images(8))
    trainer.teacher.model.forward = refuse
    trainer.train()


def test_both_heads_learn_the_labels():
    student = load_student("deit_tiny_distilled_patch16_224", num_classes=10, image_size=32, patch_size=8)
    trainer = DistillationTrainer(student, None, config(losses={"tf_kd": {}}), train_dataset=images(8))
    assert not trainer.distiller.two_heads


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], None),
        (["--losses.kd.temperature", "4"], r"The losses \['kd'\] need a teacher: set teacher_name_or_path"),
        (["--teacher_name_or_path", "cifar_resnet56"], "teacher_name_or_path names a teacher, and no loss learns"),
    ],
)
def test_a_recipe_names_a_teacher_if_a_loss_needs_one(overrides, message):
    recipe = ROOT / "recipes" / "cifar100" / "students" / "resnet20_tf_kd.yaml"
    model_args, _, args, _ = parse_recipe([str(recipe), "--bf16", "false", *overrides])
    if message is None:
        check_teacher_is_used(model_args, args)
        return
    with pytest.raises(ValueError, match=message):
        check_teacher_is_used(model_args, args)


def test_mixed_images_have_no_label_for_it():
    args = config(losses={"tf_kd": {}}, mixup=0.8, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="'tf_kd' needs one class for each image"):
        DistillationTrainer(Plain(), None, args, train_dataset=images(8))
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*got \(4, 5\)"):
        tf_kd_loss(random(4, 5), random(4, 5), 20.0)
