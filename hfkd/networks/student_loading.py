"""Loading of a student by name: timm architecture, folder or Hub id, with the classes of the data set."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.pit import ConvEmbedding
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..errors import HfkdError
from .backbones import load_backbone
from .loading import is_architecture, load_pretrained
from .sources import create_pretrained, has_tag, read_config, resolve_name, tagged
from .wrapping import wrap_timm

# Entries of timm's pretrained_cfg that describe an architecture's published weights, which a new student does not have.
PUBLISHED_WEIGHT_KEYS = ("tag", "license", "origin_url", "test_input_size", "test_pool_size", "test_crop_pct")


def load_student(
    name_or_path: str,
    class_names: list[str] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    *,
    pretrained: bool = False,
    patch_size: int | None = None,
    drop_path_rate: float | None = None,
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a transformers image classifier to train, with the classes of the data set.

    A timm architecture (`cifar_resnet20`, `deit_tiny_distilled_patch16_224`) starts from random weights, or from timm's
    default ones if `pretrained`, and one with a tag (`resnet10t.c3_in1k`) from the weights of that tag. A folder or a
    Hub id starts from its own weights. Where the number of classes differs, or there is no classifier, it is new. With
    no classes at all the student is a backbone without a classifier, of a timm architecture.

    Args:
        name_or_path: timm architecture, folder written by `save_pretrained`, a run's folder, or Hub id.
        class_names: names of the classes, in the order of the labels; they are saved with the model.
        num_classes: number of classes, in place of `class_names`.
        image_size: side of the square input in pixels, for a timm architecture; by default its own.
        pretrained: whether an architecture without a tag starts from timm's default weights.
        patch_size: side of a ViT's patches in pixels, for a timm architecture; by default its own.
        drop_path_rate: rate of stochastic depth, for a timm architecture; by default its own.
        crop_pct, interpolation: preprocessing for evaluation, saved with the model. A model of transformers' own has an
            image processor instead.
        trust_remote_code: run the code that comes with a folder or a Hub id.

    Raises:
        HfkdError: without classes; for a name that is no architecture, folder or Hub id; for an argument that the
            architecture does not take; for an image size that its patches do not divide; for a setting of an
            architecture with a name that comes with weights.
    """
    if class_names is None:
        if num_classes is None:
            raise HfkdError("load_student needs the classes of the data set: give class_names or num_classes.")
        class_names = [str(index) for index in range(num_classes)]
    name_or_path = resolve_name(name_or_path)
    preparation = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": "center"}
    if is_architecture(name_or_path):
        architecture = tagged(name_or_path) if pretrained else name_or_path
        return _new_student(architecture, class_names, image_size, patch_size, drop_path_rate, preparation)
    settings = {"image_size": image_size, "patch_size": patch_size, "drop_path_rate": drop_path_rate}
    for key, value in settings.items():
        if value is not None:
            raise HfkdError(
                f"{key}={value} is for a timm architecture, and {name_or_path} has its own value: leave {key} out."
            )
    if class_names:
        student = load_pretrained(name_or_path, class_names, trust_remote_code=trust_remote_code)
    else:
        student = _load_headless_student(name_or_path, trust_remote_code)
    if isinstance(student, TimmWrapperPreTrainedModel):
        student.config.pretrained_cfg |= preparation
    return student


def _new_student(architecture, class_names, image_size, patch_size, drop_path_rate, preparation):
    """Return a wrapped timm architecture with random weights, or with those that its tag names."""
    overlay = dict.fromkeys(PUBLISHED_WEIGHT_KEYS) | preparation
    if image_size is not None:
        overlay["input_size"] = (3, image_size, image_size)
    shape = {} if patch_size is None else {"patch_size": patch_size}
    settings = shape if drop_path_rate is None else shape | {"drop_path_rate": drop_path_rate}
    create = create_pretrained if has_tag(architecture) else timm.create_model
    try:
        model = create(architecture, num_classes=len(class_names), pretrained_cfg_overlay=overlay, **settings)
    except TypeError as error:  # the architecture's constructor does not have this argument
        raise HfkdError(f"{architecture} does not take {', '.join(settings)}: {error}.") from error
    _check_patches(architecture, model)
    _reinitialize_zero_classifier(model)
    if image_size is not None and model.pretrained_cfg.get("fixed_input_size"):
        shape["img_size"] = image_size
    return wrap_timm(model, class_names, shape)


def _load_headless_student(name_or_path: str, trust_remote_code: bool) -> PreTrainedModel:
    if not isinstance(read_config(name_or_path, trust_remote_code), TimmWrapperConfig):
        raise HfkdError(
            f"No loss reads logits of the student, and without a classifier it must be a timm architecture, such as "
            f"resnet18, or a folder that hfkd wrote of one: {name_or_path} is neither. Or set ce_weight above 0."
        )
    return load_backbone(name_or_path, trust_remote_code=trust_remote_code)


def _check_patches(architecture: str, model: nn.Module) -> None:
    """Check that the patches of a ViT divide its input: timm's ViTs ignore the pixels beyond the last whole patch.

    Raises:
        HfkdError: if they do not; the message names the nearest sizes.
    """
    for module in model.modules():
        if isinstance(module, (PatchEmbed, ConvEmbedding)) and module.img_size is not None:
            patch, side = module.patch_size[0], module.img_size[0]
            stride = module.conv.stride[0] if isinstance(module, ConvEmbedding) else patch  # PiT's patches overlap
            rest = (side - patch) % stride
            if rest or side < patch:
                below, above = side - rest, side - rest + stride
                sizes = f"{below} or {above}" if below >= patch else str(max(above, patch))
                raise HfkdError(
                    f"image_size: {architecture} cuts its input into patches of {patch} pixels, every {stride}, which "
                    f"do not divide {side}. Take {sizes}, or another patch_size."
                )
            return  # only the first one cuts images; later ones cut feature maps


def _reinitialize_zero_classifier(model: Any) -> None:
    """Give a classifier that starts at zero, such as MLP-Mixer's, small random weights.

    All logits of such a classifier are equal at first, and nearly equal after one step. The Z-score divides by their
    standard deviation and would scale the first gradients up without bound.
    """
    classifiers = model.get_classifier()
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for module in classifier.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.any():
                trunc_normal_(module.weight, std=0.02)
