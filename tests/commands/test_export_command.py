"""`hfkd export`: each kind of student as one file that other runtimes read, and the costs beside its teacher's."""

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from data.pictures import photo
from helpers import ROOT, Plain, config, images, probe_weight
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import hfkd
from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.commands.export import Side, cost_table, export, find_teacher, side_of_teacher
from hfkd.export.formats import FORMATS, FileModel
from hfkd.networks.features import InputSpec
from hfkd.networks.wrapping import exported_state_dict, wrap_timm

CLASSES = ["ant", "Große Katze", "bee, wild"]
RESULTS = {"exported": "best", "best": {"top1": 81.25}, "last": {"top1": 79.0}, "dataset": {"name": "pets"}}
RESULTS["dataset"]["eval_split"] = "test"
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def simkd():
    data = images(8, classes=3)
    student, teacher = (load_student(name, data.class_names) for name in ("cifar_resnet8", "cifar_resnet14"))
    return DistillationTrainer(student, teacher, config(losses={"simkd": {}}), train_dataset=data).model


def distilled_deit():
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    overlay = {"input_size": (3, 32, 32)}
    name = "deit_tiny_distilled_patch16_224"
    deit = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=overlay, **settings)
    return wrap_timm(deit, CLASSES, settings)


def vit():
    id2label = dict(enumerate(CLASSES))
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, id2label=id2label, **TINY_VIT))


MODELS = {
    "cnn": lambda: load_student("cifar_resnet8", CLASSES, crop_pct=0.8, interpolation="bilinear"),
    "deit": distilled_deit,
    "t2t": lambda: load_student("t2t_vit_7", CLASSES, image_size=32, crop_pct=0.9),
    "simkd": simkd,
    "vit": vit,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Trained models in `runs/<name>/student`; a teacher in `teacher`, which the recipe of `runs/cnn` names."""
    place = tmp_path_factory.mktemp("secret_place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, build in MODELS.items():
            model = build()
            with torch.no_grad():
                for key, value in model.state_dict().items():
                    value.copy_(probe_weight(key, value))
            folder = Path("runs", name, "student")
            model.save_pretrained(folder, state_dict=exported_state_dict(model), save_original_format=False)
        ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
        teacher = load_student("cifar_resnet14", CLASSES)
        teacher.save_pretrained("teacher", state_dict=exported_state_dict(teacher), save_original_format=False)
        Path("runs/cnn/recipe.yaml").write_text(yaml.safe_dump({"teacher_name_or_path": [str(place / "teacher")]}))
        Path("runs/cnn/student/results.json").write_text(json.dumps(RESULTS))
        yield place


@pytest.fixture(scope="module")
def exported(place):
    """By name and format: the folder that `hfkd export` left and what it printed, made when first asked for."""
    done = {}

    def export_once(name, file_format="onnx"):
        if (name, file_format) not in done:
            student, folder = place / "runs" / name / "student", place / "elsewhere" / name
            where = ["--output_dir", str(folder)] if file_format == "torch" else []
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                path = export([str(student), "--format", file_format, *where])
            assert path.parent == (folder if where else student.parent / "onnx")
            done[name, file_format] = path.parent, printed.getvalue()
        return done[name, file_format]

    return export_once


def load(place, name):
    return AutoModelForImageClassification.from_pretrained(place / "runs" / name / "student").eval()


@torch.inference_mode()
def expected_logits(place, name, pixel_values):
    return load(place, name)(pixel_values).logits.numpy()


def batch(size):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check_file(place, name, run, metadata, folder, file_name):
    assert sorted(path.name for path in folder.iterdir()) == sorted([file_name, "preprocessing.json"])
    assert metadata == (folder / "preprocessing.json").read_text()
    for size in (1, 3, 5):
        expected = expected_logits(place, name, batch(size))
        assert expected.std() > 0.02
        np.testing.assert_allclose(run(batch(size)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_gives_the_logits(place, exported, name):
    folder = exported(name)[0]
    opened = session(folder / "model.onnx")
    (given,), (answer,) = opened.get_inputs(), opened.get_outputs()
    assert (given.name, given.shape, given.type) == ("pixel_values", ["batch", 3, 32, 32], "tensor(float)")
    assert (answer.name, answer.shape) == ("logits", ["batch", 3])
    metadata = opened.get_modelmeta().custom_metadata_map["preprocessing"]
    check_file(
        place,
        name,
        lambda pixels: opened.run(None, {"pixel_values": pixels.numpy()})[0],
        metadata,
        folder,
        "model.onnx",
    )
    onnx.checker.check_model(folder / "model.onnx", full_check=True)


@pytest.mark.parametrize("name", ["cnn", "deit"])
def test_torch_export_gives_the_logits(place, exported, name):
    folder = exported(name, "torch")[0]
    extra = {"preprocessing.json": ""}
    module = torch.export.load(folder / "model.pt2", extra_files=extra).module()
    metadata = extra["preprocessing.json"]
    metadata = metadata if isinstance(metadata, str) else metadata.decode()
    check_file(place, name, lambda pixels: module(pixels).detach().numpy(), metadata, folder, "model.pt2")


def test_a_distilled_deit_gives_the_mean_of_its_heads(place, exported):
    model = load(place, "deit").timm_model
    with torch.inference_mode():
        tokens = model.forward_features(batch(4))
        heads = [model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])]
    assert (heads[0] - heads[1]).abs().max() > 0.1
    (given,) = session(exported("deit")[0] / "model.onnx").run(None, {"pixel_values": batch(4).numpy()})
    np.testing.assert_allclose(given, (heads[0] + heads[1]) / 2, rtol=0, atol=1e-5)


def test_what_the_file_says(place, exported):
    facts = json.loads((exported("cnn")[0] / "preprocessing.json").read_text())
    preparation = facts.pop("preparation")
    assert preparation.startswith("Resize an RGB image, its shorter side to 40 pixels (bilinear, antialiased), cut out")
    assert facts == {
        "architecture": "cifar_resnet8",
        "image_size": 32,
        "crop_pct": 0.8,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.5071, 0.4867, 0.4408],
        "std": [0.2675, 0.2565, 0.2761],
        "class_names": CLASSES,
        "top1": 81.25,
        "dataset": "pets",
        "eval_split": "test",
        "weights": hashlib.sha256((place / "runs/cnn/student/model.safetensors").read_bytes()).hexdigest(),
        "hfkd_version": hfkd.__version__,
    }
    facts = json.loads((exported("vit")[0] / "preprocessing.json").read_text())
    assert (facts["architecture"], facts["crop_mode"], facts["top1"]) == ("vit", "squash", None)
    assert facts["class_names"] == CLASSES


def prepared(facts, image):
    """What preprocessing.json says, with Pillow and numpy alone."""
    size, resized = facts["image_size"], math.floor(facts["image_size"] / facts["crop_pct"])
    sides = (resized, resized)
    if facts["crop_mode"] == "center":
        sides = [int(resized * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling[facts["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return ((pixels - facts["mean"]) / facts["std"]).transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.parametrize("name", ["cnn", "t2t", "vit"])
def test_images_prepared_as_the_file_says(place, exported, name):
    processor = AutoImageProcessor.from_pretrained(place / "runs" / name / "student")
    opened = session(exported(name)[0] / "model.onnx")
    facts = json.loads(opened.get_modelmeta().custom_metadata_map["preprocessing"])
    picture = photo(64, 48)
    expected = expected_logits(place, name, processor(picture, return_tensors="pt")["pixel_values"])
    (given,) = opened.run(None, {"pixel_values": prepared(facts, picture)})
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


def test_nothing_of_this_machine_is_in_the_files(exported):
    paths = [b"secret_place", str(ROOT).encode(), b"site-packages", b"/home/", b"/tmp/"]
    content = (exported("cnn")[0] / "model.onnx").read_bytes()
    assert not [path for path in paths if path in content]
    with zipfile.ZipFile(exported("cnn", "torch")[0] / "model.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert not [path for path in paths if path in content]


# ---- Costs ---------------------------------------------------------------------------------------------------------


def cells(printed):
    """The table by label."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {label: values for label, *values in rows[1:]}, rows[0]


@pytest.mark.parametrize("file_format, runtime", [("onnx", "ONNX Runtime"), ("torch", "torch.export")])
def test_student_and_teacher_side_by_side(exported, file_format, runtime):
    """The teacher is that of the run's recipe."""
    folder, printed = exported("cnn", file_format)
    (path,) = folder.glob("model.*")
    rows, head = cells(printed)
    assert head == ["teacher: cifar_resnet14", "student: cifar_resnet8", "teacher / student"]
    parameters = [
        sum(value.numel() for value in load_student(f"cifar_resnet{n}", CLASSES).parameters()) for n in (14, 8)
    ]
    assert rows["parameters"] == [*(f"{count:,}" for count in parameters), f"{parameters[0] / parameters[1]:.2f}"]
    teacher_size, student_size, _ = map(float, rows[f"{path.name}, MB"])
    assert student_size == pytest.approx(path.stat().st_size / 1e6, abs=0.005) and teacher_size > 1.5 * student_size
    for label in ("torch, ms an image", f"{runtime}, ms an image"):
        teacher, student, ratio = map(float, rows[label])
        assert ratio == pytest.approx(teacher / student, rel=0.05) and ratio > 1.2
    assert "CPU, 1 thread, float32, one image at a time, fastest of 30" in printed


def test_without_a_teacher_there_is_one_column(exported):
    printed = exported("t2t")[1]
    assert "Not compared with a teacher: there is no recipe of the run. Name it with --teacher NAME_OR_PATH." in printed
    rows, head = cells(printed)
    assert head == ["student: t2t_vit_7"] and len(rows["torch, ms an image"]) == 1


@pytest.mark.parametrize(
    "recipe, why",
    [
        ({"losses": {}}, "runs/cnn/student/recipe.yaml names none"),
        ({"teacher_cache": "runs/cache/x"}, "runs/cnn/student/recipe.yaml names none"),
        ({"teacher_name_or_path": ["a/b", "c/d"]}, "runs/cnn/student/recipe.yaml names an ensemble"),
        ({"teacher_name_or_path": "path/to/teacher"}, "could not be loaded .'path/to/teacher' is no timm architecture"),
    ],
)
def test_why_there_is_no_teacher(recipe, why, capsys):
    Path("runs/cnn/student").mkdir(parents=True)
    Path("runs/cnn/student/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert find_teacher("runs/cnn/student", None) is None
    assert re.search(f"Not compared with a teacher: .*{why}.*--teacher", capsys.readouterr().out)


def test_the_teacher_that_is_named(place, monkeypatch):
    """Its weights may lie in a file of their own; what is given on the command line wins."""
    monkeypatch.chdir(place)
    recipe = {"teacher_name_or_path": ["cifar_resnet14"], "teacher_checkpoint": ["teacher/model.safetensors"]}
    Path("runs/simkd/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert find_teacher("runs/simkd/student", None).name == "cifar_resnet14"
    assert find_teacher("runs/simkd/student", "runs/cnn/student").name == "cifar_resnet8"
    with pytest.raises(ValueError, match="'no/such/teacher' is no timm architecture"):
        find_teacher("runs/simkd/student", "no/such/teacher")


def test_a_teacher_that_the_format_cannot_express_is_a_gap(monkeypatch, capsys):
    monkeypatch.setattr("hfkd.export.formats.LARGEST_ONNX", 2_000)  # between the two
    side = side_of_teacher(Teacher(Plain(width=16), "plain", InputSpec(32, (0.0,) * 3, (1.0,) * 3)), FORMATS["onnx"])
    assert "The teacher was not exported. The weights take" in capsys.readouterr().out
    table = cost_table(
        {"teacher": side, "student": Side(Plain(), 1, 32, FileModel(Plain()), 2_000_000)}, FORMATS["onnx"]
    )
    rows, _ = cells(table)
    assert rows["model.onnx, MB"] == ["–", "2.00", "–"]
    teacher, student, ratio = rows["ONNX Runtime, ms an image"]
    assert (teacher, ratio) == ("–", "–") and float(student) > 0


# ---- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, error, message",
    [
        ([], ValueError, "must be the model's folder or Hub id, got ''. Usage: hfkd export MODEL"),
        (["--format", "onnx"], ValueError, "must be the model's folder or Hub id, got '--format'"),
        (["runs/cnn/student", "--format", "onxx"], ValueError, "--format: invalid choice: 'onxx'.*onnx.*torch"),
        (["runs/cnn/student", "--outputdir", "x"], ValueError, "'outputdir'.*Did you mean 'output_dir'"),
        (["runs/cnn"], FileNotFoundError, "runs/cnn holds no model .config.json.. Did you mean runs/cnn/student?"),
        (["runs"], FileNotFoundError, "runs holds no model .config.json.. Give the folder of a trained model"),
        (["runs/cnm/student"], FileNotFoundError, "There is no model at runs/cnm/student"),
        (["runs/cnn/student", "--teacher", "cifar_resnet14"], ValueError, "no pretrained weights to teach with"),
    ],
)
def test_bad_input(place, argv, error, message, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(error, match=message):
        export(argv)
    assert sorted(place.rglob("*")) == before


def test_without_onnx_it_says_what_to_install(place, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ImportError, match=r'pip install "hfkd\[export\]"'):
        export([str(place / "runs/cnn/student"), "--output_dir", "out"])
    assert not Path("out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit):
        export(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: hfkd export MODEL") and "--format {onnx,torch}" in printed


def test_the_program_of_the_guide_reads_the_file(place, exported, monkeypatch, capsys):
    """docs/phone.md: without hfkd and torch, from a photograph to the class of the exported model."""
    folder = exported("cnn")[0]
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "phone.md").read_text(), re.DOTALL)[-1]
    monkeypatch.chdir(place)
    photo(60, 40).save("photo.jpg", quality=100)
    program = program.replace("runs/photos/mobilenetv4_conv_small/onnx_int8", str(folder))
    space = {}
    exec(program, space)
    classify = pipeline("image-classification", model=str(place / "runs" / "cnn" / "student"))
    assert capsys.readouterr().out.split("\n")[-2] == classify(Image.open("photo.jpg"), top_k=1)[0]["label"]
    expected = expected_logits(place, "cnn", classify.image_processor(Image.open("photo.jpg"))["pixel_values"])
    np.testing.assert_allclose(space["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
