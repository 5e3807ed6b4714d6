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
import yaml
from helpers import ROOT

import hfkd

SOURCES = ("hfkd", "recipes", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SOURCES += ("CHANGELOG.md", "CITATION.cff")
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
    told = [line for line in (done.stdout + done.stderr).splitlines() if "byte-compiling is disabled" not in line]
    assert not [line for line in told if re.search("warning|deprecat", line, re.IGNORECASE)]
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built_files(tmp_path_factory):
    """A checkout, its source distribution unpacked, and the wheels that both build."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path, copy = ROOT / name, source / name
        shutil.copytree(path, copy, symlinks=True, ignore=ignored) if path.is_dir() else shutil.copy(path, copy)
    with tarfile.open(built("sdist", source, folder)) as sdist:
        sdist.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.glob("hfkd-*") if path.is_dir())
    (folder / "of_checkout").mkdir()
    return source, unpacked, built("wheel", source, folder / "of_checkout"), built("wheel", unpacked, folder)


@pytest.fixture(scope="module")
def environment(built_files):
    """The interpreter of an environment with nothing but the wheel; the libraries are those of this one."""
    *_, wheel = built_files
    folder = wheel.parent
    venv.create(folder / "environment", symlinks=True)
    (site,) = (folder / "environment").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "environment" / "bin" / "python"


def test_what_is_distributed(built_files):
    source, unpacked, of_checkout, of_sdist = built_files
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in (of_checkout, of_sdist)]
    assert names[0] == names[1]
    package = {path.relative_to(source).as_posix() for path in (source / "hfkd").rglob("*.py")}
    recipes = {f"hfkd/{path.relative_to(source)}" for path in (source / "recipes").rglob("*") if path.is_file()}
    others = {"hfkd/py.typed", "hfkd/runs/published.json"}
    assert {name for name in names[0] if ".dist-info/" not in name} == package | recipes | others
    assert "hfkd/recipes/digits.yaml" in recipes and "hfkd/cli.py" in package
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= {path.name for path in unpacked.iterdir()}
    assert not (unpacked / "tests").exists()


def test_one_version(built_files):
    """That of the package, in the names of both files and in the citation."""
    source, unpacked, *wheels = built_files
    assert unpacked.name == f"hfkd-{hfkd.__version__}"
    assert {wheel.name for wheel in wheels} == {f"hfkd-{hfkd.__version__}-py3-none-any.whl"}
    citation = yaml.safe_load((source / "CITATION.cff").read_text())
    assert citation["version"] == hfkd.__version__ and citation["title"] == "hfkd"
    heading = re.search(r"(?m)^## (.*)", (source / "CHANGELOG.md").read_text())[1]
    assert heading == "Unreleased" if "dev" in hfkd.__version__ else heading.startswith(hfkd.__version__)


def test_the_wheel_alone_is_enough(environment, tmp_path):
    done = subprocess.run(
        [environment, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(environment.parents[1]) in done.stdout.splitlines()[0], "not the checkout"
    assert re.search(r"\| cifar100/resnet56-resnet20/kd_zscore +\| cifar_resnet20 .* 71.43 ", done.stdout)
    assert (tmp_path / "runs/digits/student/student/model.safetensors").is_file()
    assert "usage: hfkd reproduce PAIR" in done.stdout
