"""What a run says of its teacher before it learns from it."""

import pytest
import timm
import torch
from helpers import Plain, config, images
from safetensors.torch import save_file
from torch.utils.data import Dataset

from hfkd import DistillationTrainer, load_student, load_teacher
from hfkd.commands.build import load_teachers
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.features import InputSpec
from hfkd.recipe.arguments import ModelArguments
from hfkd.runs.finished import teacher_of


class Constant(Plain):
    """Gives every image of a range of classes its own class: images are told apart by their brightness."""

    def __init__(self, right):
        super().__init__()
        self.right, self.calls = right, 0

    def forward(self, pixel_values):
        self.calls += 1
        brightness = pixel_values.mean(dim=(1, 2, 3)) + super().forward(pixel_values)[:, 0].detach() * 0
        order = brightness.argsort().argsort()  # of ten images, one of each class
        classes = torch.where(order < self.right, order, (order + 1) % 10)
        return torch.nn.functional.one_hot(classes, 10).float()


class Foreign(Dataset):
    """A data set that is not from hfkd.data, so that nothing of it is remembered."""

    def __init__(self):
        self.source = images(10, augment=False)

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {key: value for key, value in self.source[i].items() if key != "index"}


def trained(right, eval_dataset=None, **changes):
    torch.manual_seed(0)
    settings = {"losses": {"kd": {}}, "num_train_epochs": 2, "eval_strategy": "epoch", "per_device_eval_batch_size": 10}
    data = {"train_dataset": images(16), "eval_dataset": eval_dataset or images(10, augment=False)}
    trainer = DistillationTrainer(Plain(), Constant(right), config(**settings | changes), **data)
    begun = trainer.teacher.model.calls
    trainer.train()
    trainer.evaluations = trainer.teacher.model.calls - begun - 4  # two steps an epoch
    return trainer


@pytest.mark.parametrize("right, warned", [(8, False), (1, True)])
def test_its_top1_is_printed_before_the_first_epoch(right, warned, capsys, caplog):
    trainer = trained(right)
    told = capsys.readouterr().out
    line = f"The teacher Constant has a top-1 of {10.0 * right:.2f} on the evaluation images."
    assert told.count(line) == 1 and told.index(line) < told.index("'loss'")
    assert trainer.results.rows[0]["eval_teacher_top1"] == pytest.approx(10.0 * right)
    assert trainer.evaluations == 1, "what it says of the images is remembered"
    assert ("near chance, 10. Check that it is shown images as in its own training" in caplog.text) == warned


def test_of_other_data_sets_it_is_known_after_the_first_evaluation(capsys):
    trained(8, Foreign())
    told = capsys.readouterr().out
    assert told.count("has a top-1 of 80.00") == 1 and told.index("'loss'") < told.index("has a top-1 of 80.00")


def test_a_student_above_its_teacher_is_told_once(caplog):
    torch.manual_seed(0)
    args = config(losses={"kd": {}}, num_train_epochs=2, eval_strategy="epoch")
    metrics = {"top1": 60.0, "teacher_top1": 45.0, "loss": 1.0}
    data = {"train_dataset": images(8), "eval_dataset": images(10, augment=False)}
    DistillationTrainer(Plain(), Constant(5), args, compute_metrics=lambda prediction: metrics, **data).train()
    assert caplog.text.count("The student's top-1, 60.00, is above its teacher's, 45.00.") == 1


def test_the_training_does_not_depend_on_the_report(monkeypatch):
    expected = trained(8).model.state_dict()
    monkeypatch.setattr(DistillationTrainer, "teacher_top1", lambda self: None)
    given = trained(8).model.state_dict()
    assert all(torch.equal(expected[name], given[name]) for name in expected)


def test_the_input_of_a_teacher_from_a_file():
    save_file(load_student("cifar_resnet8", num_classes=10).timm_model.state_dict(), "weights.safetensors")
    own = load_teacher("cifar_resnet8", "weights.safetensors").input_spec
    assert own == InputSpec(32, CIFAR_MEAN, CIFAR_STD)
    keys = {"teacher_name_or_path": "cifar_resnet8", "teacher_checkpoint": "weights.safetensors"}
    image = {"teacher_image_size": 16, "teacher_image_mean": [0.5] * 3, "teacher_image_std": [0.25] * 3}
    arguments = ModelArguments("cifar_resnet8", **keys, **image)
    expected = InputSpec(16, (0.5,) * 3, (0.25,) * 3)
    assert load_teachers(arguments)[0].input_spec == expected
    again = ModelArguments("cifar_resnet8", **teacher_of(keys | image).settings)  # as `visualize` takes it from a run
    assert load_teachers(again)[0].input_spec == expected
    assert load_teacher("cifar_resnet8", "weights.safetensors").input_spec == own


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"teacher_checkpoint": None},
            "teacher_image_size describes the one network in teacher_checkpoint, .* 0",
        ),
        ({"teacher_image_mean": [0.5]}, "teacher_image_mean needs three numbers, for red, green and blue, got 1"),
        ({"teacher_image_std": [0.0] * 3}, "teacher_image_std must be above 0"),
    ],
)
def test_an_input_that_is_none(changes, message):
    keys = {"teacher_name_or_path": "cifar_resnet8", "teacher_checkpoint": "weights.safetensors"}
    with pytest.raises(ValueError, match=message):
        ModelArguments("cifar_resnet8", **keys | {"teacher_image_size": 16} | changes)


def test_a_size_that_the_architecture_does_not_take():
    save_file(timm.create_model("test_vit").state_dict(), "vit.safetensors")
    with pytest.raises(ValueError, match="teacher_image_size is 64, and test_vit takes images of 160 pixels only"):
        load_teacher("test_vit", "vit.safetensors", image_size=64)
