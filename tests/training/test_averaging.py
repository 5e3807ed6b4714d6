"""The moving average of the student: evaluated, exported, resumed."""

import pytest
import torch
from helpers import config, images, train_logs
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hfkd import DistillationTrainer, load_student

DECAY = 0.7


def build(output_dir="run", **changes):
    torch.manual_seed(0)
    student, teacher = (load_student(f"cifar_resnet{depth}", num_classes=10) for depth in (8, 14))
    settings = {"losses": {"kd": {}}, "ema_decay": DECAY, "num_train_epochs": 2, "save_strategy": "steps"}
    args = config(output_dir, **(settings | {"save_steps": 1, "eval_strategy": "epoch"} | changes))
    return DistillationTrainer(student, teacher, args, train_dataset=images(24), eval_dataset=images(10, augment=False))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_average_is_the_recursion_and_becomes_the_student():
    trainer = build(num_train_epochs=1)
    history = [weights(trainer.model)]
    original = trainer.average.update
    trainer.average.update = lambda model, step: (history.append(weights(model)), original(model, step))
    trainer.train()
    assert len(history) == 1 + 3
    name = "timm_model.conv1.weight"
    expected = history[0][name]
    for step, later in enumerate(history[1:]):  # timm's warm-up: at first the student itself, then ever slower
        decay = min(DECAY, 1 - (1 + step) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * later[name]
    assert not torch.allclose(expected, history[-1][name], atol=1e-4)
    torch.testing.assert_close(trainer.model.state_dict()[name], expected)


def test_evaluated_and_exported_is_the_average():
    trainer = build(eval_strategy="no", num_train_epochs=1)
    seen = []
    original = trainer.average.module.forward
    trainer.average.module.forward = lambda *args, **kwargs: (seen.append(1), original(*args, **kwargs))[1]
    student = trainer.model
    trainer.evaluate()
    assert len(seen) == 2 and trainer.model is student, "batches of 8 and 2, by the average; then the student again"
    trainer.train()
    trainer.save_model("exported")
    exported = AutoModelForImageClassification.from_pretrained("exported")
    for name, value in trainer.average.module.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value)
    kept, average = (load_file(f"run/checkpoint-3/{file}.safetensors") for file in ("training_weights", "model"))
    assert kept.keys() == average.keys()
    assert not torch.equal(kept["conv1.weight"], average["conv1.weight"])


@pytest.mark.parametrize("resume_at", [3, 4])
def test_resumed_is_identical(resume_at):
    whole = build("whole")
    whole.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=f"whole/checkpoint-{resume_at}")
    expected, given = weights(whole.model), weights(resumed.model)
    assert [name for name in expected if not torch.equal(expected[name], given[name])] == []
    for file in ("training_weights", "model"):
        expected, given = (load_file(f"{run}/checkpoint-6/{file}.safetensors") for run in ("whole", "resumed"))
        assert [name for name in expected if not torch.equal(expected[name], given[name])] == []


def test_the_best_average_is_loaded_at_the_end():
    trainer = build(load_best_model_at_end=True, save_strategy="epoch")
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    for model in (trainer.model, trainer.average.module):
        state = model.timm_model.state_dict()
        assert [name for name in best if not torch.equal(best[name], state[name])] == []


def test_tapped_layers_and_two_heads_go_with_an_average():
    torch.manual_seed(0)
    student = load_student("deit_tiny_distilled_patch16_224", num_classes=10, image_size=32, patch_size=16)
    teacher = load_student("cifar_resnet8", num_classes=10)
    losses = {"kd": {}, "locality_guidance": {"student_layers": [0], "teacher_layers": [1]}}
    args = config(losses=losses, ema_decay=DECAY, bf16=True)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=images(8), eval_dataset=images(4))
    before = weights(trainer.average.module)
    trainer.train()
    after = weights(trainer.model)
    assert {"loss_kd", "loss_locality_guidance"} <= train_logs(trainer)[0].keys()
    for head in ("head", "head_dist"):  # both have moved, and so has their average over the steps
        assert not torch.equal(before[f"timm_model.{head}.weight"], after[f"timm_model.{head}.weight"])


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_clear_error(decay):
    with pytest.raises(ValueError, match="ema_decay must be between 0 and 1"):
        config(ema_decay=decay)
