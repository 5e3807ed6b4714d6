import pytest
import timm
import torch
from helpers import Plain, config, images
from torch import nn
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.cat_kd import CATKDLoss, cat_kd_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_feature_golden):
    teacher_map = new_feature_golden.tensor("teacher_map_2")
    teacher_weight = new_feature_golden.tensor("cat_kd/teacher_classifier")
    for case, settings in new_feature_golden.cases("cat_kd"):
        student_map = new_feature_golden.tensor("cat_kd/student_map").clone().requires_grad_()
        student_weight = new_feature_golden.tensor("cat_kd/student_classifier").clone().requires_grad_()
        compared = int(settings["resolution"]), bool(settings["normalize"])
        value = cat_kd_loss(student_map, student_weight, teacher_map, teacher_weight, *compared)
        value.backward()
        new_feature_golden.check(case, value, student_map=student_map.grad, student_classifier=student_weight.grad)


def test_the_whole_map_is_the_difference_of_logits_without_biases():
    student_map, teacher_map, own, other = random(2, 3, 4, 4), random(2, 5, 2, 2), random(6, 3), random(6, 5, seed=1)
    logits = student_map.mean((2, 3)) @ own.T, teacher_map.mean((2, 3)) @ other.T
    value = cat_kd_loss(student_map, own, teacher_map, other, 1, False)
    torch.testing.assert_close(value, (logits[0] - logits[1]).square().mean())


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize):
    inputs = random(2, 3, 4, 4).requires_grad_(), random(6, 3, seed=1).requires_grad_()
    teacher = random(2, 5, 4, 4, seed=2), random(6, 5, seed=3)
    assert gradcheck(lambda *student: cat_kd_loss(*student, *teacher, 2, normalize), inputs)


def test_maps_of_zeros_have_moderate_gradients():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = cat_kd_loss(student, random(6, 3).float(), torch.zeros(2, 3, 4, 4), random(6, 3).float(), 2, True)
    value.backward()
    assert value == 0 and student.grad.abs().max() < 10


def test_the_students_classifier_learns_from_it():
    """Without its bias, and without cross-entropy."""
    student, teacher = (load_student("cifar_resnet8", num_classes=10) for _ in range(2))
    before = {name: value.detach().clone() for name, value in student.timm_model.fc.named_parameters()}
    args = config(max_steps=1, ce_weight=0.0, losses={"cat_kd": {}}, weight_decay=0.0)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=images(8))
    trainer.train()
    assert not torch.equal(student.timm_model.fc.weight, before["weight"])
    assert torch.equal(student.timm_model.fc.bias, before["bias"])
    assert [name for name in trainer.distiller.state_dict() if "classifier" in name] == []


def test_clear_errors():
    with pytest.raises(ValueError, match="resolution is 0: give a whole number, 1 or above"):
        CATKDLoss(resolution=0)
    with pytest.raises(ValueError, match="classifiers of 6 and 5 classes"):
        cat_kd_loss(random(2, 3, 4, 4), random(6, 3), random(2, 3, 4, 4), random(5, 3), 2, False)


def refuses(message, student=None, teacher=None):
    networks = [network or load_student("cifar_resnet8", num_classes=10) for network in (student, teacher)]
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(*networks, config(losses={"cat_kd": {}}), train_dataset=images(8))


def test_both_networks_average_a_map_for_one_linear_layer():
    refuses("Plain has no module that averages its last map", student=Plain())
    deit = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=1)
    refuses("has no module that averages its last map", teacher=deit)

    class Normed(nn.Module):
        """With a norm between the average and the classifier, as ConvNeXt has."""

        def __init__(self, heads=1):
            super().__init__()
            self.conv, self.global_pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
            self.norm, self.heads = nn.LayerNorm(8), nn.ModuleList(nn.Linear(8, 10) for _ in range(heads))

        def forward(self, pixel_values):
            pooled = self.global_pool(self.conv(pixel_values)).flatten(1)
            return sum(head(self.norm(pooled)) for head in self.heads)

    refuses("losses.cat_kd: the student's classifier reads an embedding .* not the average", student=Normed())
    refuses("losses.cat_kd: the teacher's classifier reads an embedding .* not the average", teacher=Normed())
    refuses("losses.cat_kd: this student's logits do not come from one linear layer", student=Normed(heads=2))
    refuses("losses.cat_kd: this teacher's logits do not come from one linear layer", teacher=Normed(heads=2))
