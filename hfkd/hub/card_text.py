"""Text of a model card, section by section, in Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from ..losses import LOSSES
from ..losses.regions import CITATION as REGIONS_CITATION
from ..losses.standardize import CITATION
from ..recipe.config import DistillationConfig
from ..recipe.yaml_file import parse_yaml
from ..runs.finished import BY_TOP1, best_words
from ..runs.tables import markdown_table, plain, without_empty_columns

# ---- Sections ------------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any]) -> str:
    """Return a summary of the model: student, teacher, method and data set."""
    own, theirs = results["parameters"], results["teacher_parameters"]
    kind = "image classifier" if results.get("has_classifier", True) else "image backbone without a classifier"
    student = f"This {kind}, {code(results['student'])} with {own:,} parameters, was"
    on = f" on {_dataset(results['dataset'])}" if results["dataset"] else ""
    if not results["losses"]:
        purpose = " to teach smaller ones" if results["role"] == "teacher" else ""
        return f"{student} trained with hfkd from the labels alone{on}{purpose}."
    methods = " + ".join([*map(code, results["losses"]), *["Z-score"] * results["logit_standardization"]])
    if results["teacher"] is None:
        return f"{student} trained with hfkd{on}. The method is {methods}, which needs no teacher."
    teacher = ("the ensemble " if " + " in results["teacher"] else "") + code(results["teacher"])
    share = f"{100 * own / theirs:.3g} % of" if own < theirs else f"{own / theirs:.3g} times"
    return (
        f"{student} taught with hfkd by {teacher} with {theirs:,} parameters{on}. The method is {methods}; the student "
        f"has {share} its teacher's parameters."
    )


def _dataset(data: dict[str, Any]) -> str:
    """Return a data set's name, with a link and its numbers of classes and images if they are known."""
    name = code(data["name"])
    name = f"[{name}](https://huggingface.co/datasets/{data['hub_id']})" if is_hub_id(data["hub_id"]) else name
    counts = {"classes": data.get("classes"), "training images": data.get("train_images")}
    counts["images without labels"] = data.get("unlabelled_images")
    known = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"{name} ({known})" if known else name


def results_section(results: dict[str, Any], figure: str | None) -> str | None:
    """Return the table of measured accuracies and the curves; None for a run without an evaluation."""
    if "last" not in results:
        return None
    images = images_in_words(results)
    best = f"the best epoch is the one with {best_words(results.get('best_by', BY_TOP1))} there"
    parts = ["## Results"]
    if "top1" in results["last"]:
        header = ["", "epoch", "top-1", "top-5", "agreement with the teacher", "top-1 against the published"]
        parts += [f"In percent of {images}; {best}.", _table(header, _measured(results))]
    else:
        header = ["", "epoch", "loss", "agreement with the teacher, %"]
        what = f"No accuracy was measured. The loss is the sum of the weighted terms on {images}"
        parts += [f"{what}; {best}.", _table(header, _measured_terms(results))]
    if "diverged" in results:
        found = results["diverged"]
        parts.append(
            f"The run diverged at step {found['step']} ({found['reason']}); the figures are of finite weights."
        )
    others = results[results["exported"]].get("others", {})
    if others:
        rows = [[code(name), f"{value:.4g}"] for name, value in others.items()]
        parts += ["Also measured, for these weights:", _table(["metric", "value"], rows)]
    parts += [f"![Accuracy and loss terms over the epochs]({figure})"] if figure else []
    return "\n\n".join(parts)


def images_in_words(results: dict[str, Any]) -> str:
    """Return which images a run is evaluated on."""
    data, images = results.get("dataset"), "the evaluation images"
    if not data:
        return images
    split = data.get("eval_split")
    return f"{f'the split {code(split)}' if split else images} of {code(data['name'])}"


def _measured(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the results table; for published run and teacher, only the top-1 is known."""
    published = results["published_top1"]
    rows = [
        [
            name,
            f"{row['epoch']:g}",
            *(f"{row[key]:.2f}" if key in row else "" for key in ("top1", "top5", "agreement")),
            "" if published is None else f"{row['top1'] - published:+.2f}",
        ]
        for name, row in _epochs(results).items()
    ]
    teacher = [row["eval_teacher_top1"] for row in results["epochs"] if "eval_teacher_top1" in row]
    others = {"published": published, "teacher": teacher[-1] if teacher else None}
    return rows + [[name, "", f"{top1:.2f}", "", "", ""] for name, top1 in others.items() if top1 is not None]


def _measured_terms(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the results table of an evaluation without labels."""
    return [
        [name, f"{row['epoch']:g}", f"{row['loss']:.4g}", f"{row['agreement']:.2f}" if "agreement" in row else ""]
        for name, row in _epochs(results).items()
    ]


def _epochs(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measurements of the best and the last epoch by their names in a table."""
    best, last = results["best"], results["last"]
    epochs = {"best epoch": best, "last epoch": last} if best["step"] != last["step"] else {"best, last epoch": last}
    exported = results["exported"]
    return {f"**{name}**, these weights" if exported in name else name: row for name, row in epochs.items()}


def method_section(results: dict[str, Any]) -> str:
    """Return the losses with their settings, and the citations."""
    if not results["losses"]:
        own = results.get("label_loss")
        of_labels = f"{f'{code(own)} of' if own else 'Cross-entropy with'} the labels; no teacher."
        return "\n\n".join(["## Method", of_labels, *_rounding(results)])
    own = results.get("label_loss")  # the user's, in place of the cross-entropy
    rows = [[f"{code(own)} of the labels" if own else "cross-entropy with the labels", f"{results['ce_weight']:g}", ""]]
    for name, settings in results["losses"].items():
        others = [code(f"{key}: {json.dumps(value)}") for key, value in settings.items() if key != "weight"]
        rows.append([code(name), f"{settings['weight']:g}", ", ".join(others)])
    parts = ["## Method", _table(["loss", "weight", "settings"], rows)]
    if "teacher_cache" in results:
        parts.append(_cache(results["teacher_cache"]))
    citations = [LOSSES[name].citation for name in results["losses"] if name in LOSSES]
    if any(settings.get("regions") for settings in results["losses"].values()):
        citations.append(REGIONS_CITATION)
    if results["logit_standardization"]:
        parts.append("Z-score: the logits of student and teacher are standardized before they are compared.")
        citations.append(CITATION)
    parts += _rounding(results)
    if citations:
        parts.append(fenced("bibtex", "\n\n".join(map(inspect.cleandoc, citations))))
    return "\n\n".join(parts)


def _rounding(results: dict[str, Any]) -> list[str]:
    """Return a paragraph on the training in simulated int8, none for another one."""
    if results.get("quantize") != "int8":
        return []
    return [
        "The weights were trained quantization-aware, for int8: the figures are those of simulated int8, which hfkd "
        "computes. `hfkd export --precision int8` writes the int8 file. Other libraries compute with the same weights "
        "in float32 and leave the ranges (`*.range`) out."
    ]


def _cache(cache: dict[str, Any]) -> str:
    """Return a sentence on the teacher cache."""
    epochs, top_k = cache["epochs"], cache["top_k"]
    stored = "in float16" if top_k is None else f"the largest {top_k} of an image and what the others come to"
    number = "one epoch" if epochs == 1 else f"{epochs:,} epochs"
    return f"The teacher's logits were read from a cache of {number} ({stored}), which longer training repeats."


def training_section(results: dict[str, Any], recipe: str | None) -> str:
    """Return the settings, the command that repeats the run, and the environment."""
    rows = [] if recipe is None else _settings(parse_yaml(recipe, "recipe.yaml"))
    rows.append(["devices", plain(results["devices"])])
    if "seconds" in results:
        rows.append(["time, with evaluations", _duration(results["seconds"])])
    if results.get("images_per_second"):
        rows.append(["training images/s", f"{results['images_per_second']:,.0f}"])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rows.append(["versions", plain(versions)])
    if results["git_commit"]:
        rows.append(["commit of hfkd", code(results["git_commit"])])
    section = f"## Training\n\n{_table(['setting', 'value'], rows)}"
    return section if recipe is None else f"{section}\n\n{_recipe(results, recipe)}"


def _settings(recipe: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the settings table, with defaults for keys that the recipe leaves out."""
    values = {field.name: field.default for field in dataclasses.fields(DistillationConfig)} | recipe
    optimizer = [code(values["optim"]), *([code(values["optim_args"])] if values["optim_args"] else [])]
    schedule = [f"{values['learning_rate']:g}"]
    if values["lr_milestones"]:
        milestones = ", ".join(f"{epoch:g}" for epoch in values["lr_milestones"])
        schedule.append(f"times {values['lr_gamma']:g} after epoch {milestones}")
    else:
        warmup = values["warmup_steps"]
        schedule.append(f"schedule {code(values['lr_scheduler_type'])}")
        if warmup:
            schedule.append(f"warm-up {f'{warmup:g}' if warmup >= 1 else f'{100 * warmup:.3g} % of the'} steps")
    batch = f"{plain(str(values['per_device_train_batch_size']))} images a device"
    accumulated = values["gradient_accumulation_steps"]
    steps = values["max_steps"]
    return [
        ["optimizer", ", ".join([*optimizer, f"weight decay {values['weight_decay']:g}"])],
        ["learning rate", ", ".join(schedule)],
        ["steps", f"{steps:,}"] if steps > 0 else ["epochs", f"{values['num_train_epochs']:g}"],
        ["batch size", batch + (f", {accumulated} batches a step" if accumulated > 1 else "")],
        ["precision", "bf16" if values["bf16"] else "fp16" if values["fp16"] else "float32"],
        ["seed", plain(str(values["seed"]))],
    ]


def _recipe(results: dict[str, Any], recipe: str) -> str:
    """Return the whole recipe and, for a run that a recipe started, the command that repeats it."""
    parts = []
    if {"student_name_or_path", "dataset_name"} <= parse_yaml(recipe, "recipe.yaml").keys():
        count = results["devices"].partition(" ")[0]
        processes = int(count) if count.isdecimal() else 1
        program = f"accelerate launch --num_processes {processes} -m hfkd" if processes > 1 else "hfkd"
        verb = "train-teacher" if results["role"] == "teacher" else "distill"
        own = ", with files of your own where it says `path/to`" if "path/to/" in recipe else ""
        parts.append(f"The same run again, from [recipe.yaml](recipe.yaml){own}:")
        parts.append(fenced("bash", f"{program} {verb} recipe.yaml"))
    parts += ["<details>\n<summary>recipe.yaml</summary>", fenced("yaml", recipe.strip()), "</details>"]
    return "\n\n".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


# ---- Markdown: names may hold any characters -------------------------------------------------------------------------


def one_line(text: str) -> str:
    """Return a text with all white space replaced by single spaces."""
    return " ".join(text.split())


def is_hub_id(name: Any) -> bool:
    """Return True for an id on the Hub, whose characters cannot end a link."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None


def heading(text: str) -> str:
    """Return a heading of the first level, with Markdown's special characters escaped."""
    return "# " + re.sub(r"([\\`*<>\[\]|#])", r"\\\1", text)


def code(text: str) -> str:
    """Return a code span that shows the text as it is; `markdown_table` escapes its bars."""
    text = one_line(str(text))
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(language: str, text: str) -> str:
    """Return a code block that shows the text as it is."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return markdown_table(*without_empty_columns(header, rows))
