"""Zero-shot classifiers: CLIP and SigLIP with a text for each class.

Papers: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021; Zhai et al.,
Sigmoid Loss for Language Image Pre-Training, ICCV 2023.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from ..errors import HfkdError
from .sources import check_backbone_loaded, not_found_error, read_config, resolve_name

NAME = "{}"  # stands for the name of the class in a prompt
TEXT_AND_IMAGES = ("clip", "metaclip_2", "siglip")  # model types; SigLIP 2 of a fixed size is a "siglip"
NO_NAMES = r"(LABEL_|class[ _]?)?\d+|n\d{8}"  # numbers, also those of ImageNet's classes in WordNet
PROMPTS_A_BATCH = 256


class ZeroShotNetwork(nn.Module):
    """Classifier of images by the similarity of their features to features of texts.

    Args:
        tower: the vision tower, with the pooled features as `pooler_output`.
        projection: of the pooled features into the space of the texts.
        classifier: a `TextClassifier`.
        class_names: names of its classes.
        prompts: templates of the texts.
    """

    def __init__(
        self,
        tower: nn.Module,
        projection: nn.Module,
        classifier: TextClassifier,
        class_names: Sequence[str],
        prompts: Sequence[str],
    ):
        super().__init__()
        self.tower, self.projection, self.classifier = tower, projection, classifier
        self.class_names, self.prompts = list(class_names), list(prompts)
        self.num_classes = len(class_names)

    def get_classifier(self) -> nn.Module:
        """Return the module that computes the logits, as timm's models do; its input is the embedding."""
        return self.classifier

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, 3, H, W)."""
        return self.classifier(self.projection(self.tower(pixel_values).pooler_output))


class TextClassifier(nn.Module):
    """Scaled cosine of image features (B, D) and text features of C classes, plus a bias: logits (B, C), in float32.

    In bf16 logits of 25, which are usual, would be rounded to eighths.

    Args:
        features: (C, D), of length 1.
        scale, bias: numbers.
    """

    def __init__(self, features: Tensor, scale: float, bias: float):
        super().__init__()
        # Not in the state: the prompts tell a cache's teacher, and text features are rounded differently elsewhere.
        self.register_buffer("features", features, persistent=False)
        self.scale, self.bias = scale, bias

    def forward(self, embedding: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = F.normalize(embedding.to(self.features.dtype), dim=1) @ self.features.T
        return cosine * self.scale + self.bias


def check_prompts(prompts: Sequence[str]) -> None:
    """Check that every prompt has a place for the name of the class.

    Raises:
        HfkdError: for one without `{}`.
    """
    for prompt in prompts:
        if NAME not in prompt:
            raise HfkdError(
                f"teacher_prompts: '{prompt}' has no {NAME}, where the name of the class is put: 'a photo of a {NAME}'."
            )


def check_has_texts(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Check that a teacher with prompts is CLIP or SigLIP, by its configuration.

    Raises:
        HfkdError: if it is another network, which cannot read texts.
    """
    name_or_path = resolve_name(name_or_path)
    kind = name_or_path
    if not timm.is_model(name_or_path):
        kind = read_config(name_or_path, trust_remote_code).model_type
    if kind not in TEXT_AND_IMAGES:
        raise HfkdError(
            f"teacher_prompts are for CLIP or SigLIP (model types {', '.join(TEXT_AND_IMAGES)}), and {name_or_path} "
            f"{'is a timm architecture' if kind == name_or_path else f'has the type {kind}'}, which reads no texts as "
            "they do: leave teacher_prompts out, or name another teacher."
        )


def check_class_names(class_names: Sequence[str]) -> None:
    """Check that there are names that a text can hold.

    Raises:
        HfkdError: if there are none, or all are numbers.
    """
    if class_names and not all(re.fullmatch(NO_NAMES, name) for name in class_names):
        return
    given = f"its classes are named {', '.join(map(repr, class_names[:3]))}, ..." if class_names else "it has none"
    raise HfkdError(
        f"teacher_prompts hold the names of the data set's classes, and {given}: give names that a text can hold, such "
        "as those of the class folders."
    )


def load_zero_shot(
    name_or_path: str, class_names: Sequence[str], prompts: Sequence[str]
) -> tuple[ZeroShotNetwork, PreTrainedModel]:
    """Load CLIP or SigLIP from a folder or the Hub as a classifier of images, in float32.

    The features of a class are the mean of those of its texts, one a prompt, each of length 1, scaled to length 1
    again. Underscores in names are read as spaces. The text tower and the tokenizer are not kept.

    Args:
        class_names: names of the classes, in the order of the labels.
        prompts: templates such as "a photo of a {}".

    Returns:
        The classifier, and the whole model, which tells the size and normalisation of its images.

    Raises:
        HfkdError: for prompts without `{}`, classes without names, a network of another kind, or weights that are not
            in its checkpoint.
    """
    check_prompts(prompts)
    check_has_texts(name_or_path)
    check_class_names(class_names)
    name_or_path = resolve_name(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # whatever a damaged file or a package that is not installed makes it raise
        raise not_found_error("tokenizer", name_or_path, error) from error
    try:
        model, info = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise not_found_error("weights", name_or_path, error) from error
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    check_backbone_loaded(model, absent, name_or_path)
    features = _text_features(model.eval(), tokenizer, class_names, prompts)
    bias = getattr(model, "logit_bias", None)  # SigLIP's
    classifier = TextClassifier(features, model.logit_scale.exp().item(), 0.0 if bias is None else bias.item())
    projection = getattr(model, "visual_projection", nn.Identity())  # SigLIP has none
    return ZeroShotNetwork(model.vision_model, projection, classifier, class_names, prompts), model


@torch.no_grad()
def _text_features(model: Any, tokenizer: Any, class_names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return the features (C, D) of the classes, of length 1."""
    names = [name.replace("_", " ") for name in class_names]
    texts = [prompt.replace(NAME, name) for name in names for prompt in prompts]
    settings: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
    longest = model.config.text_config.max_position_embeddings
    is_siglip = model.config.model_type == "siglip"
    if is_siglip:  # trained on texts that are filled up, whose padding it reads
        settings |= {"padding": "max_length"}
    found = []
    for start in range(0, len(texts), PROMPTS_A_BATCH):
        words = tokenizer(texts[start : start + PROMPTS_A_BATCH], max_length=longest, **settings)
        mask = {} if is_siglip else {"attention_mask": words["attention_mask"]}
        found.append(F.normalize(model.get_text_features(words["input_ids"], **mask).pooler_output, dim=1))
    return F.normalize(torch.cat(found).unflatten(0, (len(names), len(prompts))).mean(dim=1), dim=1)
