"""`torch_compile: auto`: what is measured, what is chosen, and that a resumed run keeps it."""

import json

import pytest
import torch
from helpers import Plain, config, images, train_logs

from hfkd import DistillationConfig, DistillationTrainer
from hfkd.commands.train import distill
from hfkd.errors import HfkdError
from hfkd.losses import DistillationLoss
from hfkd.training import compiling

STEPS = 12
COMPILED = (5, 6, 7)  # the measured steps, one to warm up and two; before them come four eager ones


class Tell(DistillationLoss):
    """1 in a compiled step, 0 in an eager one."""

    def forward(self, student, teacher, batch):
        return 0 * (student.logits * teacher.logits).mean() + (1.0 if torch.compiler.is_compiling() else 0.0)


@pytest.fixture
def run(monkeypatch):
    """Train 12 steps on a clock where they take given seconds."""
    monkeypatch.setattr(compiling, "WARM_UP", 1)
    monkeypatch.setattr(compiling, "MEASURED", 2)

    def trained(eager, compiled=0.0, first=0.0, output_dir="run", resume=None, setting="auto"):
        now, kinds = [0.0], [False]
        torch.manual_seed(0)
        args = config(
            output_dir,
            max_steps=STEPS,
            eval_strategy="steps",
            eval_steps=STEPS,
            save_strategy="steps",
            save_steps=2,
            torch_compile=setting,
            torch_compile_backend="eager" if setting else None,
        )
        data = images(96)
        trainer = DistillationTrainer(
            Plain(), Plain(), args, train_dataset=data, eval_dataset=images(10), losses={"tell": Tell(), "kd": {}}
        )

        def mark(device):
            kinds.append(trainer.compile_choice.compiled)
            now[0] += (compiled if kinds[-2] else first + compiled) if kinds[-1] else eager
            return now[0]

        monkeypatch.setattr(compiling, "_mark", mark)
        trainer.train(resume_from_checkpoint=resume)
        steps = {entry["step"]: entry["loss_tell"] for entry in train_logs(trainer)}
        chosen = json.loads((trainer.export_folder.parent / "results.json").read_text()).get("torch_compile", "none")
        return trainer, [step for step in steps if steps[step] == 1], chosen

    return trained


def check_same_student(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_it_pays(run, capsys):
    trainer, compiled, chosen = run(eager=100.0, compiled=40.0, first=150.0)
    assert compiled == [*COMPILED, 8, 9, 10, 11, 12]
    assert chosen == {
        "compiled": True,
        "eager_seconds": 100.0,
        "compiled_seconds": 40.0,
        "compiling_seconds": 150.0,
        "saved_seconds": 5 * 60.0,
    }
    line = "a step takes 100,000.0 ms eager and 40,000.0 ms compiled. Compiling took 150 s, and saves "
    assert (
        f"torch_compile auto: {line}300 s over the 5 steps left. Training goes on compiled." in capsys.readouterr().out
    )
    assert trainer.teacher.model._compiled_call_impl is not None

    resumed, compiled, again = run(eager=1.0, output_dir="resumed", resume="run/checkpoint-10")
    assert compiled == [5, 6, 7, 8, 9, 10, 11, 12] and again == chosen, "not measured again: the first ten are its log"
    assert resumed.teacher.model._compiled_call_impl is not None
    check_same_student(trainer, resumed)
    _, compiled, again = run(eager=100.0, compiled=40.0, output_dir="early", resume="run/checkpoint-2")
    assert compiled == [7, 8, 9, 10, 11, 12] and again["saved_seconds"] == 3 * 60.0, "measured from there"


@pytest.mark.parametrize("compiled, first", [(40.0, 350.0), (101.0, 0.0)], ids=["takes too long", "is slower"])
def test_it_does_not_pay(run, capsys, compiled, first):
    trainer, steps, chosen = run(eager=100.0, compiled=compiled, first=first)
    assert steps == [*COMPILED] and chosen["compiled"] is False
    assert chosen["compiling_seconds"] == first and chosen["saved_seconds"] == 5 * (100.0 - compiled)
    assert "over the 5 steps left. Training goes on eager." in capsys.readouterr().out
    assert trainer.teacher.model._compiled_call_impl is None


def test_a_short_training_is_not_compiled(run, capsys):
    trainer, steps, chosen = run(eager=1.0)
    assert steps == [] and chosen == {"compiled": False, "eager_seconds": 1.0}
    assert "and 8 are left: too few for compiling to pay" in capsys.readouterr().out
    eager, _, chosen = run(eager=1.0, output_dir="eager", setting=False)
    assert chosen == "none"
    check_same_student(trainer, eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_is_measured_without_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        marks = [compiling._mark(torch.device("cuda")) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 <= seconds < 1 for seconds in compiling._seconds_between(marks))


def test_other_words_are_refused():
    with pytest.raises(HfkdError, match="torch_compile must be true, false or auto, got 'maybe'"):
        DistillationConfig("run", torch_compile="maybe")
    with pytest.raises(HfkdError, match="argument --torch_compile: must be true, false or auto, got 'maybe'"):
        distill(["cifar100/resnet56-resnet20/kd", "--torch_compile", "maybe"])
