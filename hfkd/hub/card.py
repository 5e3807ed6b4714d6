"""Model card of an export: README.md with the Hub's metadata, and the figure of the training curves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from ..names import hub_id, is_local
from ..runs.folder import CONFIG_NAME, RECIPE_NAME, RESULTS_NAME
from ..runs.reading import read_results
from ..runs.writing import write_whole
from . import card_files, card_probes, card_text, card_usage
from .curves import save_curves

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
FIGURE_NAME = "training_curves.png"
BEFORE = re.compile(r"^## Use$", re.MULTILINE)  # heading that sections are written before
# Entries of results.json that every card shows.
REQUIRED = (
    *("role", "student", "teacher", "base_models", "parameters", "teacher_parameters", "losses", "ce_weight"),
    *("logit_standardization", "dataset", "published_top1", "exported", "devices", "versions", "git_commit"),
)


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
    finetuned_from: str | None = None,
) -> None:
    """Write README.md and training_curves.png into an export, from its results.json, recipe.yaml and config.json.

    ONNX files of its weights, which `hfkd export` writes beside the folder, have a section of their own.

    Args:
        folder: the export; only results.json must exist.
        repo_id: repository on the Hub that the card's code loads. None: the card's code loads a local folder.
        language, license: entries of the Hub's metadata.
        tags: tags in addition to those of the run.
        model_name: title of the card; by default the repository's name, else the student's.
        dataset: Hub id or name of the data set, in place of the run's.
        finetuned_from: Hub id of a model that the student comes from, in addition to those in the results.

    Raises:
        FileNotFoundError: without results.json.
        HfkdError: if results.json, recipe.yaml or config.json are not those of an export.
    """
    folder = Path(folder)
    results = {"epochs": []} | read_results(folder / RESULTS_NAME, REQUIRED)
    if dataset is not None:
        name = Path(dataset).name if is_local(dataset) else dataset
        results["dataset"] = {**(results["dataset"] or {}), "name": name, "hub_id": hub_id(dataset)}
    config, recipe = (_text_of(folder / name) for name in (CONFIG_NAME, RECIPE_NAME))
    config = config and json.loads(config)
    title = card_text.one_line(model_name or (repo_id or results["student"]).split("/")[-1])
    metadata = ModelCardData(
        language=language,
        license=license,
        pipeline_tag=_task(config),
        **_library_and_tags(results, config, [tags] if isinstance(tags, str) else tags or []),
        **_origin(results, finetuned_from),
        **_measured(results, title),
    )
    sections = [
        card_text.heading(title),
        card_text.summary(results),
        card_text.results_section(results, _draw(results, folder / FIGURE_NAME)),
        *measured_since(folder, results).values(),
        card_usage.usage_section(config, repo_id, results),
        card_text.method_section(results),
        card_text.training_section(results, recipe),
    ]
    body = "\n\n".join(section for section in sections if section)
    write_whole(folder / CARD_NAME, str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")))


def measured_since(folder: Path, results: dict[str, Any]) -> dict[str, str | None]:
    """Return by their headings the sections on what commands measured after the run."""
    return {
        card_probes.HEADING: card_probes.probes_section(results),
        card_files.HEADING: card_files.files_section(folder, results),
    }


def update_card(folder: Path) -> None:
    """Write what was measured after the run into an export's card, if it has one; the rest of it stays as it is."""
    path, results = folder / CARD_NAME, folder / RESULTS_NAME
    if not (path.is_file() and results.is_file()):
        return
    card = path.read_text(encoding="utf-8")
    for heading, section in measured_since(folder, read_results(results)).items():
        card = re.sub(rf"^{heading}\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
        if section is not None:
            card = BEFORE.sub(lambda found, text=section: f"{text}\n\n{found[0]}", card, count=1)
    write_whole(path, card)


def _text_of(path: Path) -> str | None:
    """Return the content of a file, or None if there is no such file."""
    return path.read_text() if path.is_file() else None


def _draw(results: dict[str, Any], path: Path) -> str | None:
    """Draw the figure and return its name, or None: a curve needs two evaluations.

    The figure of an earlier export is removed.
    """
    path.unlink(missing_ok=True)
    if len(results["epochs"]) < 2:
        return None
    save_curves(results, path)
    return path.name


def _task(config: dict[str, Any] | None) -> str:
    """Return the Hub's name of what the model does."""
    return "image-feature-extraction" if card_usage.is_backbone(config) else "image-classification"


def _library_and_tags(results: dict[str, Any], config: dict[str, Any] | None, tags: list[str]) -> dict[str, Any]:
    """Return the card's library and tags.

    The Hub offers code that loads the model for its library and for each library among its tags. The code for timm and
    transformers lacks `import hfkd`, so a model with an architecture of hfkd is tagged with neither.
    """
    library = card_usage.library_of(config)
    own = ["hfkd", _task(config)]
    own += ["knowledge-distillation", *results["losses"]] if results["losses"] else []
    own += ["logit-standardization"] if results["logit_standardization"] else []
    own += ["timm", "transformers"] if library == "timm" else []
    return {"library_name": library, "tags": own + tags}


def _origin(results: dict[str, Any], finetuned_from: str | None) -> dict[str, Any]:
    """Return the models and the data set on the Hub that the student comes from."""
    models = [name for name in results["base_models"] if card_text.is_hub_id(name)]
    models += [finetuned_from] if finetuned_from and hub_id(finetuned_from) else []
    data = results["dataset"]
    return {
        "datasets": [data["hub_id"]] if data and card_text.is_hub_id(data["hub_id"]) else None,
        "base_model": list(dict.fromkeys(models)) or None,
        # The Hub has no relation for a teacher, and would take several base models for a merge.
        "base_model_relation": "finetune" if models else None,
    }


def _measured(results: dict[str, Any], title: str) -> dict[str, Any]:
    """Return the accuracy of the exported weights; empty if the accuracy or its data set is not known."""
    data, exported = results["dataset"], results.get(results["exported"])
    if not data or "top1" not in (exported or {}):
        return {}
    name = card_text.one_line(data["name"])
    entries = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=data["hub_id"] or name,
            dataset_name=name,
            dataset_split=data.get("eval_split"),
            metric_type="accuracy",
            metric_name=metric,
            metric_value=round(exported[key], 2),
        )
        for key, metric in {"top1": "Top-1 accuracy (%)", "top5": "Top-5 accuracy (%)"}.items()
    ]
    return {"eval_results": entries, "model_name": title, "metrics": ["accuracy"]}
