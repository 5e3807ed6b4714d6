"""The parts that the trainer holds, each used without a Trainer."""

import gc
import json
import subprocess
import sys
import weakref
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, Plain, config, images
from torch import nn

from hfkd import DistillationTrainer, load_student
from hfkd.errors import HfkdError, RunError
from hfkd.networks.teacher import Teacher
from hfkd.runs.checkpoints import defect, write_manifest
from hfkd.training.backends import FullyShardedDataParallel, OneDevice, ZeroRedundancy, backend_of
from hfkd.training.checkpoints import Checkpoints, changed_for_now
from hfkd.training.evaluation import TeacherMemory, mean_cross_entropy, ranked_predictions
from hfkd.training.exports import Exports
from hfkd.training.loaders import first_images, first_set
from hfkd.training.optimization import decayed_parameter_names, lomo_looked_up_once, multi_step_schedule
from hfkd.training.pushes import Pushes
from hfkd.training.results import ResultsWriter
from hfkd.training.term_log import TermLog


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


# ---- The log of terms ----------------------------------------------------------------------------------------------


def batch_of_terms(ce, kd):
    return {"loss_ce": torch.tensor(ce, requires_grad=True), "loss_kd": torch.tensor(kd)}


def test_terms_are_averaged_over_steps(accelerator):
    log = TermLog()
    total = log.add(batch_of_terms(1.0, 2.0), images=8)
    assert total.item() == 3.0 and total.requires_grad
    log.add(batch_of_terms(3.0, 6.0), images=4)
    logs = log.drain(accelerator, {"kd_temperature": torch.tensor(4.0)}, {"skipped_images": 1})
    speed = logs.pop("images_per_second")
    assert logs == {"loss_ce": 2.0, "loss_kd": 4.0, "kd_temperature": 4.0, "skipped_images": 1} and speed > 0
    assert log.steps == log.images == 0 and log.sums is None


def test_an_evaluation_is_left_out_of_the_speed(accelerator):
    log = TermLog()
    log.add(batch_of_terms(1.0, 2.0), images=100)
    log.leave_out(-1000.0)  # as if the clock had started that much earlier
    assert log.drain(accelerator, {}, {})["images_per_second"] < 0.2


def test_sums_survive_a_checkpoint(accelerator):
    log = TermLog()
    assert log.state(accelerator, torch.tensor(0.0), 0) == {}
    log.add(batch_of_terms(1.0, 2.0), images=8)
    state = json.loads(json.dumps(log.state(accelerator, torch.tensor(3.0), 5)))
    assert state == {"since": 5, "count": 1, "terms": ["loss_ce", "loss_kd"], "sums": [[3.0, 1.0, 2.0]]}
    resumed = TermLog()
    assert resumed.restore(state, 0, 1, torch.device("cpu")).item() == 3.0
    resumed.add(batch_of_terms(3.0, 6.0), images=8)
    assert resumed.drain(accelerator, {}, {})["loss_kd"] == 4.0


def test_another_number_of_processes_takes_the_mean():
    state = {"since": 0, "count": 1, "terms": ["loss_ce"], "sums": [[2.0, 2.0], [4.0, 4.0]]}
    for process, expected in ((0, 2.0), (1, 4.0)):
        assert TermLog().restore(state, process, 2, torch.device("cpu")).item() == expected
    assert TermLog().restore(state, 0, 3, torch.device("cpu")).item() == 3.0


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_asked_once_for_each_image():
    asked = []
    teacher = Teacher(Plain())
    teacher.model.register_forward_hook(lambda *args: asked.append(len(args[1][0])))
    data = images(6, augment=False)
    memory = TeacherMemory(teacher, torch.device("cpu"))
    memory.open(data)
    batch = data.__getitems__([0, 1, 2, 3])
    first = memory.choice(batch)
    assert torch.equal(memory.choice(batch), first) and asked == [4]
    memory.choice(data.__getitems__([3, 4]))  # one of them is not known
    assert asked == [4, 2] and memory.current.tolist().count(-1) == 1
    memory.open(images(6))  # augmented: nothing is kept
    assert memory.current is None


def test_without_a_teacher_there_is_no_choice():
    assert TeacherMemory(None, torch.device("cpu")).choice({"pixel_values": torch.zeros(1, 3, 8, 8)}) is None


def test_predictions_are_ranked():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    ranked, losses = ranked_predictions(logits, torch.tensor([1, -100]))
    assert ranked.tolist() == [[1, 2, 0], [0, 2, 1]] and losses[1] == 0  # padding
    assert mean_cross_entropy(logits, torch.tensor([1, -100])) == losses[0]


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints():
    return Checkpoints(config("run"), wait_for_everyone=lambda: None)


def written(folder="run/checkpoint-3", **files):
    Path(folder).mkdir(parents=True)
    for name in ("unlogged.json", *files):
        Path(folder, name.replace("_json", ".json")).write_text("{}")
    write_manifest(folder)
    return folder


def test_a_checkpoint_is_found(checkpoints):
    assert checkpoints.find(None, Plain()) is None
    with pytest.raises(HfkdError, match="There is no whole checkpoint in run"):
        checkpoints.find(True, Plain())
    folder = written()
    assert checkpoints.find(True, Plain()) == checkpoints.find(folder, Plain()) == folder
    Path(folder, "unlogged.json").write_text("[]more")
    with pytest.raises(HfkdError, match="cannot be resumed from: unlogged.json has 6 bytes"):
        checkpoints.find(folder, Plain())


def test_a_checkpoint_is_sealed_or_gone(checkpoints):
    folder = Path("run/checkpoint-1")
    with checkpoints.writing(folder):
        (folder / "a").write_text("a")
    assert defect(folder) is None
    with pytest.raises(RunError, match="run/checkpoint-1 could not be written .full.*There is no checkpoint yet"):
        with checkpoints.writing(folder):
            raise OSError("full")
    assert not folder.exists()


def test_settings_are_changed_for_now():
    args = config()
    with changed_for_now(args, save_total_limit=None, push_to_hub=True):
        assert args.push_to_hub
    assert not args.push_to_hub


# ---- Exports and pushes --------------------------------------------------------------------------------------------


def test_an_export_takes_the_place_of_the_former_one(monkeypatch):
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)
    results = ResultsWriter()
    results.facts = {"role": "student", "versions": {"hfkd": "1"}}
    exports = Exports(config("run"), results)
    assert exports.folder == Path("run/student")
    exports.write(lambda folder: Path(folder, "weights").write_text("1"), None, {})
    with pytest.raises(OSError, match="full"):
        exports.write(lambda folder: (_ for _ in ()).throw(OSError("full")), None, {})
    assert (exports.folder / "weights").read_text() == "1"
    assert json.loads((exports.folder / "results.json").read_text())["role"] == "student"
    assert [path.name for path in Path("run").iterdir()] == ["student"]


def test_a_failed_push_is_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(Pushes, "_upload", lambda *args, **kwargs: failed)
    failed = Future()
    exports = SimpleNamespace(folder=Path("run"))
    Path("run").mkdir()
    pushes = Pushes(config("run"), exports, on_begin=lambda: None)
    pushes.push_export("message", blocking=False, token=None, revision=None)
    assert pushes.running
    failed.set_exception(RunError("The Hub is away."))
    with caplog.at_level("WARNING", logger="hfkd.training.pushes"):
        pushes.finish()
    assert "The Hub is away. Training goes on." in caplog.text and not pushes.running


# ---- Backends ------------------------------------------------------------------------------------------------------


def test_one_device_is_the_interface():
    """The other backends override methods of it, and add none that the trainer would call."""
    args = config()  # it settles the device, and an earlier accelerator no longer counts
    backend = backend_of(Accelerator(cpu=True), args)
    assert type(backend) is OneDevice and backend.whole_state(Plain()) is None
    optimizer = torch.optim.SGD(Plain().parameters(), lr=0.1)
    assert backend.optimizer_prepared(optimizer) is optimizer
    for other in (FullyShardedDataParallel, ZeroRedundancy):
        assert {name for name in vars(other) if name[0] != "_"} <= set(vars(OneDevice))


def test_a_backend_that_is_not_run_is_refused(monkeypatch):
    args = config(shard_teacher=True)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(HfkdError, match="shard_teacher goes with FSDP"):
        backend_of(accelerator, args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HfkdError, match="FSDP was requested, and accelerate does not run it"):
        backend_of(accelerator, args)


# ---- Data and optimisation -----------------------------------------------------------------------------------------


def test_the_first_images_of_any_data():
    pairs = [{"pixel_values": torch.zeros(3, 8, 8), "labels": label} for label in range(4)]

    def collate(samples):
        return {"labels": [sample["labels"] for sample in samples]}

    assert first_images(pairs, collate) == {"labels": [0, 3]}
    assert first_images(None, collate) is None and first_set({"a": pairs}) is pairs and first_set(None) is None
    assert first_images(images(8), lambda batch: batch)["labels"].tolist() == [0, 7]


def test_decay_leaves_out_norms_and_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.scale = nn.Parameter(torch.zeros(2, 2))
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def no_weight_decay(self):
            return {"scale"}

    model = nn.ModuleDict({"net": Tokens()})
    assert decayed_parameter_names(model, all_parameters=False) == ["net.fc.weight"]
    assert len(decayed_parameter_names(model, all_parameters=True)) == 6


def test_the_learning_rate_falls_at_milestones():
    optimizer = torch.optim.SGD(Plain().parameters(), lr=1.0)
    schedule = multi_step_schedule(optimizer, [1, 1.5], 0.1, steps_per_epoch=4)
    rates = []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01])


def test_the_search_for_lomo_is_cached_for_a_while(monkeypatch):
    import accelerate.optimizer

    calls = []
    monkeypatch.setattr(accelerate.optimizer, "is_lomo_available", lambda: bool(calls.append(1)))
    former = accelerate.optimizer.is_lomo_available
    with lomo_looked_up_once():
        assert [accelerate.optimizer.is_lomo_available() for _ in range(3)] == [False] * 3
    assert accelerate.optimizer.is_lomo_available is former and calls == [1]


# ---- The end -------------------------------------------------------------------------------------------------------


def trained(**settings):
    trainer = DistillationTrainer(Plain(), None, config("run", **settings), train_dataset=images(8))
    trainer.train()
    return trainer


def test_a_trainer_ends_with_its_last_use():
    """In a circle of references it would stay, and the workers of its loaders with it."""
    gc.disable()
    try:
        reference = weakref.ref(trained())
        assert reference() is None
    finally:
        gc.enable()


def test_a_process_that_keeps_its_trainer_ends():
    """Its workers ignore SIGTERM, by which multiprocessing would end them."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from training.test_parts import trained
trainer = trained(dataloader_num_workers=1, dataloader_persistent_workers=True)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True)


def test_student_and_teacher_by_name():
    """The student gets the classes and the size of the images; the teacher is loaded as `load_teacher` does."""
    torch.manual_seed(0)
    load_student("cifar_resnet14", num_classes=10).save_pretrained("teacher")
    trainer = DistillationTrainer("cifar_resnet8", "teacher", config(losses={"kd": {}}), train_dataset=images(size=24))
    assert trainer.model.config.id2label[3] == "class 3" and trainer.model.config.pretrained_cfg["input_size"][-1] == 24
    assert trainer.teacher.name == "cifar_resnet14"
    ensemble = DistillationTrainer("cifar_resnet8", ["teacher", Plain()], config(), train_dataset=images()).teacher
    assert [member.name for member in ensemble.members][0] == "cifar_resnet14"
    with pytest.raises(HfkdError, match="'cifar_resnet8' is to be loaded for the classes of the data set, and a list"):
        DistillationTrainer("cifar_resnet8", None, config(), train_dataset=[{"pixel_values": torch.zeros(3, 8, 8)}])
