"""The ONNX files of an export in its card, and in its repository."""

import json
from pathlib import Path

import pytest
from exported import MEASURED, onnx_file
from helpers import RESULTS
from hub_stand_in import writable_hub

from hfkd.commands.push import push
from hfkd.hub.card import update_card, write_card

HEADING = "## Files for ONNX Runtime"
EPOCH = {"epoch": 1.0, "step": 10, "top1": 70.2, "top5": 90.0}
NAMES = ("model.onnx", "preprocessing.json")
PLACES = {"float32": "onnx", "float16": "onnx_float16", "int8": "onnx_int8"}


@pytest.fixture
def student():
    """An export with a card, as a run leaves it."""
    folder = Path("run/student")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RESULTS | {"best": EPOCH, "last": EPOCH, "epochs": []}))
    (folder / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "architecture": "cifar_resnet20"}))
    (folder / "model.safetensors").write_bytes(b"the weights")
    write_card(folder)
    return folder


def card(student):
    return (student / "README.md").read_text()


def rows(student):
    """The table of the section by its first two columns."""
    section = card(student).partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    return {tuple(line[:2]): dict(zip(lines[0][2:], line[2:], strict=True)) for line in lines[2:]}


def test_the_card_shows_what_was_measured(student):
    before = card(student)
    assert HEADING not in before
    path = onnx_file(student, "int8")
    update_card(student)
    # float32 was measured beside int8, although there is no file of it.
    found = rows(student)
    assert list(found) == [("", "float32"), ("`onnx_int8/model.onnx`", "int8")]
    assert found["`onnx_int8/model.onnx`", "int8"] == {
        "top-1": "70.08",
        "same class as float32": "97.79",
        "bytes": str(path.stat().st_size),
        "ms, 1 thread": "1.36",
        "ms, all threads": "3.15",
    }
    assert found["", "float32"]["top-1"] == "70.27" and found["", "float32"]["bytes"] == "3,689,447"
    assert "the split `test` of `cifar100`" in card(student).partition(HEADING)[2].partition("\n\n|")[0]
    place = card(student).index(HEADING)
    assert card(student).index("## Results") < place < card(student).index("## Use\n")
    updated = card(student)
    update_card(student)
    assert card(student) == updated
    write_card(student)
    assert card(student) == updated, "a card that is written anew has the same section"
    (student / "model.safetensors").write_bytes(b"trained further")
    update_card(student)
    assert card(student) == before


def test_a_float32_file_alone(student):
    """Of a file that was not measured the card says the run's top-1, and nothing else."""
    path = onnx_file(student, "float32")
    update_card(student)
    assert rows(student) == {("`onnx/model.onnx`", "float32"): {"top-1": "70.20", "bytes": str(path.stat().st_size)}}


def test_other_text_of_the_card_stays(student):
    path = student / "README.md"
    path.write_text(card(student).replace("## Results", "A sentence of mine.\n\n## Results"))
    onnx_file(student, "float16")
    update_card(student)
    assert "A sentence of mine.\n\n## Results" in card(student) and HEADING in card(student)
    path.unlink()
    update_card(student)
    assert not path.exists()


def test_a_push_takes_the_files_along(student, tmp_path, monkeypatch, capsys):
    for precision in MEASURED:
        onnx_file(student, precision, precision.encode())
    path = onnx_file(student, "float16", weights="of others")
    with writable_hub(tmp_path / "cache", monkeypatch) as hub:
        push(["run", "--hub_model_id", "me/x"])
        files = hub.repositories["me/x"].files()
    onnx = {name: content for name, content in files.items() if name.startswith("onnx")}
    assert onnx.keys() == {f"{PLACES[each]}/{name}" for each in ("float32", "int8") for name in NAMES}
    assert onnx["onnx_int8/model.onnx"] == b"int8" and HEADING in files["README.md"].decode()
    assert "onnx_float16" not in files["README.md"].decode()
    printed = capsys.readouterr().out
    assert f"Not pushed: {path.resolve()} holds other weights than run/student, which was trained since." in printed
    assert "hfkd export run/student --format onnx --precision float16" in printed
