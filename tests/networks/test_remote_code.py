"""Code that comes with a model: never run and never asked about, unless trust_remote_code says so."""

import builtins
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import dynamic_module_utils

from hfkd import load_student, load_teacher
from hfkd.cli import main
from hfkd.commands.build import build_student, load_teachers
from hfkd.networks.loading import check_model
from hfkd.recipe.arguments import DataArguments, ModelArguments

CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTForImageClassification

Path("ran").touch()

class StrangerConfig(ViTConfig):
    model_type = "stranger"

class Stranger(ViTForImageClassification):
    config_class = StrangerConfig
"""


@pytest.fixture(autouse=True)
def no_question(monkeypatch, tmp_path):
    def fail(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(builtins, "input", fail)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def stranger():
    """A small ViT whose classes are in a file beside it."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=10)
    ViTForImageClassification(config).save_pretrained("stranger")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("stranger")
    Path("stranger/code.py").write_text(CODE)
    path = Path("stranger/config.json")
    auto_map = {"AutoConfig": "code.StrangerConfig", "AutoModelForImageClassification": "code.Stranger"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "stranger", "auto_map": auto_map}))
    return "stranger"


@pytest.mark.parametrize("load", [load_teacher, lambda name: load_student(name, num_classes=10), check_model])
def test_code_of_others_does_not_run(load, stranger):
    with pytest.raises(FileNotFoundError, match="stranger comes with code of its own, which was not run.*: true"):
        load(stranger)
    assert not Path("ran").exists()


def test_every_command_refuses_it(stranger, capsys):
    Path("r.yaml").write_text(yaml.safe_dump({"student_name_or_path": stranger, "dataset_name": "digits"}))
    for argv in (["evaluate", stranger, "--dataset_name", "digits"], ["train-teacher", "r.yaml"], ["export", stranger]):
        with pytest.raises(SystemExit) as ending:
            main(argv)
        error = capsys.readouterr().err
        assert ending.value.code == 2 and re.search("code of its own", error), error
    assert not Path("ran").exists()


def test_code_that_is_trusted_runs(stranger):
    arguments = ModelArguments(stranger, teacher_name_or_path=stranger, trust_remote_code=True)
    student = build_student(arguments, DataArguments("digits"), [str(index) for index in range(10)], None)
    (teacher,) = load_teachers(arguments)
    assert type(student).__name__ == type(teacher.model).__name__ == "Stranger" and Path("ran").exists()
