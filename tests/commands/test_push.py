"""Runs that push to the Hub, with the real client and a stand-in: what arrives when, what a dead network leaves, what
is refused before training, and what loads back."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import yaml
from data.pictures import photo
from helpers import aligned, config, images
from hub_stand_in import writable_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from hfkd import DistillationTrainer, load_student, load_teacher
from hfkd.commands import train as hfkd_run
from hfkd.commands.push import push
from hfkd.commands.train import distill
from hfkd.hub.repository import PushError
from hfkd.networks.wrapping import exported_state_dict
from hfkd.runs.checkpoints import MANIFEST_NAME, defect

CLASSES = ["ant", "bee", "cow"]
RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teachers/first",
    "losses": {"ctkd": {}},  # it has parameters of its own
    "dataset_name": "photos",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "lr_milestones": [1],  # the second epoch is ruined, so the first is the best
    "lr_gamma": 1e3,
    "lr_scheduler_type": "constant",
    "load_best_model_at_end": True,
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "hub_always_push": True,
    "disable_tqdm": True,
    "report_to": "tensorboard",
}
PUSH = ["--push_to_hub", "true", "--hub_model_id", "me/x"]
PARTS = {"config.json", "model.safetensors", "results.json", "recipe.yaml", "README.md"}
CURVES = {"training_curves.png"}  # where there are two evaluations
CHECKPOINT = {
    *("config.json", "model.safetensors", "losses.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "unlogged.json", MANIFEST_NAME),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    waits = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", waits)  # between the client's tries
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    with writable_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture(autouse=True)
def place():
    """Six training and three test pictures, a teacher, and a recipe."""
    for index in range(9):
        folder = Path("photos", "test" if index > 5 else "train", CLASSES[index % 3])
        folder.mkdir(parents=True, exist_ok=True)
        photo(32, 32, seed=index).save(folder / f"{index}.png")
    torch.manual_seed(1)
    teacher = load_student("cifar_resnet8", CLASSES)
    teacher.save_pretrained("teachers/first", state_dict=exported_state_dict(teacher), save_original_format=False)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))


def changed(repository):
    """(message, the files that it wrote) of every commit but the first."""
    commits = list(repository.commits.values())
    found = []
    for before, after, message in zip(commits, commits[1:], repository.messages[1:], strict=False):
        found.append((message, {name for name in after if after[name] != before.get(name)}))
    return found


def within(folder, names):
    return {f"{folder}/{name}" for name in names}


def step(number, *, first):
    """The export that is pushed beside a checkpoint: the recipe and the config are there after the first one."""
    there = {"config.json", "recipe.yaml"}
    return f"Training in progress, step {number}", PARTS if first else PARTS - there | CURVES


END = ("End of training", {"README.md", "results.json", "model.safetensors"})  # of the best epoch


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("end", [("End of training", PARTS | CURVES)]),
        ("every_save", [step(2, first=True), step(4, first=False), END]),
        (
            "checkpoint",
            [
                step(2, first=True),
                ("Training in progress, step 2, checkpoint", within("last-checkpoint", CHECKPOINT)),
                step(4, first=False),
                (
                    "Training in progress, step 4, checkpoint",
                    within("last-checkpoint", CHECKPOINT - {"config.json", "unlogged.json"}),
                ),
                END,
            ],
        ),
        (
            "all_checkpoints",
            [
                step(2, first=True),
                ("Training in progress, step 2, checkpoint", within("checkpoint-2", CHECKPOINT)),
                step(4, first=False),
                ("Training in progress, step 4, checkpoint", within("checkpoint-4", CHECKPOINT)),
                END,
            ],
        ),
    ],
)
def test_what_arrives_when(hub, tmp_path, strategy, expected):
    folder = tmp_path / "run" / "student"
    distill(["recipe.yaml", *PUSH, "--hub_strategy", strategy, "--output_dir", str(folder.parent)])
    assert changed(hub.repositories["me/x"]) == expected
    files = hub.repositories["me/x"].files()
    root = {name: content for name, content in files.items() if "/" not in name and name != ".gitattributes"}
    assert root == {path.name: path.read_bytes() for path in folder.iterdir()}
    private = ("hf_write", tmp_path.name, "secret-host", str(Path.home()), "teachers/first")
    for commit in hub.repositories["me/x"].commits.values():
        found = [(name, text) for text in private for name, data in commit.items() if text.encode() in data]
        assert not found
    results = [json.loads(files["results.json"]) for files in list(hub.repositories["me/x"].commits.values())[1:]]
    assert [result["exported"] for result in results] == ["last"] * (len(results) - 1) + ["best"]
    assert results[-1]["best"]["step"] == 2 and len(results[-1]["epochs"]) == 2


def test_a_checkpoint_from_the_hub_resumes(hub):
    """Into the repository that it comes from, as the undisturbed run went on; it is the best one itself."""
    distill(["recipe.yaml", *PUSH, "--hub_strategy", "checkpoint"])
    repository = hub.repositories["me/x"]
    ended = repository.files()["model.safetensors"]
    commit = list(repository.commits)[repository.messages.index("Training in progress, step 2, checkpoint")]
    huggingface_hub.snapshot_download("me/x", revision=commit, allow_patterns="last-checkpoint/*", local_dir="there")
    assert defect("there/last-checkpoint") is None
    arguments = ["--output_dir", "resumed", "--resume_from_checkpoint", "there/last-checkpoint"]
    distill(["recipe.yaml", *PUSH, *arguments, "--hub_strategy", "all_checkpoints"])
    whole, resumed = (load_file(f"{run}/checkpoint-4/model.safetensors") for run in ("runs/recipe", "resumed"))
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    assert repository.files()["model.safetensors"] == ended
    huggingface_hub.snapshot_download("me/x", allow_patterns="checkpoint-4/*", local_dir="there")
    assert defect("there/checkpoint-4") is None


def test_an_organisations_private_branch(hub):
    arguments = ["--hub_model_id", "lab/y", "--hub_private_repo", "true", "--hub_revision", "trial"]
    distill(["recipe.yaml", "--push_to_hub", "true", *arguments, "--hub_strategy", "checkpoint"])
    repository = hub.repositories["lab/y"]
    assert repository.private and list(repository.files("main")) == [".gitattributes"]
    there = PARTS | CURVES | within("last-checkpoint", CHECKPOINT) | {".gitattributes"}
    assert set(repository.files("trial")) == there
    assert "lab/y" in repository.files("trial")["README.md"].decode()


# ---- From code -----------------------------------------------------------------------------------------------------


def from_code(**changes):
    splits = {"train_dataset": images(8, classes=3), "eval_dataset": images(6, classes=3, augment=False)}
    student, teacher = (load_student("cifar_resnet8", splits["eval_dataset"].class_names) for _ in range(2))
    return DistillationTrainer(student, teacher, config(**{"losses": {"kd": {}}} | changes), **splits)


def test_push_to_hub_from_code(hub):
    trainer = from_code(output_dir="deep/run")
    trainer.train()
    trainer.evaluate()
    commit = trainer.push_to_hub(
        "By hand",
        license="mit",
        language="en",
        tags=["birds", "demo"],
        dataset="me/birds",
        model_name="A student",
        finetuned_from="timm/resnet10t.c3_in1k",
    )
    repository = hub.repositories["me/run"]  # by the name of its folder
    assert commit.oid == repository.branches["main"] and repository.messages[-1] == "By hand"
    assert set(repository.files()) == PARTS | {".gitattributes"}
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.data.license == "mit" and card.data.language == "en" and {"birds", "demo"} <= set(card.data.tags)
    assert card.data.datasets == ["me/birds"] and card.data.base_model == ["timm/resnet10t.c3_in1k"]
    assert card.text.strip().startswith("# A student") and "me/run" in card.text

    future = trainer.push_to_hub(blocking=False, revision="other", tags="later")
    with torch.no_grad():
        trainer.model.timm_model.fc.bias.add_(1)
    trainer.push_to_hub(token="hf_write")  # does not take the other one's files away
    assert future.result().oid == repository.branches["other"] != repository.branches["main"]
    assert "later" in ModelCard(repository.files("other")["README.md"].decode()).data.tags
    assert repository.files()["model.safetensors"] == Path("deep/run/student/model.safetensors").read_bytes()
    assert repository.files("other")["model.safetensors"] != repository.files()["model.safetensors"]


def test_save_model_and_create_model_card(hub):
    """As Trainer's: saving by hand pushes where the run does, the card alone stays here."""
    trainer = from_code(push_to_hub=True, hub_model_id="x", hub_strategy="end", output_dir="run")
    repository = hub.repositories["me/x"]
    trainer.create_model_card(license="mit", tasks="image-classification", dataset_tags="birds", dataset_args="all")
    assert ModelCard(Path("run/student/README.md").read_text()).data.license == "mit"
    assert list(repository.files()) == [".gitattributes"]
    trainer.save_model("elsewhere")
    assert {path.name for path in Path("elsewhere").iterdir()} == {"config.json", "model.safetensors"}
    assert changed(repository) == [("Model save", PARTS)]
    loaded = AutoModelForImageClassification.from_pretrained("elsewhere")
    assert torch.equal(loaded.timm_model.fc.weight, trainer.model.timm_model.fc.weight)


# ---- The network goes ----------------------------------------------------------------------------------------------


class Pushes(TrainerCallback):
    """Calls a function with the number of each push, before it."""

    def __init__(self, act):
        self.act, self.count = act, 0

    def on_push_begin(self, args, state, control, **kwargs):
        self.count += 1
        self.act(self.count)


def with_callback(monkeypatch, callback):
    build = hfkd_run.build_trainer

    def build_trainer(*args):
        trainer = build(*args)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(hfkd_run, "build_trainer", build_trainer)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_the_network_is_gone_while_training(hub, monkeypatch, caplog, strategy):
    """At the first save, and back before the next one: training has not stopped, and nothing is missing in the end."""

    def act(number):
        hub.back()
        hub.gone = number == 1

    with_callback(monkeypatch, Pushes(act))
    distill(["recipe.yaml", *PUSH, "--hub_strategy", strategy])
    assert "Hub" in caplog.text and "was not reached" in caplog.text and "Training goes on." in caplog.text
    repository = hub.repositories["me/x"]
    root = {name: data for name, data in repository.files().items() if "/" not in name and name[0] != "."}
    assert root == {path.name: path.read_bytes() for path in Path("runs/recipe/student").iterdir()}
    assert repository.messages[1] == "Training in progress, step 4"
    if strategy == "checkpoint":
        there = {name for name in repository.files() if name.startswith("last-checkpoint/")}
        assert there == within("last-checkpoint", CHECKPOINT)


@pytest.mark.parametrize("way_on", ["hfkd push", "resume"])
def test_the_network_is_gone_in_the_end(hub, monkeypatch, way_on):
    def act(number):
        if number == 1:
            hub.gone_after_bytes = 1000  # half-way through the weights

    with_callback(monkeypatch, Pushes(act))
    command = ["recipe.yaml", *PUSH, "--hub_strategy", "end"]
    with pytest.raises(PushError) as caught:
        distill(command)
    assert "Complete the push with: hfkd push runs/recipe/student --hub_model_id me/x" in str(caught.value)
    folder = Path("runs/recipe")
    assert defect(folder / "checkpoint-4") is None
    assert {path.name for path in (folder / "student").iterdir()} == PARTS | CURVES
    before = (folder / "student" / "model.safetensors").read_bytes()
    assert list(hub.repositories["me/x"].files()) == [".gitattributes"]
    hub.back()
    if way_on == "hfkd push":
        push(["runs/recipe", "--hub_model_id", "me/x"])
    else:
        distill([*command, "--resume_from_checkpoint", "true"])
    assert (folder / "student" / "model.safetensors").read_bytes() == before
    arrived = {name: data for name, data in hub.repositories["me/x"].files().items() if name[0] != "."}
    assert arrived == {path.name: path.read_bytes() for path in (folder / "student").iterdir()}
    results = json.loads(arrived["results.json"])
    assert results["exported"] == "best" and [row["step"] for row in results["epochs"]] == [2, 4]


def test_the_network_is_gone_and_the_same_trainer_tries_again(hub):
    trainer = from_code()
    trainer.push_to_hub()
    hub.gone = True
    with torch.no_grad():
        trainer.model.timm_model.fc.bias.add_(1)
    with pytest.raises(PushError, match="Nothing is lost: run/student holds the whole model"):
        trainer.push_to_hub()
    exported = Path("run/student/model.safetensors").read_bytes()
    hub.back()
    trainer.push_to_hub()
    assert hub.repositories["me/run"].files()["model.safetensors"] == exported


# ---- Refused before training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id, token, message",
    [
        ("me/x", None, "There is no token for the Hub"),
        ("me/x", "hf_wrong_secret", "The Hub does not accept the token"),
        ("me/x", "hf_read", "The token may not write to me/x"),
        ("someone/x", "hf_write", "The token may not write to someone/x"),
        ("me/other", "hf_write", "me/other holds something else: weights.bin"),
        ("me/birds", "hf_write", r"class 1 of its cifar_resnet8 is 'bat', of this one 'bee'"),
        ("me/x/y", "hf_write", "'me/x/y' is no valid name of a repository"),
    ],
)
def test_refused_before_training(hub, monkeypatch, repo_id, token, message):
    hub.add("me/other", {"weights.bin": b"1"})
    student = load_student("cifar_resnet8", ["ant", "bat", "cow"])
    student.save_pretrained("birds", state_dict=exported_state_dict(student), save_original_format=False)
    hub.add("me/birds", {"config.json": Path("birds/config.json").read_bytes()})
    monkeypatch.delenv("HF_TOKEN")
    given = [] if token is None else ["--hub_token", token]
    commits = {name: len(repository.commits) for name, repository in hub.repositories.items()}
    with pytest.raises(ValueError, match=message) as caught:
        distill(["recipe.yaml", "--push_to_hub", "true", "--hub_model_id", repo_id, *given])
    assert "Training has not started" in str(caught.value)
    assert token is None or token not in str(caught.value)
    assert not list(Path("runs").rglob("checkpoint-*")) and not list(Path("runs").rglob("student"))
    assert {name: len(repository.commits) for name, repository in hub.repositories.items()} == commits


# ---- What was pushed loads back ------------------------------------------------------------------------------------


def test_what_was_pushed_is_used_again(hub):
    trainer = distill(["recipe.yaml", *PUSH])
    pixels = trainer.eval_dataset.__getitems__(range(3))["pixel_values"]
    with torch.no_grad():
        expected = trainer.model.eval().to(memory_format=torch.contiguous_format)(pixels).logits
        loaded = aligned(AutoModelForImageClassification.from_pretrained("me/x")).eval()
        assert torch.equal(loaded(pixels).logits, expected)
        assert torch.equal(timm.create_model("hf-hub:me/x", pretrained=True).eval()(pixels), expected)
        student = aligned(load_student("me/x", CLASSES)).eval()
        assert torch.equal(student(pixels).logits, expected)
        teacher = load_teacher("me/x")
        assert teacher.name == teacher.hub_id == "me/x"
        torch.testing.assert_close(teacher.model.eval()(pixels).logits, expected)
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    assert AutoImageProcessor.from_pretrained("me/x").data_config["input_size"] == (3, 32, 32)

    names = ["--student_name_or_path", "me/x", "--teacher_name_or_path", "me/x"]
    distill(["recipe.yaml", *names, "--output_dir", "next", "--push_to_hub", "true", "--hub_model_id", "me/next"])
    files = hub.repositories["me/next"].files()
    results = json.loads(files["results.json"])
    assert results["student"] == results["teacher"] == "me/x" and results["base_models"] == ["me/x"]
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert recipe["student_name_or_path"] == "me/x" and recipe["teacher_name_or_path"] == ["me/x"]
    assert recipe["dataset_name"] == "path/to/photos" and "hub_model_id" not in recipe
    assert ModelCard(files["README.md"].decode()).data.base_model == ["me/x"]
