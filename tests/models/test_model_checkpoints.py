"""Reading published and own checkpoints, and what is said of files that do not fit."""

import argparse
import fractions
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hfkd.models import load_checkpoint
from hfkd.models.checkpoints import load_architecture

torch.set_num_threads(1)


@pytest.fixture
def saved() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("cifar_resnet8")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(2)
    return timm.create_model("cifar_resnet8")


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def error_of(model: nn.Module, path: Path) -> str:
    """The message of the ValueError; it names the file, and the model is as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, path)
    assert str(path) in str(error.value)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".bin", ".ckpt", ".t7", ""])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "net", "model_state_dict", "ema", "student"])
def test_reads_torch_files(saved, model, tmp_path, suffix, key):
    path = tmp_path / f"teacher{suffix}"
    beside = {"epoch": 240, "best_acc": torch.tensor(72.3), "optimizer": {"state": {}, "lr": 0.05}}
    torch.save(saved.state_dict() if key is None else {**beside, key: saved.state_dict()}, path)
    assert load_checkpoint(model, path) is model
    assert_same_weights(model, saved)


@pytest.mark.parametrize("name", ["teacher.safetensors", "student_best", "best.ckpt"])
def test_reads_safetensors_named_by_a_string(saved, model, tmp_path, name):
    path = str(tmp_path / name)
    save_file(saved.state_dict(), path)
    load_checkpoint(model, path)
    assert_same_weights(model, saved)


def test_drops_the_prefix_of_data_parallel(saved, model, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": nn.DataParallel(saved).state_dict()}, path)
    load_checkpoint(model, path)
    assert_same_weights(model, saved)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "student.", "module._orig_mod.", "model.student."]
)
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_drops_prefixes(saved, model, tmp_path, prefix, key):
    path = tmp_path / "teacher.ckpt"
    weights = {prefix + name: tensor for name, tensor in saved.state_dict().items()}
    torch.save({key: weights} if key else weights, path)
    load_checkpoint(model, path)
    assert_same_weights(model, saved)
    assert_same_weights(load_architecture("cifar_resnet8", path), saved)


def test_prefixes_are_dropped_from_all_names_or_from_none(saved, model, tmp_path):
    path = tmp_path / "teacher.pth"
    weights = {f"student.{name}": tensor for name, tensor in saved.state_dict().items()}
    torch.save(weights | {"teacher.fc.bias": torch.zeros(3)}, path)
    message = error_of(model, path)
    assert "57 unexpected: student.conv1.weight" in message and "another architecture" in message
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in saved.state_dict().items()}, path)
    assert "checkpoint has 100 classes, the model 10" in error_of(
        timm.create_model("cifar_resnet8", num_classes=10), path
    )


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)


def test_a_model_whose_own_names_begin_so(tmp_path):
    saved, model = Wrapped(), Wrapped()
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    assert_same_weights(load_checkpoint(model, tmp_path / "a.pth"), saved)


def test_the_entry_that_fits_is_loaded(saved, model, tmp_path):
    path = tmp_path / "both.pth"
    teacher = timm.create_model("cifar_resnet14").state_dict()
    torch.save({"model": teacher, "student": saved.state_dict()}, path)
    load_checkpoint(model, path)
    assert_same_weights(model, saved)
    torch.save({"model": {"state_dict": saved.state_dict()}}, path)
    assert_same_weights(load_architecture("cifar_resnet8", path), saved)


def test_timms_own_checkpoint(saved, model, tmp_path):
    path = tmp_path / "model_best.pth.tar"
    settings = argparse.Namespace(model="cifar_resnet8", lr=0.05)
    content = {"epoch": 3, "args": settings, "metric": np.float64(71.2), "best": np.float32(1)}
    torch.save(content | {"state_dict": saved.state_dict()}, path)
    load_checkpoint(model, path)
    assert_same_weights(model, saved)


def test_reads_the_file_format_and_the_batchnorm_of_old_pytorch(saved, model, tmp_path):
    path = tmp_path / "teacher.pth"
    weights = {name: t for name, t in saved.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    load_checkpoint(model, path)
    assert_same_weights(model, saved)


def test_another_architecture_lists_five_names_of_each_kind_and_counts_the_rest(saved, tmp_path):
    path = tmp_path / "resnet8.pth"
    torch.save(saved.state_dict(), path)
    message = error_of(timm.create_model("cifar_resnet14"), path)
    assert "does not fit CifarResNet" in message
    assert "30 missing: layer1.1.conv1.weight, layer1.1.bn1.weight," in message and "and 25 more" in message
    assert "unexpected" not in message and "another shape" not in message

    message = error_of(timm.create_model("cifar_resnet8x4"), path)
    assert "5 missing: layer1.0.downsample.0.weight" in message
    assert "conv1.weight (16, 3, 3, 3) for (32, 3, 3, 3)" in message

    message = error_of(timm.create_model("cifar_vgg8"), path)
    assert "56 unexpected: conv1.weight, bn1.weight" in message and "missing: block0.0.weight" in message


def test_another_number_of_classes_is_said_plainly(saved, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": saved.state_dict()}, path)
    message = error_of(timm.create_model("cifar_resnet8", num_classes=10), path)
    assert "checkpoint has 100 classes, the model 10" in message
    assert "fc.weight, fc.bias" in message and "num_classes=100" in message and "reset_classifier(10)" in message


def test_a_wider_network_with_other_classes_is_not_called_a_classifier_mismatch(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("cifar_wrn_16_1").state_dict(), path)
    assert "classes" not in error_of(timm.create_model("cifar_wrn_16_2", num_classes=10), path)


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_objects_are_refused_with_the_way_out(saved, model, tmp_path, old_format):
    path = tmp_path / "teacher.pth"
    content = {"opt": fractions.Fraction(1, 20), "model": saved.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    message = error_of(model, path)
    assert "pickled objects" in message and "fractions.Fraction" in message
    way_out = f"torch.save(torch.load({str(path)!r}, weights_only=False)['model'], 'new.pth')"
    assert way_out in message
    eval(way_out.replace("'new.pth'", repr(str(path))), {"torch": torch})
    load_checkpoint(model, path)
    assert_same_weights(model, saved)


def test_a_missing_file_is_a_file_not_found_error(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="teacher.pth"):
        load_checkpoint(model, tmp_path / "teacher.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"cat\ndog\n", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint(model, tmp_path, suffix, content):
    path = tmp_path / f"notes{suffix}"
    path.write_bytes(content)
    message = error_of(model, path)
    assert "is not a" in message or "holds no state dict" in message


def test_a_file_cut_short(saved, model, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(saved.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "not a whole checkpoint" in error_of(model, path)


def test_another_suffix(model, tmp_path):
    path = tmp_path / "teacher.onnx"
    path.write_bytes(b"")
    assert "neither torch.save nor safetensors wrote it" in error_of(model, path)


@pytest.mark.parametrize("content", [{"epoch": 3, "loss": [1.0]}, [torch.zeros(2)], {"model": {}}, {0: torch.zeros(2)}])
def test_a_file_without_a_state_dict(model, tmp_path, content):
    path = tmp_path / "log.pt"
    torch.save(content, path)
    assert "holds no state dict" in error_of(model, path)
