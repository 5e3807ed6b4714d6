"""The wheel, built from the source distribution, works in an empty environment and an empty folder."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from helpers import ROOT

SOURCES = ("hfkd", "recipes", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
PROGRAM = """
import hfkd
from hfkd.cli import main

print(hfkd.__file__)
main(["recipes", "resnet56-resnet20"])
main("distill digits/student --num_train_epochs 1 --train_split train[:128] --disable_tqdm true".split())
main(["reproduce", "resnet56-resnet20", "--help"])
"""


def built(kind, folder, output):
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(output)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The interpreter of an environment with nothing but the wheel; the libraries are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path, copy = ROOT / name, folder / "source" / name
        shutil.copytree(path, copy, symlinks=True, ignore=ignored) if path.is_dir() else shutil.copy(path, copy)
    with tarfile.open(built("sdist", folder / "source", folder)) as sdist:
        sdist.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.glob("hfkd-*") if path.is_dir())
    wheel = built("wheel", unpacked, folder)
    venv.create(folder / "environment", symlinks=True)
    (site,) = (folder / "environment").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "environment" / "bin" / "python"


def test_the_wheel_alone_is_enough(environment, tmp_path):
    done = subprocess.run(
        [environment, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(environment.parents[1]) in done.stdout.splitlines()[0], "not the checkout"
    assert re.search(r"\| cifar100/resnet56-resnet20/kd_zscore +\| cifar_resnet20 .* 71.43 ", done.stdout)
    assert (tmp_path / "runs/digits/student/student/model.safetensors").is_file()
    assert "usage: hfkd reproduce PAIR" in done.stdout
