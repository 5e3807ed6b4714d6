"""What a run exports: it loads in a fresh process with bit-equal logits, prepares images as the run did, and holds
nothing that concerns one machine alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from data.pictures import photo
from helpers import Plain, config, images
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hfkd import DistillationConfig, DistillationTrainer, load_student
from hfkd.commands.build import load_splits
from hfkd.commands.evaluate import evaluate
from hfkd.commands.train import distill
from hfkd.losses import KDLoss
from hfkd.names import architecture_of, hub_id, is_local, public_name
from hfkd.networks.input_spec import input_spec
from hfkd.networks.loading import load_pretrained
from hfkd.networks.wrapping import exported_state_dict, wrap_timm
from hfkd.recipe.keys import public_recipe
from hfkd.recipe.reading import parse_recipe

CLASSES = ["100", "Große Katze", "ant", "bee, wild"]
SECRET = "hf_secretsecret"
RECIPE = {
    "train_split": "train",
    "image_size": 32,
    "teacher_name_or_path": "teachers/first",
    "losses": {"kd": {"temperature": 2.0}},
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
CROP = {"dataset_name": "{home}/small"}
PHOTOS = {"dataset_name": "data/photos", "augmentation": "random_resized_crop"}
WITHOUT_HFKD = {
    "test_resnet": PHOTOS | {"crop_pct": 0.875, "interpolation": "bilinear"},
    "test_vit": CROP | {"patch_size": 8},
    "deit_tiny_distilled_patch16_224": PHOTOS | {"teacher_name_or_path": ["{here}/teachers/first", "teachers/second"]},
    "vit": CROP
    | {
        "student_name_or_path": "{here}/start/vit",
        "image_size": None,
        "teacher_name_or_path": "cifar_resnet8",
        "teacher_checkpoint": "{here}/teachers/first/model.safetensors",
    },
}
WITH_HFKD = {
    "cifar_resnet8": CROP | {"num_train_epochs": 2, "dataset_name": "~/small"},
    "t2t_vit_7": CROP,
    "pvt_tiny": PHOTOS | {"crop_pct": 0.9},
    "simkd": PHOTOS | {"student_name_or_path": "cifar_resnet8", "losses": {"simkd": {}}, "ce_weight": 0.0},
}

# argv: a file, then exports; those behind "hfkd" after its import. Writes what they give for the images beside each.
FRESH_PROCESS = """
import copy, sys
import timm, torch, transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

def aligned(model):  # a file's weights lie anywhere in memory, and the last bits of a product can depend on where
    return copy.deepcopy(model)

answers = {}
for folder in sys.argv[2:]:
    if folder == "hfkd":
        assert folder not in sys.modules
        import hfkd
        continue
    pixels, names = torch.load(folder + "/../given.pt")
    pictures = [Image.open(name) for name in names]
    answer = answers[folder] = {}
    model = AutoModelForImageClassification.from_pretrained(folder)
    answer["id2label"], answer["label2id"] = model.config.id2label, model.config.label2id
    processor = AutoImageProcessor.from_pretrained(folder)
    answer["prepared"] = processor(pictures, return_tensors="pt")["pixel_values"]
    classify = pipeline("image-classification", model=folder)
    classify.model = aligned(classify.model)
    with torch.no_grad():
        answer["transformers"] = aligned(model)(pixels).logits
        answer["of pictures"] = aligned(model)(answer["prepared"][:1]).logits[0]
    answer["pipeline"] = classify(names[0], function_to_apply="none", top_k=4)
    if model.config.model_type == "timm_wrapper":
        model = aligned(timm.create_model("local-dir:" + folder, pretrained=True)).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        answer["timm names"] = list(model.pretrained_cfg["label_names"])
        answer["timm prepared"] = torch.stack([transform(picture) for picture in pictures])
        with torch.no_grad():
            answer["timm"] = model(pixels)
torch.save(answers, sys.argv[1])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The working directory and home of all runs, with data, teachers and a student to start from."""
    place = tmp_path_factory.mktemp("secret_place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place / "home"))
        patch.setenv("HF_TOKEN", SECRET)
        patch.setattr("socket.gethostname", lambda: "secret-host")
        patch.setattr("platform.node", lambda: "secret-host")
        save_pictures(Path("home", "small"), [(32, 32)])
        save_pictures(Path("data", "photos"), [(48, 64), (57, 40), (33, 50)])
        for number, name in enumerate(("first", "second")):
            torch.manual_seed(number)
            model = load_student("cifar_resnet8", CLASSES)
            model.save_pretrained(
                Path("teachers", name), state_dict=exported_state_dict(model), save_original_format=False
            )
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape)).save_pretrained("start/vit")
        processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3)
        processor.save_pretrained("start/vit")
        yield place


def save_pictures(folder, sizes):
    """Two training and two test pictures of each class."""
    for index in range(4 * len(CLASSES)):
        split, number, name = ("train", "test")[index % 2], index // 2 % 2, CLASSES[index // 4]
        Path(folder, split, name).mkdir(parents=True, exist_ok=True)
        photo(*sizes[index % len(sizes)], seed=index).save(Path(folder, split, name, f"{number}.png"))


def run(place, name, settings):
    """The trainer of a finished run into `place`/runs/`name`, from a recipe whose paths are as the settings say."""
    filled = json.loads(json.dumps(settings).replace("{home}", f"{place}/home").replace("{here}", str(place)))
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"student_name_or_path": name} | RECIPE | filled))
    return distill([f"{name}.yaml", "--output_dir", str(place / "runs" / name), "--hub_token", SECRET])


def save_given(trainer, run_dir):
    """What an export is asked in the fresh process: the run's own evaluation batch, and the pictures it is made of."""
    rows = trainer.eval_dataset.num_rows
    batch = trainer.eval_dataset.__getitems__(range(rows))["pixel_values"]
    split = load_splits(parse_recipe([str(run_dir / "recipe.yaml")])[1])[1].dataset
    names = [str(run_dir / f"{row}.png") for row in range(rows)]
    for name, row in zip(names, split, strict=True):
        row["image"].save(name)
    torch.save((batch, names), run_dir / "given.pt")
    model = trainer.model.eval().to(memory_format=torch.contiguous_format)  # as a loaded model is
    with torch.no_grad():
        return batch, model(batch).logits, model(batch[:1]).logits[0]


@pytest.fixture(scope="module")
def exported(place):
    """By name: the run's trainer, batch and logits, and what a fresh process made of its export."""
    trainers = {name: run(place, name, changes) for name, changes in (WITHOUT_HFKD | WITH_HFKD).items()}
    given = {name: (trainer, *save_given(trainer, place / "runs" / name)) for name, trainer in trainers.items()}
    folders = {name: str(place / "runs" / name / "student") for name in trainers}
    without, within = ([folders[name] for name in names] for names in (WITHOUT_HFKD, WITH_HFKD))
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, "answers.pt", *without, "hfkd", *within], check=True)
    answers = torch.load("answers.pt", weights_only=False)
    return {name: (*given[name], answers[folders[name]]) for name in trainers}


NAMES = [*WITHOUT_HFKD, *WITH_HFKD]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_gives_the_logits(exported, name):
    trainer, _, logits, first, answer = exported[name]
    assert logits.std() > 1e-4
    assert torch.equal(answer["transformers"], logits)
    scores = {entry["label"]: entry["score"] for entry in answer["pipeline"]}
    assert [scores[label] for label in CLASSES] == answer["of pictures"].tolist()
    torch.testing.assert_close(answer["of pictures"], first, rtol=1e-4, atol=1e-5)  # rounding of the preparation
    if name != "vit":
        assert torch.equal(answer["timm"], logits) and answer["timm names"] == CLASSES
    assert answer["id2label"] == dict(enumerate(CLASSES))
    assert answer["label2id"] == {label: index for index, label in enumerate(CLASSES)}
    assert trainer.state.global_step > 0


@pytest.mark.parametrize("name", NAMES)
def test_images_are_prepared_as_in_the_run(exported, name):
    """Up to the rounding of float32: an 8-bit step is 0.0039 / std or more."""
    _, batch, _, _, answer = exported[name]
    assert len({tuple(image[:, 0, 0].tolist()) for image in batch}) == len(batch)
    for key in {"prepared", "timm prepared"} & answer.keys():
        torch.testing.assert_close(answer[key], batch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_measures_what_the_results_say(exported, place, name, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place / "home"))
    results = json.loads((place / "runs" / name / "student" / "results.json").read_text())
    metrics = evaluate([str(place / "runs" / name / "student")])
    assert metrics["eval_top1"] == results["last"]["top1"]
    assert metrics["eval_loss"] == pytest.approx(results["epochs"][-1]["eval_loss"], rel=1e-5)


# ---- What lies in the folder ---------------------------------------------------------------------------------------


def check_public(folder, *private):
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [text for text in (SECRET, "secret_place", "secret-host", *private) if text.encode() in content]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_holds_what_others_need_and_nothing_of_this_machine(exported, place, name):
    folder = place / "runs" / name / "student"
    own = {"preprocessor_config.json"} if name == "vit" else set()
    curves = {"training_curves.png"} if name == "cifar_resnet8" else set()  # of two evaluations
    expected = {"config.json", "model.safetensors", "results.json", "recipe.yaml", "README.md"} | own | curves
    assert {path.name for path in folder.iterdir()} == expected
    check_public(folder, "teachers/", "data/", "home", "start/")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    data = recipe["dataset_name"]
    assert data == ("path/to/photos" if "augmentation" in recipe else "path/to/small")
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"]["name"] == data.removeprefix("path/to/") and results["dataset"]["hub_id"] is None
    assert results["base_models"] == [] and "hub_token" not in recipe and "output_dir" not in recipe
    assert not list((place / "runs" / name).rglob("training_args.bin"))
    assert not [path for path in (place / "runs").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_names_in_place_of_paths(exported, place):
    def read(name):
        folder = place / "runs" / name / "student"
        return yaml.safe_load((folder / "recipe.yaml").read_text()), json.loads((folder / "results.json").read_text())

    recipe, results = read("deit_tiny_distilled_patch16_224")
    assert recipe["teacher_name_or_path"] == ["path/to/first", "path/to/second"]
    assert results["teacher"] == "cifar_resnet8 + cifar_resnet8"
    recipe, results = read("vit")
    assert recipe["teacher_name_or_path"] == ["cifar_resnet8"] and recipe["student_name_or_path"] == "path/to/vit"
    assert recipe["teacher_checkpoint"] == ["path/to/model.safetensors"]
    assert results["student"] == "vit" and results["teacher"] == "cifar_resnet8"


def from_code(**changes):
    """A trainer of a module of somebody's own."""
    splits = {"train_dataset": images(8), "eval_dataset": images(8, augment=False)}
    return DistillationTrainer(Plain(), Plain(), config("run", hub_token=SECRET, **changes), **splits)


def test_a_run_from_code(place):
    trainer = from_code(losses={"kd": KDLoss(temperature=3.0)}, resume_from_checkpoint=str(place / "x"), warmup_steps=2)
    trainer.evaluate()
    folder = trainer.export()
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "results.json", "recipe.yaml", "README.md"}
    check_public(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert "resume_from_checkpoint" not in recipe and "hub_token" not in recipe
    assert recipe["losses"] == {"kd": "KDLoss"} and recipe["warmup_steps"] == 2 and recipe["learning_rate"] == 0.05
    defaults = vars(DistillationConfig(output_dir="other"))
    assert not [key for key, value in recipe.items() if value == defaults[key]]


def test_the_recipe_is_one(exported, place):
    """What a reader puts in the place of the paths is all that it lacks."""
    path = place / "runs" / "pvt_tiny" / "student" / "recipe.yaml"
    model_args, data_args, args, _ = parse_recipe([str(path)])
    assert model_args.student_name_or_path == "pvt_tiny" and model_args.teacher_name_or_path == ["path/to/first"]
    assert data_args.crop_pct == 0.9 and args.losses == RECIPE["losses"] and args.learning_rate == 1e-3


def test_an_export_that_fails_leaves_the_one_before(monkeypatch):
    trainer = from_code()
    trainer.export()
    before = {path.name: path.read_bytes() for path in Path("run/student").iterdir()}
    with torch.no_grad():
        trainer.model.fc.weight.zero_()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    unwritten = "run/student could not be written .No space"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=unwritten):
        patch.setattr("hfkd.training.exports.write_card", full)
        trainer.export()
    assert {path.name: path.read_bytes() for path in Path("run/student").iterdir()} == before
    assert [path.name for path in Path("run").iterdir()] == ["student"]
    trainer.export()
    assert Path("run/student/model.safetensors").read_bytes() != before["model.safetensors"]


# ---- What config.json says -----------------------------------------------------------------------------------------


def test_where_timm_had_its_weights_from_stays_here(tmp_path):
    """Nor do published weights' licence and name go with an architecture that starts anew."""
    student = load_student("test_resnet", CLASSES)
    save(student, "first")
    for model in (
        timm.create_model(f"local-dir:{tmp_path}/first", pretrained=True),
        timm.create_model(
            "test_resnet",
            pretrained=True,
            num_classes=4,
            pretrained_cfg_overlay={"file": f"{tmp_path}/first/model.safetensors", "num_classes": 4},
        ),
    ):
        save(wrap_timm(model, CLASSES), "second")
        assert tmp_path.name not in Path("second/config.json").read_text()
        assert torch.equal(load_pretrained("second").timm_model.fc.weight, student.timm_model.fc.weight)
    config = json.loads(Path("first/config.json").read_text())["pretrained_cfg"]
    assert not {"hf_hub_id", "url", "tag", "license"} & config.keys()


def test_preparation_travels_through_generations():
    """A student that starts from another one's weights says how its own run prepared images."""
    save(load_student("test_resnet", CLASSES, image_size=48, crop_pct=0.8, interpolation="bilinear"), "first")
    save(load_student("first", CLASSES, crop_pct=0.9), "second")
    config = load_pretrained("second").config.pretrained_cfg
    assert (config["crop_pct"], config["interpolation"], config["crop_mode"]) == (0.9, "bicubic", "center")
    assert input_spec(load_pretrained("second")).image_size == 48


def test_images_are_cropped_whatever_the_architecture_was_published_with():
    assert timm.get_pretrained_cfg("tf_efficientnetv2_b3").crop_mode == "squash"
    config = load_student("tf_efficientnetv2_b3", CLASSES, image_size=32).config.pretrained_cfg
    assert config["crop_mode"] == "center" and config["crop_pct"] == 1.0 and "test_input_size" not in config


def save(student, folder):
    student.save_pretrained(folder, state_dict=exported_state_dict(student), save_original_format=False)


# ---- sharing.py ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, local",
    [
        ("/srv/weights", True),
        ("~/weights", True),
        ("./weights", True),
        ("../weights/a.pth", True),
        ("runs/cifar100/kd/teacher", True),
        ("runs/kd", True),
        ("there/model", True),
        ("there/t.pth", True),
        ("there", False),  # as good a name of an architecture
        ("me/model", False),
        ("timm/resnet34.a1_in1k", False),
        ("cifar_resnet8", False),
    ],
)
def test_is_local(name, local):
    Path("there/model").mkdir(parents=True)
    Path("there/t.pth").touch()
    assert is_local(name) is local
    assert hub_id(name) == (name if "/" in name and not local else None)


def test_public_name():
    model = load_student("cifar_resnet8", num_classes=3)
    assert public_name("me/model", model) == "me/model"
    for name in ("/srv/model", "cifar_resnet8", "runs/kd", ""):
        assert public_name(name, model) == "cifar_resnet8"
    assert architecture_of(model.timm_model) == "cifar_resnet8"
    assert architecture_of(ViTForImageClassification(ViTConfig(hidden_size=8, num_attention_heads=1))) == "vit"
    assert architecture_of(Plain()) == "Plain"


def test_public_recipe():
    recipe = {
        "student_name_or_path": "cifar_resnet8",
        "dataset_name": "~/data/photos/",
        "teacher_name_or_path": ["runs/a/teacher", "timm/resnet34.a1_in1k", "/home/me/b"],
        "losses": {"own": {"table": "/home/me/table.npy", "weight": 2.0, "layers": [1, "fc"]}},
        "learning_rate": 0.1,
        "train_split": "train[:90%]",
        "output_dir": "runs/x",
        "hub_model_id": "me/x",
        "push_to_hub": True,
        "run_name": "on host 7",
    }
    given = json.loads(json.dumps(recipe))
    assert public_recipe(recipe) == {
        "student_name_or_path": "cifar_resnet8",
        "dataset_name": "path/to/photos",
        "teacher_name_or_path": ["path/to/teacher", "timm/resnet34.a1_in1k", "path/to/b"],
        "losses": {"own": {"table": "path/to/table.npy", "weight": 2.0, "layers": [1, "fc"]}},
        "learning_rate": 0.1,
        "train_split": "train[:90%]",
    }
    assert recipe == given


def test_every_figure_of_the_best_is_of_the_exported_weights():
    """Where loss and top-1 disagree, the best epoch is the one that metric_for_best_model says."""
    # The first are those of the two images on which the trainer finds out what the function measures.
    measured = iter([(0.0, 0.0), (10.0, 0.9), (20.0, 0.5), (90.0, 0.7)])

    def compute_metrics(prediction):
        top1, loss = next(measured)
        return {"top1": top1, "top5": top1, "loss": loss}

    torch.manual_seed(0)
    args = config(
        **{"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False},
    )
    data = {"train_dataset": images(8), "eval_dataset": images(10, augment=False)}
    trainer = DistillationTrainer(Plain(), None, args, compute_metrics=compute_metrics, **data)
    trainer.results.facts["dataset"] = {"name": "mine", "hub_id": None}
    trainer.train()
    folder = trainer.export()
    exported, best = (load_file(f"{path}/model.safetensors") for path in (folder, "run/checkpoint-2"))
    assert all(torch.equal(exported[name], best[name]) for name in best)
    for path in ("run", folder):
        results = json.loads(Path(path, "results.json").read_text())
        assert results["best"]["step"] == 2 and results["best"]["top1"] == 20.0 and results["last"]["top1"] == 90.0
    card = Path(folder, "README.md").read_text()
    assert "the best epoch is the one with the lowest loss there" in card
    assert re.search(r"\*\*best epoch\*\*, these weights *\| *2 *\| *20.00 ", card)
    assert ModelCard.load(f"{folder}/README.md").data.eval_results[0].metric_value == 20.0
    assert trainer.results.text() == "Top-1: 20.00 with the lowest loss (epoch 2), 90.00 in the end."


def test_a_checkpoint_of_each_evaluation_is_needed_for_the_best():
    with pytest.raises(ValueError, match="save_steps must be eval_steps, got 4 and 2"):
        steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
        config(load_best_model_at_end=True, **steps)


class Tied(Plain):
    """With a second classifier that is the first one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.fc.weight

    def forward(self, pixel_values):
        return super().forward(pixel_values) + self.head(self.conv(pixel_values).relu().amax(dim=(2, 3)))


def test_tied_weights_of_a_plain_module_are_written_and_stay_tied():
    torch.manual_seed(0)
    args = config(num_train_epochs=2, save_strategy="epoch")
    data = {"train_dataset": images(8), "eval_dataset": images(10, augment=False)}
    teacher = Plain()
    trainer = DistillationTrainer(Tied(), teacher, args, losses={"kd": {}}, **data)
    trainer.train()
    exported = load_file(trainer.export() / "model.safetensors")
    assert torch.equal(exported["head.weight"], exported["fc.weight"])
    assert torch.equal(exported["head.weight"], trainer.model.head.weight)
    resumed = DistillationTrainer(Tied(), teacher, args, losses={"kd": {}}, **data)
    resumed.train(resume_from_checkpoint="run/checkpoint-1")
    assert resumed.model.head.weight is resumed.model.fc.weight
    assert torch.equal(resumed.model.head.weight, trainer.model.head.weight)
