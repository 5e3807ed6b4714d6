"""The model card of an export: its metadata, its table, its code and its figure."""

import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import RESULTS
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hfkd import load_student
from hfkd.hub.card import write_card
from hfkd.losses import LOSSES
from hfkd.losses.regions import CITATION as REGIONS
from hfkd.losses.standardize import CITATION
from hfkd.networks.loading import load_pretrained
from hfkd.networks.wrapping import exported_state_dict

NAMES = ["a|b", 'c: "d"', "e"]
ROWS = [
    {"epoch": epoch, "step": 10 * epoch, "loss": 5.0 / epoch, "loss_ce": 1.0 / epoch, "loss_kd": 4.0 / epoch}
    | {"eval_top1": top1, "eval_top5": 90.0, "eval_agreement": 80.25, "eval_teacher_top1": 72.34}
    for epoch, top1 in ((1, 60.0), (2, 71.531), (3, 71.2))
]
MEASURED = {
    "best": {"epoch": 2.0, "step": 20, "top1": 71.531, "top5": 90.0, "agreement": 80.25, "checkpoint": "checkpoint-20"},
    "last": {"epoch": 3.0, "step": 30, "top1": 71.2, "top5": 90.0, "agreement": 80.25, "checkpoint": "checkpoint-30"},
    "seconds": 5025.2,
    "images_per_second": 9412.3,
    "epochs": ROWS,
}
RECIPE = {
    "student_name_or_path": "cifar_resnet20",
    "teacher_name_or_path": "path/to/teacher",
    "dataset_name": "uoft-cs/cifar100",
    "losses": {"kd": {"temperature": 2.0, "weight": 9.0}},
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_milestones": [150.0, 180.0, 210.0],
    "num_train_epochs": 240.0,
    "per_device_train_batch_size": 32,
}
CONFIG = {"model_type": "timm_wrapper", "architecture": "cifar_resnet20"}
BLUE, GREEN = (0, 114, 178), (0, 158, 115)  # of the student's curve and of the published value


def written(folder, results, recipe=RECIPE, config=CONFIG, **settings):
    """The card of an export that holds these files (but no weights)."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    for name, text in {"recipe.yaml": recipe and yaml.safe_dump(recipe), "config.json": json.dumps(config)}.items():
        if text and text != "null":
            (folder / name).write_text(text)
    write_card(folder, **settings)
    return ModelCard.load(folder / "README.md")


def table_of(text, heading):
    """The cells of the first table of a section, header first; a bar that is escaped ends no cell."""
    section = text.split(f"## {heading}\n")[1]
    lines = section[section.index("|") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [rows[0], *rows[2:]]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)


def test_metadata():
    results = RESULTS | MEASURED | {"base_models": ["timm/resnet34.a1_in1k"]}
    settings = {"language": "en", "license": "apache-2.0", "tags": "mine", "finetuned_from": "me/earlier"}
    data = written("export", results, repo_id="me/small", **settings).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", "en", "image-classification")
    assert data.tags == [
        *("hfkd", "image-classification", "knowledge-distillation", "kd", "logit-standardization", "mine")
    ]
    assert data.library_name == "hfkd", "the Hub's own code for timm and transformers would lack `import hfkd`"
    assert data.datasets == ["uoft-cs/cifar100"] and data.metrics == ["accuracy"]
    assert data.base_model == ["timm/resnet34.a1_in1k", "me/earlier"] and data["base_model_relation"] == "finetune"
    assert data.model_name == "small"
    assert [(entry.metric_name, entry.metric_value) for entry in data.eval_results] == [
        ("Top-1 accuracy (%)", 71.53),
        ("Top-5 accuracy (%)", 90.0),
    ]
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("uoft-cs/cifar100", "cifar100", "test")
    assert (first.task_type, first.metric_type) == ("image-classification", "accuracy")

    last = written("export", results | {"exported": "last"}, config={**CONFIG, "architecture": "resnet18"}).data
    assert last.eval_results[0].metric_value == 71.2 and last.model_name == "cifar_resnet20"
    assert last.library_name == "timm" and {"timm", "transformers"} <= set(last.tags)
    assert last.license is None and last.base_model == ["timm/resnet34.a1_in1k"]
    assert written("export", results, config={"model_type": "vit"}).data.library_name == "transformers"


def test_results_method_and_training():
    text = written("export", RESULTS | MEASURED).text
    assert table_of(text, "Results") == [
        ["", "epoch", "top-1", "top-5", "agreement with the teacher", "top-1 against the published"],
        ["**best epoch**, these weights", "2", "71.53", "90.00", "80.25", "+0.10"],
        ["last epoch", "3", "71.20", "90.00", "80.25", "-0.23"],
        ["published", "", "71.43", "", "", ""],
        ["teacher", "", "72.34", "", "", ""],
    ]
    assert "278,324 parameters" in text and "861,620 parameters" in text and "32.3 % of its teacher's" in text
    assert "100 classes, 50,000 training images" in text
    assert table_of(text, "Method") == [
        ["loss", "weight", "settings"],
        ["cross-entropy with the labels", "0.1", ""],
        ["`kd`", "9", "`temperature: 2.0`"],
    ]
    training = dict(table_of(text, "Training"))
    assert training["learning rate"] == "0.05, times 0.1 after epoch 150, 180, 210"
    assert training["optimizer"] == "`sgd`, weight decay 0" and training["epochs"] == "240"
    assert training["batch size"] == "32 images a device" and training["devices"] == "2 x cuda"
    assert training["seed"] == "42", "the default, which the recipe does not repeat"
    assert training["time, with evaluations"] == "1 h 23 min" and training["training images/s"] == "9,412"
    assert blocks(text, "bash") == ["accelerate launch --num_processes 2 -m hfkd distill recipe.yaml"]
    assert "files of your own where it says `path/to`" in text
    assert yaml.safe_load(blocks(text, "yaml")[0]) == RECIPE


@pytest.mark.parametrize(
    "cache, stored",
    [
        ({"epochs": 30, "top_k": None}, "30 epochs (in float16)"),
        ({"epochs": 1, "top_k": 16}, "one epoch (the largest 16 of an image and what the others come to)"),
    ],
)
def test_logits_from_a_cache(cache, stored):
    text = written("export", RESULTS | {"teacher_cache": cache}).text
    assert f"The teacher's logits were read from a cache of {stored}, which longer training repeats." in text
    assert "cache" not in written("export", RESULTS).text


def test_a_teacher_and_runs_of_which_less_is_known():
    alone = {"teacher": None, "teacher_parameters": None, "losses": {}, "logit_standardization": False}
    alone |= {"role": "teacher", "ce_weight": 1.0, "published_top1": None, "devices": "1 x cpu"}
    rows = [{key: value for key, value in row.items() if "teacher" not in key} for row in ROWS]
    best = {"epoch": 3.0, "step": 30, "top1": 71.2, "top5": 90.0}
    loaded = written("teacher", RESULTS | alone | MEASURED | {"best": best, "last": best, "epochs": rows})
    assert table_of(loaded.text, "Results") == [
        ["", "epoch", "top-1", "top-5"],
        ["**best, last epoch**, these weights", "3", "71.20", "90.00"],
    ]
    assert "from the labels alone" in loaded.text and "to teach smaller ones" in loaded.text
    assert "knowledge-distillation" not in loaded.data.tags and "bibtex" not in loaded.text
    assert blocks(loaded.text, "bash") == ["hfkd train-teacher recipe.yaml"]

    called = written("called", RESULTS | alone | {"dataset": None}, recipe=None, config=None)
    assert called.data.eval_results is None and called.data.datasets is None and called.data.library_name is None
    assert "## Results" not in called.text and "None" not in called.text and "```" not in called.text
    assert not Path("called/training_curves.png").exists()
    named = written("named", RESULTS | MEASURED | {"dataset": None}, dataset="me/flowers")
    assert named.data.datasets == ["me/flowers"] and named.data.eval_results[0].dataset_name == "me/flowers"
    settings = written("settings", RESULTS | MEASURED, recipe={"seed": 7})
    assert blocks(settings.text, "bash") == [], "settings of a program are no recipe that can be run"


def timm_student(architecture):
    torch.manual_seed(0)
    student = load_student(architecture, class_names=NAMES)
    student.save_pretrained("export", state_dict=exported_state_dict(student), save_original_format=False)


def transformers_student():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], id2label=dict(enumerate(NAMES)))
    ResNetForImageClassification(config).save_pretrained("export")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("export")


@pytest.mark.parametrize(
    "make, registers",
    [
        (lambda: timm_student("cifar_resnet8"), True),
        (lambda: timm_student("test_resnet"), False),
        (transformers_student, False),
    ],
)
def test_the_code_runs(make, registers, capsys):
    """As it stands in the card, all that changes is the folder."""
    make()
    config = json.loads(Path("export/config.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("image.jpg")
    text = written("export", RESULTS | MEASURED, config=config).text
    programs = blocks(text, "python")
    assert len(programs) == (3 if config["model_type"] == "timm_wrapper" else 2)
    model, processor = load_pretrained("export").eval(), AutoImageProcessor.from_pretrained("export")
    logits = model(**processor(Image.open("image.jpg"), return_tensors="pt")).logits
    expected = NAMES[logits.argmax()]
    for program in programs:
        assert program.startswith("import hfkd ") == registers
        capsys.readouterr()
        exec(program.replace("path/to/this/folder", "export"), {})
        printed = capsys.readouterr().out.strip()
        assert (eval(printed)[0]["label"] if "pipeline" in program else printed) == expected
    assert ("Install hfkd first" in text) == registers

    write_card("export", "me/small")
    of_the_hub = "\n".join(blocks(Path("export/README.md").read_text(), "python"))
    assert of_the_hub.count('"me/small"') == 3 and "path/to" not in of_the_hub
    assert ('"hf-hub:me/small"' in of_the_hub) == (len(programs) == 3)


@pytest.mark.parametrize(
    "version, commit, expected",
    [
        ("1.2.0", None, "`pip install hfkd==1.2.0` first. Its"),
        ("1.2.0", "0123abc", "from a checkout: the model was trained with its commit `0123abc`. Its"),
        ("1.3.0.dev0", None, "from a checkout: the model was trained with `1.3.0.dev0`, which is no release. Its"),
    ],
)
def test_the_card_installs_the_hfkd_that_trained_the_model(version, commit, expected):
    """pip finds releases alone, and another version may build the architecture otherwise."""
    text = written("export", RESULTS | {"versions": {"hfkd": version}, "git_commit": commit}).text
    assert expected in text and text.count("pip install") == (commit is None and version == "1.2.0")


@pytest.mark.parametrize(
    "citation", [*(loss.citation for loss in LOSSES.values()), CITATION, REGIONS], ids=[*LOSSES, "z-score", "sdd"]
)
def test_citations(citation):
    entry = inspect.cleandoc(citation)
    assert re.match(r"@(article|inproceedings)\{[a-z]+\d{4}[a-z]+,\n", entry) and entry.endswith("\n}")
    steps = [{"{": 1, "}": -1}.get(character, 0) for character in entry[entry.index("{") :]]
    depths = np.cumsum(steps)
    assert depths[-1] == 0 and (depths[:-1] > 0).all(), "the braces of the entry, and only its last ends it"
    fields = dict(re.findall(r"^    (\w+) = \{(.+?)\},$", entry, re.DOTALL | re.MULTILINE))
    assert {"title", "author", "year"} < fields.keys() and re.fullmatch(r"\d{4}", fields["year"])
    assert all("," in author or author == "others" for author in re.split(r"\s+and\s+", fields["author"]))
    assert fields["year"] in entry.splitlines()[0]


def test_what_the_methods_cite():
    losses = {name: {"weight": 1.0} for name in ("crd", "mine", "kd")}  # one is the user's own
    (quoted,) = blocks(written("export", RESULTS | {"losses": losses}).text, "bibtex")
    assert re.findall(r"^@\w+\{(\w+)", quoted, re.MULTILINE) == [
        *("tian2020contrastive", "hinton2015distilling", "sun2024logit")
    ]
    (quoted,) = blocks(written("export", RESULTS | {"logit_standardization": False}).text, "bibtex")
    assert "sun2024logit" not in quoted and "wei2024scale" not in quoted
    regions = {"kd": {"weight": 1.0, "regions": [1, 2]}}
    assert "wei2024scale" in blocks(written("export", RESULTS | {"losses": regions}).text, "bibtex")[0]


def colours(path):
    image = Image.open(path).convert("RGB")
    assert image.width == 1600
    return {colour for _, colour in image.getcolors(maxcolors=1 << 24)}


def test_the_figure():
    text = written("export", RESULTS | MEASURED).text
    assert "](training_curves.png)" in text
    assert {BLUE, GREEN} <= colours("export/training_curves.png")
    written("export", RESULTS | MEASURED | {"published_top1": None})
    drawn = colours("export/training_curves.png")
    assert BLUE in drawn and Image.open("export/training_curves.png").height > 1000
    without_losses = [{"epoch": row["epoch"], "step": row["step"], "eval_top1": row["eval_top1"]} for row in ROWS]
    written("export", RESULTS | MEASURED | {"epochs": without_losses})
    assert Image.open("export/training_curves.png").height < 1000, "one panel"
    text = written("export", RESULTS | MEASURED | {"epochs": ROWS[:1]}).text
    assert "training_curves.png" not in text and not Path("export/training_curves.png").exists()
    assert "matplotlib.pyplot" not in sys.modules, "it looks for a display"


def test_hostile_names():
    name = 'a|b: "c" `d` <e>\n--- # [f](g)'
    line = " ".join(name.split())
    data = RESULTS["dataset"] | {"name": name, "hub_id": None, "eval_split": "x|y"}
    losses = {"vid": {"student_layers": ["a|b", "`c`"], "weight": 1.0}}
    results = RESULTS | MEASURED | {"dataset": data, "losses": losses}
    recipe = RECIPE | {"dataset_name": "```\n</details>\n```"}
    loaded = written("export", results, recipe=recipe, model_name=name, tags=[name], license="other: |")
    assert loaded.data.eval_results[0].dataset_name == loaded.data.eval_results[0].dataset_type == line
    assert loaded.data.model_name == line and loaded.data.tags[-1] == name and loaded.data.license == "other: |"
    assert loaded.data.datasets is None, "a local data set has no id"
    title = loaded.text.strip().splitlines()[0]
    assert title == r"# a\|b: " + r'"c" \`d\` \<e\> --- \# \[f\](g)'
    assert f"on ``{line}`` (100 classes" in loaded.text and f"the split `x|y` of ``{line}``;" in loaded.text
    assert table_of(loaded.text, "Method")[-1][2] == r'``student_layers: ["a\|b", "`c`"]``'
    assert "\n````yaml\n" in loaded.text, "a fence that the recipe does not close"


def test_nothing_foreign_is_markup():
    """Every text in results and recipe may be a stranger's."""
    evil = "<script>x</script>\x1b[2J](http://x)\n# y"
    dataset = RESULTS["dataset"] | dict.fromkeys(("name", "hub_id", "eval_split"), evil)
    foreign = {"devices": evil, "versions": {evil: evil}, "dataset": dataset, "base_models": [evil], "git_commit": evil}
    foreign |= {"student": evil, "teacher": evil, "losses": {evil: {"weight": 1.0, evil: evil}}}
    recipe = RECIPE | {"seed": evil, "per_device_train_batch_size": evil, "optim": evil}
    card = written("run", RESULTS | MEASURED | foreign, recipe)
    shown = re.sub(r"^```.*?^```$", "", card.text, flags=re.DOTALL | re.MULTILINE)  # code blocks
    shown = re.sub(r"(`+).*?\1", "", shown.replace("\\`", ""))  # code spans
    assert not re.search(r"(?<!\\)<(?!/?details>|/?summary>)", shown) and "\x1b" not in card.content
    assert "](http://x)" not in re.sub(r"\\\\.", "", shown.replace("\\]", "")) and "\n# y" not in shown
    assert card.data.base_model is None and card.data.datasets is None
