"""The site: every method has its texts, the generated parts hold what the package knows, and names are real."""

import importlib.util
import re

import pytest
from helpers import ROOT

import hfkd
from hfkd.cli import COMMANDS
from hfkd.losses import LOSSES
from hfkd.recipe.reading import KEYS
from hfkd.runs.published import published_runs

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_its_texts(hooks):
    assert hooks.missing_texts() == [], "write docs/methods/NAME.md, as the others are"
    for name in LOSSES:
        text = (hooks.METHODS / f"{name}.md").read_text()
        sections = re.split(r"(?m)^## .*\n", text)
        assert re.findall(r"(?m)^## .*", text) == list(hooks.HANDWRITTEN), name
        assert all(section.strip() for section in sections), f"{name} has an empty section"


def test_the_readme_names_every_method_and_is_short():
    names = re.findall(r"\[`(\w+)`\]\(docs/methods/(\w+)\.md\)", README)
    assert all(name == page for name, page in names)
    assert sorted(name for name, _ in names) == sorted(LOSSES), "README, section Methods"
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("name", LOSSES)
def test_the_page_of_a_method(hooks, name):
    """It holds what docstring, signature and published runs say, without a line written for it."""
    page = hooks.method_page(
        name, "The idea again.\n\n## When to take it\n\nNow.\n\n## Faults of the release\n\nNone.\n"
    )
    assert page.index("# ") == 0 and page.index("The idea again.") < page.index("## Formula") < page.index("Now.")
    assert hooks.functions(name), f"{name} publishes no function"
    for function in hooks.functions(name):
        assert f"`{function.__name__}`" in page
    described = hooks.argument_texts(LOSSES[name])
    for parameter in hooks.arguments(name):
        assert f"\n    {parameter.name}: " in page and described.get(parameter.name), f"{name}: {parameter.name}"
    assert "Reads the" in page or "Reads maps" in page or "Reads embeddings" in page
    assert LOSSES[name].citation.strip().splitlines()[0] in page and f"::: {LOSSES[name].__module__}" in page
    if name in ("kd", "dkd", "mlkd", "ctkd", "fitnet", "crd", "simkd"):
        assert "## Published" in page


def test_published_rows(hooks):
    rows = [row for name in LOSSES for row in hooks.published_rows(name)[2:]]
    assert sum(row.count("\n| `") for row in rows) == sum(
        bool(hooks.method_of(run)) for run in published_runs().values()
    )
    assert "| `cifar100/resnet56-resnet20/dkd_zscore` | 72.32 |" in hooks.method_page("dkd", "")
    assert "resnet8x4/fitnet` |" in hooks.method_page("fitnet", "") and "fitnet" not in hooks.published_rows("kd")[-1]


def test_measured_rows_stand_beside_those_of_kd(hooks):
    page = hooks.method_page("fitnet", "")
    assert (
        "| KD + FitNet | 22.20 | 44.99 | 47.18 |" in page
        and "| KD | 15.47 |" in page
        and "AT" not in page.split("API")[0]
    )
    assert "71.43" in hooks.method_page("kd", "") and "| KD + Z-score | 58.92" in hooks.method_page("kd", "")


def test_tables_name_what_exists(hooks):
    """Keys of the tables for users of other libraries, and the messages of the troubleshooting page."""
    parameters = {f"losses.{name}.{each.name}" for name in LOSSES for each in hooks.arguments(name)}
    known = {*KEYS, *LOSSES, *parameters, *(name.rpartition(".")[2] for name in parameters)}
    rows = re.findall(r"(?m)^\| .* \| (.*) \|$", (ROOT / "docs" / "coming_from.md").read_text())
    keys = [key for row in rows for key in re.findall(r"`([a-z][a-z_]*(?:\.\w+)*)(?::.*?)?`", row)]
    assert len(keys) > 60
    unknown = [key for key in keys if key not in known and not key.startswith("cifar_")]
    assert unknown == ["compute_metrics"]  # of Trainer, and no key of a recipe

    source = "\n".join(path.read_text() for path in (ROOT / "hfkd").rglob("*.py"))
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)  # messages of several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("Not an error")[0]
    messages = [message for row in re.findall(r"(?m)^\| (`.*?) \|", page) for message in re.findall(r"`(.*?)`", row)]
    assert len(messages) > 20
    for message in messages:
        parts = [re.escape(part) for part in re.split(r"'?\.\.\.'?", message)]
        assert re.search(".*".join(parts), source), f"no message has {message!r}"


def test_the_page_on_versions_lists_the_public_names():
    row = re.search(r"(?m)^\| the names of `hfkd.__all__` \| (.*) \|$", (ROOT / "docs" / "stability.md").read_text())[1]
    assert re.findall(r"`(\w+)`", row) == hfkd.__all__


def test_pages_name_commands_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for verb in re.findall(r"(?m)(?:^|`|-m )hfkd ([a-z-]+)", page.read_text()):
            assert verb in COMMANDS, f"{page}: hfkd {verb}"
