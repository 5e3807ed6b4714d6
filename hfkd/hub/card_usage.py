"""Use of a model in a card: code that loads it, for every library that can."""

from __future__ import annotations

import re
from typing import Any

import timm

from .card_text import code, fenced

LOCAL_FOLDER = "path/to/this/folder"  # path in the code of a card that has no repository

PIPELINE_CODE = """
from transformers import pipeline

classify = pipeline("image-classification", model="{model}")
print(classify("image.jpg"))
"""

TRANSFORMERS_CODE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{model}")
model = AutoModelForImageClassification.from_pretrained("{model}")
inputs = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(dim=1).item()])
"""

TIMM_CODE = """
import timm
import torch
from PIL import Image

model = timm.create_model("{model}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax(dim=1).item()])
"""

FEATURES_CODE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{model}")
model = AutoModel.from_pretrained("{model}")
inputs = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    embedding = model(**inputs).pooler_output
"""

TIMM_FEATURES_CODE = """
import timm
import torch
from PIL import Image

model = timm.create_model("{model}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    embedding = model(transform(Image.open("image.jpg").convert("RGB"))[None])
maps = timm.create_model("{model}", pretrained=True, features_only=True)  # of every stage, for detectors
"""


def usage_section(config: dict[str, Any] | None, repo_id: str | None, results: dict[str, Any]) -> str:
    """Return code that loads the model and runs it on an image, for every library that can load it."""
    if config is None:
        return "## Use\n\n`model.safetensors` holds the state dict of a module that is not part of this repository."
    registering, parts = "", ["## Use"]
    if library_of(config) == "hfkd":
        registering = f"import hfkd  # registers {config['architecture']} with timm\n"
        parts.append(f"{_install(results)} Its import makes the architecture known to both libraries.")
    backbone = is_backbone(config)
    parts.append("With transformers:")
    parts += [
        fenced("python", registering + template.strip().format(model=repo_id or LOCAL_FOLDER))
        for template in ((FEATURES_CODE,) if backbone else (PIPELINE_CODE, TRANSFORMERS_CODE))
    ]
    if config["model_type"] == "timm_wrapper" and "int8_layers" not in config:  # timm refuses weights it does not know
        name = f"hf-hub:{repo_id}" if repo_id else f"local-dir:{LOCAL_FOLDER}"
        template = TIMM_FEATURES_CODE if backbone else TIMM_CODE
        parts += ["With timm:", fenced("python", registering + template.strip().format(model=name))]
    if backbone:
        parts += ["With hfkd, a classifier of your images:", fenced("bash", _fine_tuning(repo_id or LOCAL_FOLDER))]
    return "\n\n".join(parts)


def _fine_tuning(model: str) -> str:
    return f"hfkd train-teacher --dataset_name path/to/labelled --student {model}"


def is_backbone(config: dict[str, Any] | None) -> bool:
    """Return True for the config.json of a timm model without a classifier."""
    return config is not None and config.get("num_classes") == 0


def _install(results: dict[str, Any]) -> str:
    """Return how to install the hfkd that trained the model: only a release has a version that pip finds."""
    version, commit = results["versions"].get("hfkd"), results["git_commit"]
    if commit:
        return f"Install hfkd first, from a checkout: the model was trained with its commit {code(commit)}."
    if version and re.fullmatch(r"\d+(\.\d+)*", version):
        return f"`pip install hfkd=={version}` first."
    return f"Install hfkd first, from a checkout: the model was trained with {code(version)}, which is no release."


def library_of(config: dict[str, Any] | None) -> str | None:
    """Return the library that loads a model with this config.json.

    It is transformers, timm (also through transformers' wrapper), or hfkd, whose import registers the architecture.
    None for a module without a config.json.
    """
    if config is None:
        return None
    if config["model_type"] != "timm_wrapper":
        return "transformers"
    name = config["architecture"]
    return "hfkd" if timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("hfkd.") else "timm"
