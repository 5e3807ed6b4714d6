"""`hfkd export --precision`: calibrated on training images alone, measured on the evaluation split."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

import hfkd.commands.reduced_precision as reduced_precision
from hfkd import load_student
from hfkd.commands.export import export
from hfkd.commands.reduced_precision import precision_table, read_calibration
from hfkd.data import ImageDataset, NoAugmentation
from hfkd.errors import HfkdError, RunError
from hfkd.networks.input_spec import input_spec
from hfkd.networks.wrapping import exported_state_dict

CLASSES = ["upper left", "upper right", "lower left", "lower right"]
BRIGHTEST = 140  # of training images; test images have a white corner
CALIBRATION = 32
ANY_FILE = """<ir_version: 10, opset_import: ["": 20]>
graph (float[N, 3, 32, 32] pixel_values) => (float[N, 3, 32, 32] logits) { logits = Relu(pixel_values) }"""


def squares(count, corner, seed):
    """Noise (N, 32, 32, 3) with one quarter a little brighter, and the number of the quarter."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, BRIGHTEST - 20, (count, 32, 32, 3))
    labels = np.arange(count) % 4
    for image, label in zip(pixels, labels, strict=True):
        row, column = 16 * (label // 2), 16 * (label % 2)
        image[row : row + 16, column : column + 16] += 20
    pixels[:, 0, 0] = corner or pixels[:, 0, 0]
    return pixels.astype(np.uint8), labels


def write_split(path, pixels, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [Image.fromarray(each) for each in pixels], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def trained(pixels, labels):
    torch.manual_seed(0)
    model = load_student("cifar_resnet8", CLASSES)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    data = ImageDataset(images, torch.from_numpy(labels), CLASSES, transform=NoAugmentation(), **mean_and_std(model))
    batch = data.__getitems__(range(len(data)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(25):
        for rows in torch.randperm(len(data)).split(64):
            logits = model.train()(batch["pixel_values"][rows]).logits
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, batch["labels"][rows]).backward()
            optimizer.step()
    return model.eval()


def mean_and_std(model):
    spec = input_spec(model)
    return {"mean": spec.mean, "std": spec.std}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data whose training split also holds the test images, and `run/student`, trained without them."""
    place = tmp_path_factory.mktemp("squares")
    train, test = squares(192, None, seed=1), squares(64, 255, seed=2)
    both = [np.concatenate(parts) for parts in zip(train, test, strict=True)]
    (place / "data").mkdir()
    write_split(place / "data" / "train-0.parquet", *both)
    write_split(place / "data" / "test-0.parquet", *test)
    model = trained(*train)
    model.save_pretrained(place / "run/student", state_dict=exported_state_dict(model), save_original_format=False)
    recipe = {"dataset_name": str(place / "data"), "student_name_or_path": "cifar_resnet8"}
    (place / "run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    pixels = torch.from_numpy(test[0]).permute(0, 3, 1, 2)
    data = ImageDataset(pixels, torch.from_numpy(test[1]), CLASSES, transform=NoAugmentation(), **mean_and_std(model))
    batch = data.__getitems__(range(64))
    with torch.inference_mode():
        return place, batch["pixel_values"], batch["labels"], model(batch["pixel_values"]).logits


@pytest.fixture(scope="module")
def exported(place):
    """By precision: the file and what was printed, exported when first asked for."""
    done = {}

    def export_once(precision, *arguments):
        if precision not in done:
            argv = [str(place[0] / "run/student"), "--precision", precision, *arguments]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                done[precision] = export(argv), printed
        return done[precision][0], done[precision][1].getvalue()

    return export_once


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check_measured(place, path, printed, precision, tolerance):
    """Compare the figures of a file with those counted here, and its logits with the model's."""
    _, pixels, labels, expected = place
    facts = json.loads((path.parent / "preprocessing.json").read_text())
    opened = session(path)
    logits = torch.from_numpy(opened.run(None, {"pixel_values": pixels.numpy()})[0])
    assert (logits - expected).square().mean().sqrt() <= tolerance * expected.std()
    top1 = 100 * float((logits.argmax(1) == labels).float().mean())
    own = facts["measured"][precision]
    assert facts["precision"] == precision and facts["top1"] == own["top1"] == pytest.approx(top1)
    assert facts["measured"]["float32"]["top1"] == pytest.approx(
        100 * float((expected.argmax(1) == labels).float().mean())
    )
    assert own["agreement"] == pytest.approx(100 * float((logits.argmax(1) == expected.argmax(1)).float().mean()))
    assert own["bytes"] == path.stat().st_size < facts["measured"]["float32"]["bytes"]
    assert 0 < own["ms_1_thread"] and 0 < own["ms_all_threads"]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if "|" in line}
    assert [cell.strip() for cell in rows["bytes"]] == [f"{each['bytes']:,}" for each in facts["measured"].values()]
    assert rows["top-1, %"][1].strip() == f"{top1:.2f}" and "evaluation split of 64 images" in printed
    stored = json.loads(opened.get_modelmeta().custom_metadata_map["preprocessing"])
    assert stored["class_names"] == CLASSES and stored["precision"] == precision and stored["top1"] is None
    return facts


def test_int8(place, exported):
    path, printed = exported("int8", "--calibration_images", str(CALIBRATION), "--max_drop", "20")
    assert path == place[0] / "run/onnx_int8/model.onnx"
    assert float((place[3].argmax(1) == place[2]).float().mean()) > 0.7  # a network that has learnt something
    facts = check_measured(place, path, printed, "int8", tolerance=0.15)
    made = facts["made"]
    assert made["int8_layers"] + len(made["float_layers"]) == 10 and made["calibration_images"] == CALIBRATION
    assert made["calibration"] in ("MinMax", "Entropy", "Percentile")
    assert f"ranges by {made['calibration']} of {CALIBRATION} training images" in printed
    weights = [each for each in onnx.load(path).graph.initializer if each.data_type == onnx.TensorProto.INT8]
    kernels = [each for each in weights if len(each.dims) > 1]
    assert len(kernels) == made["int8_layers"]


def test_calibration_reads_no_test_image(place, exported):
    """The white corner of test images, which are among the training images too, is outside the range of the input."""
    path, _ = exported("int8", "--calibration_images", str(CALIBRATION), "--max_drop", "20")
    graph = onnx.load(path).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    (reader,) = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "pixel_values"]
    scale, zero = values[reader.input[1]].item(), int(values[reader.input[2]])
    pixels = place[1]
    assert scale * (255 - zero) < 0.8 * pixels.max()  # of the white corner


def test_calibration_rows(place):
    model = load_student("cifar_resnet8", CLASSES)

    def data(count, seed):
        pixels, labels = squares(count, None, seed)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return ImageDataset(
            images, torch.from_numpy(labels), CLASSES, transform=NoAugmentation(), **mean_and_std(model)
        )

    calibration, held_out, labels = read_calibration(data(20, 0), data(10, 1), 12)
    assert len(calibration) == 12 and len(held_out) == len(labels) == 8
    every = {image.numpy().tobytes() for image in torch.cat([calibration, held_out])}
    assert len(every) == 20
    with pytest.raises(HfkdError, match="20 different training images .* takes 20 .*smaller --calibration_images"):
        read_calibration(data(20, 0), data(10, 1), 20)
    with pytest.raises(HfkdError, match="^0 different training images .* whose splits are apart"):
        read_calibration(data(20, 0), data(20, 0), 5)


def test_float16(place, exported):
    path, printed = exported("float16", "--max_drop", "100")
    facts = check_measured(place, path, printed, "float16", tolerance=0.005)
    assert facts["measured"]["float16"]["bytes"] < 0.7 * facts["measured"]["float32"]["bytes"]
    weights = [each for each in onnx.load(path).graph.initializer if len(each.dims) == 4]
    assert weights and all(each.data_type == onnx.TensorProto.FLOAT16 for each in weights)


def test_a_file_that_loses_more_is_there_and_the_command_fails(place, tmp_path, monkeypatch):
    any_file = tmp_path / "float32.onnx"  # only the figures count here, and an export takes seconds
    onnx.save(onnx.parser.parse_model(ANY_FILE), any_file)
    figures = {"top1": 70.0, "agreement": 80.0, "bytes": 1, "ms_1_thread": 1.0, "ms_all_threads": 1.0}
    measured = {"float32": figures | {"top1": 71.0}, "float16": figures}
    monkeypatch.setattr(reduced_precision, "measure", lambda *_: measured)
    monkeypatch.setattr(reduced_precision, "write_model", lambda *given: shutil.copy(any_file, given[3]))
    argv = [str(place[0] / "run/student"), "--precision", "float16", "--output_dir", str(tmp_path / "half")]
    with pytest.raises(
        RunError, match=r"float16 loses 1.00 points of top-1, and --max_drop allows 0.5. .*half"
    ) as told:
        export(argv)
    assert told.value.exit_code == 1
    assert json.loads((tmp_path / "half/preprocessing.json").read_text())["measured"] == measured
    session(tmp_path / "half/model.onnx")


def test_a_cpu_without_int8_instructions_is_told(monkeypatch):
    figures = {"top1": 70.0, "agreement": 80.0, "bytes": 1, "ms_1_thread": 1.0, "ms_all_threads": 1.0}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert "This CPU has no instructions for int8" in precision_table({"float32": figures, "int8": figures}, 10)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert "instructions" not in precision_table({"float32": figures, "int8": figures}, 10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "int8", "--format", "torch"], "--precision int8 needs --format onnx, got torch"),
        (["--precision", "bf16"], "ONNX Runtime cannot run bf16 on a CPU.*--precision float16"),
        (["--precision", "int4"], "unknown 'int4'. Did you mean 'int8'"),
        (["--precision", "int8", "--teacher", "x"], "not with a --teacher"),
        (["--precision", "int8", "--calibration_images", "0"], "calibration_images must be 1 or more"),
        (["--precision", "int8", "--max_drop", "-1"], "max_drop must not be negative"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(HfkdError, match=message):
        export(["nowhere", *arguments])


def test_a_run_without_a_recipe_and_one_that_streams(tmp_path):
    Path("run/student").mkdir(parents=True)
    Path("run/student/config.json").write_text("{}")
    argv = ["run/student", "--precision", "int8"]
    with pytest.raises(HfkdError, match="needs the data of MODEL's run, and there is no run/recipe.yaml"):
        export(argv)
    recipe = {"dataset_name": "digits", "streaming": True, "augmentation": "random_resized_crop"}
    Path("run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(HfkdError, match="streams its images"):
        export(argv)
