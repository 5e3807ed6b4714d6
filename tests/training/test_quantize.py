"""Training in simulated int8: resumes to the bit, learns, holds its ranges; what is refused."""

from pathlib import Path

import pytest
import torch
from helpers import config, images, train_logs

from hfkd import DistillationTrainer, load_student
from hfkd.errors import HfkdError
from hfkd.networks.int8 import is_int8
from hfkd.recipe.reading import parse_recipe


def seen(name):
    """A student whose batch norms have seen a few images."""
    model = load_student(name, num_classes=10)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return model


def trainer(folder, **changes):
    torch.manual_seed(0)
    settings = {"quantize": "int8", "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}
    return DistillationTrainer(
        seen("cifar_resnet8"),
        args=config(folder, **(settings | changes)),
        train_dataset=images(16),
        eval_dataset=images(16, augment=False),
    )


def test_resuming_to_the_bit(tmp_path):
    whole = trainer(tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    after = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, after[name]), name
        still = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, before[name]) == still, name
    held = trainer(tmp_path / "half", max_steps=1, save_strategy="no")
    assert is_int8(held.model)


@pytest.mark.parametrize("key", ["fsdp", "deepspeed", "torch_compile", "gradient_checkpointing", "bf16_full_eval"])
def test_what_does_not_go_with_it(key):
    with pytest.raises(HfkdError, match=f"quantize is not supported with {key}"):
        config(quantize="int8", **{key: True})


def test_a_tenth_of_the_recipe():
    recipe = ["cifar100/base", "--student", "cifar_resnet8", "--dataset_name", "digits"]
    original, shortened = parse_recipe(recipe)[2], parse_recipe([*recipe, "--quantize", "int8"])[2]
    assert shortened.num_train_epochs == pytest.approx(original.num_train_epochs / 10)
    assert shortened.learning_rate == pytest.approx(original.learning_rate / 10)
    assert shortened.lr_milestones == pytest.approx([each / 10 for each in original.lr_milestones])
    given = parse_recipe([*recipe, "--quantize", "int8", "--num_train_epochs", "24", "--learning_rate", "0.3"])[2]
    assert (given.num_train_epochs, given.learning_rate) == (24, 0.3)
    for steps, fewer in ((500, 50), (0.05, 0.05)):
        Path("own.yaml").write_text(
            f"student_name_or_path: cifar_resnet8\ndataset_name: digits\nwarmup_steps: {steps}\n"
        )
        assert parse_recipe(["own.yaml", "--quantize", "int8"])[2].warmup_steps == fewer


def test_a_student_with_random_weights(tmp_path):
    from hfkd.commands.train import distill

    recipe = ["cifar100/base", "--student", "cifar_resnet8", "--dataset_name", "digits"]
    with pytest.raises(HfkdError, match="cifar_resnet8 has random weights"):
        distill([*recipe, "--quantize", "int8", "--output_dir", str(tmp_path / "run")])
    student, args = load_student("cifar_resnet8", num_classes=10), config(tmp_path / "run", quantize="int8")
    with pytest.raises(HfkdError, match="batch norms of this one have seen no image"):
        DistillationTrainer(student, args=args, train_dataset=images(16))


def test_a_student_for_int8_in_another_run(tmp_path):
    student = trainer(tmp_path / "int8").model
    with pytest.raises(HfkdError, match="was trained for int8"):
        DistillationTrainer(student, args=config(tmp_path / "float"), train_dataset=images(16))
    evaluated = DistillationTrainer(student, args=config(tmp_path / "eval"), eval_dataset=images(16, augment=False))
    assert "eval_top1" in evaluated.evaluate()


def test_a_loss_that_rebuilds_the_student(tmp_path):
    with pytest.raises(HfkdError, match="the loss 'simkd' gives it a new projector"):
        trainer(tmp_path / "simkd", losses={"simkd": {}})


def test_features_average_and_bf16(tmp_path):
    torch.manual_seed(1)
    losses = {"fitnet": {}, "kd": {"temperature": 4.0}}
    settings = {"losses": losses, "logit_standardization": True, "ema_decay": 0.5, "bf16": True, "quantize": "int8"}
    run = DistillationTrainer(
        seen("cifar_resnet8"),
        load_student("cifar_resnet14", num_classes=10),
        config(tmp_path, **settings),
        train_dataset=images(16),
        eval_dataset=images(16, augment=False),
    )
    first = run.model.timm_model.conv1.weight.clone()
    run.train()
    assert not torch.equal(run.model.timm_model.conv1.weight, first)
    assert all(f"loss_{name}" in train_logs(run)[0] for name in losses)
