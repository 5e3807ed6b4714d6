"""The probes of an export in its card."""

import json
from pathlib import Path

import pytest
from helpers import RESULTS

from hfkd.commands.evaluate import evaluate
from hfkd.hub.card import write_card
from hfkd.hub.card_probes import HEADING
from hfkd.networks.student_loading import load_student

DIGITS = ["--dataset_name", "digits", "--eval_split", "test[:60]"]


@pytest.fixture
def student():
    """An export with a card, as a run leaves it."""
    folder = Path("run/student")
    load_student("cifar_resnet8", []).save_pretrained(folder)
    others = {"epochs": [], "recipe": None, "seed": 1, "planned_steps": 10}
    (folder / "results.json").write_text(json.dumps(RESULTS | others))
    write_card(folder)
    return folder


def rows(student):
    section = (student / "README.md").read_text().partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    return [tuple(line) for line in lines[2:]]


def test_the_card_shows_the_probes(student):
    before = (student / "README.md").read_text()
    assert HEADING not in before
    first = evaluate([str(student), *DIGITS, "--train_split", "train[:100]", "--probe", "knn"])["eval_knn"]
    images = ("`digits`", "`train[:100]`, 100", "`test[:60]`, 60")
    assert rows(student) == [(*images, f"{first:.2f}", "")]
    # Further probes of the same images join the row, those of others get one of their own.
    linear = evaluate([str(student), *DIGITS, "--train_split", "train[:100]", "--probe", "linear"])["eval_linear"]
    more = evaluate([str(student), *DIGITS, "--train_split", "train[:200]", "--probe", "knn"])["eval_knn"]
    assert rows(student) == [
        (*images, f"{first:.2f}", f"{linear:.2f}"),
        ("`digits`", "`train[:200]`, 200", "`test[:60]`, 60", f"{more:.2f}", ""),
    ]
    card = (student / "README.md").read_text()
    write_card(student)
    assert (student / "README.md").read_text() == card, "a card that is written anew has the same section"
    assert card.replace(card[card.index(HEADING) : card.index("## Use\n")], "") == before


def test_a_folder_without_a_card_stays_as_it_is():
    load_student("cifar_resnet8", []).save_pretrained("student")
    evaluate(["student", *DIGITS, "--train_split", "train[:100]", "--probe", "knn"])
    assert not Path("student/results.json").exists() and not Path("student/README.md").exists()
