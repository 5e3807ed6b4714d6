"""From a teacher without a classifier to a backbone, and from there to a classifier."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModel, BitImageProcessor, Dinov2Config, Dinov2Model

from hfkd.cli import main
from hfkd.commands.train import distill, train_teacher
from hfkd.commands.visualize import visualize
from hfkd.errors import HfkdError
from hfkd.recipe.yaml_file import read_yaml

SETTINGS = "--image_size 32 --per_device_train_batch_size 4 --dataloader_num_workers 0 --max_steps 2 --use_cpu true"
SETTINGS = [*SETTINGS.split(), "--disable_tqdm", "true", "--report_to", "none"]
WITHOUT_SIZE = SETTINGS[2:]  # a folder has its own


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photographs, a teacher without a classifier, and the backbone that it has taught."""
    place = tmp_path_factory.mktemp("backbones")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for split, count in (("train", 2), ("test", 1)):
            for label, name in enumerate(("ant", "bee", "cat")):
                for number in range(count):
                    path = Path("photos", split, name, f"{number}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (50, 40), (80 * label + 20, 30 * number, 90)).save(path)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        Dinov2Model(Dinov2Config(**sizes, image_size=32)).save_pretrained("dino")
        BitImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained("dino")
        distill(["--dataset_name", "photos/", "--teacher", "dino", "--student", "cifar_resnet8", *SETTINGS, *ALONE])
    return place


ALONE = ["--ce_weight", "0", "--output_dir", "runs/backbone"]
FOLDER = "runs/backbone/student"


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def test_the_recipe_of_a_teacher_without_a_classifier():
    """Without a loss it is token MSE, and no loss of logits comes from the defaults."""
    recipe = read_yaml(Path("runs/backbone/recipe.yaml"))
    assert recipe["losses"] == {"token_mse": {"weight": 1}} and recipe["ce_weight"] == 0
    results = json.loads(Path("runs/backbone/results.json").read_text())
    assert results["recipe"] == "photographs/features" and results["has_classifier"] is False
    assert results["teacher"] == "dinov2" and all("eval_top1" not in row for row in results["epochs"])
    assert results["best"]["loss"] == min(row["eval_loss_token_mse"] for row in results["epochs"])


def test_what_loads_the_backbone():
    pixels = torch.rand(2, 3, 32, 32)
    network = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    embedding = network(pixels)
    assert network.num_classes == 0 and embedding.shape == (2, 64)
    model = AutoModel.from_pretrained(FOLDER).eval()
    torch.testing.assert_close(model(pixels).pooler_output, embedding)
    weights = f"{FOLDER}/model.safetensors"
    alone = timm.create_model("cifar_resnet8", num_classes=0, checkpoint_path=weights).eval()
    torch.testing.assert_close(alone(pixels), embedding)
    maps = timm.create_model(f"local-dir:{FOLDER}", pretrained=True, features_only=True).eval()(pixels)
    assert [feature_map.shape[1] for feature_map in maps] == [16, 16, 32, 64]
    torch.testing.assert_close(maps[-1].mean(dim=(2, 3)), embedding)


def test_the_card_says_what_it_is():
    card = Path(FOLDER, "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card and "image-classification" not in card
    assert "image backbone without a classifier, `cifar_resnet8`" in card and "taught with hfkd by `dinov2`" in card
    assert "AutoModel.from_pretrained" in card and "num_classes=0" in card and "features_only=True" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "pooler_output" in code


def test_fine_tuning_without_and_with_a_teacher(capsys):
    backbone = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)
    words = ["--dataset_name", "photos/", "--student", FOLDER]
    teacher = train_teacher([*words, *WITHOUT_SIZE, "--learning_rate", "0", "--output_dir", "runs/teacher"])
    network = teacher.model.timm_model
    assert network.num_classes == 3 and torch.equal(network.conv1.weight, backbone.conv1.weight)
    student = distill([*words, "--teacher", "runs/teacher", *WITHOUT_SIZE, "--output_dir", "runs/tuned"])
    assert student.results.rows[-1]["eval_top1"] >= 0 and "eval_agreement" in student.results.rows[-1]
    assert not torch.equal(student.model.timm_model.conv1.weight, backbone.conv1.weight)
    assert "photographs/student" in Path("runs/tuned/results.json").read_text()


def test_figures_leave_out_a_teacher_without_classes(capsys):
    words = [
        "--dataset_name",
        "photos/",
        "--teacher",
        "dino",
        "--student",
        "cifar_resnet8",
        "--output_dir",
        "runs/seen",
    ]
    trainer = distill([*words, *SETTINGS, "--losses.pkt.weight", "1"])
    assert "eval_top1" in trainer.results.rows[-1] and "eval_agreement" not in trainer.results.rows[-1]
    written = visualize(["runs/seen", "--figures", "logit_spread"])
    assert [path.name for path in written] == ["logit_spread.png"]
    printed = capsys.readouterr().out
    assert "leave out the teacher dinov2: it lacks the student's classes" in printed
    with pytest.raises(HfkdError, match="The figures compare logits, and dino has no classifier"):
        visualize(["runs/seen", "--figures", "logit_spread", "--teacher", "dino"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", FOLDER, "--dataset_name", "photos"], f"{FOLDER} has no classifier. Fine-tune it"),
        (["visualize", FOLDER, "--dataset_name", "photos"], f"{FOLDER} has no classifier. Fine-tune it"),
        (["compare", "runs/backbone"], "runs/backbone trained a backbone without a classifier, which has no top-1"),
        (
            ["distill", "own.yaml", "--losses.kd.temperature=2"],
            "The losses ['kd'] read logits or a classifier, and the",
        ),
        (["distill", "own.yaml", "--losses.simkd.factor=2"], "The losses ['simkd'] read logits or a classifier, and"),
        (
            ["cache-teacher", "own.yaml", "--losses.kd.temperature=2"],
            "The losses ['kd'] read logits or a classifier, and",
        ),
        (["search", "own.yaml", "--losses.pkt.weight=1", "--ce_weight=0"], "nothing trains a classifier"),
        (
            ["distill", "own.yaml", "--losses.pkt.weight=1", "--teacher", "dino", "dino"],
            "has no classifier: give it alone",
        ),
    ],
)
def test_refusals(words, message, capsys, monkeypatch):
    """Each ends with 2 before the weights of a teacher or any image is read."""
    # `build` comes last: the others take its functions when they are first imported, and would keep what stands in.
    for module in ("cache_teacher", "evaluate", "search", "visualize", "build"):
        monkeypatch.setattr(f"hfkd.commands.{module}.load_teachers", None, raising=False)
        if module != "cache_teacher":  # which reads the number of classes first
            monkeypatch.setattr(f"hfkd.commands.{module}.load_splits", None, raising=False)
    own = "student_name_or_path: cifar_resnet8\nteacher_name_or_path: dino\ndataset_name: photos\n"
    Path("own.yaml").write_text(own + "search: {learning_rate: {low: 1.0e-5, high: 0.2}}\n")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
