"""Size and normalisation of the images that a network takes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..errors import HfkdError
from .channels import check_channels
from .features import InputSpec
from .sources import not_found_error


def input_spec(model: nn.Module) -> InputSpec:
    """Return input size and normalisation of a timm model, or of a transformers model from a folder or the Hub.

    Raises:
        HfkdError: for a network of another number of channels than three, a transformers model whose image processor is
            not supported, or a damaged configuration.
    """
    check_channels(model)
    if isinstance(model, TimmWrapperPreTrainedModel):
        # The timm model has a pretrained_cfg as well, but timm makes it anew when a folder is loaded.
        cfg: Any = getattr(model.config, "pretrained_cfg", None)
    elif isinstance(model, PreTrainedModel):
        trusted = type(model).__module__.startswith("transformers_modules.")  # its code runs already
        return _processor_input_spec(load_processor(model.name_or_path, trusted), model.name_or_path)
    else:
        cfg = model.pretrained_cfg
    try:
        return InputSpec(cfg["input_size"][-1], tuple(cfg["mean"]), tuple(cfg["std"]))
    except (LookupError, TypeError) as error:
        raise HfkdError(
            "The configuration of the model does not hold the size and the normalisation of its images: pretrained_cfg "
            f"in its config.json needs input_size, mean and std, and is {cfg!r:.80}."
        ) from error


def _processor_input_spec(processor, name_or_path: str | None) -> InputSpec:
    # Processors differ in their attributes. One without an attribute does not take that step.
    crops = getattr(processor, "do_center_crop", False)
    size = (getattr(processor, "crop_size", None) if crops else None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    if side is None or getattr(processor, "do_flip_channel_order", False):
        raise HfkdError(
            f"The image processor of {name_or_path} is not supported (size {dict(size)}, BGR: "
            f"{bool(getattr(processor, 'do_flip_channel_order', False))}): expected a side in pixels and RGB."
        )
    if not getattr(processor, "do_normalize", False):
        return InputSpec(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return InputSpec(side, tuple(processor.image_mean), tuple(processor.image_std))


def known_input_spec(model: nn.Module) -> InputSpec | None:
    """Return `input_spec`, or None for a model without information on its input."""
    if isinstance(model, PreTrainedModel) and not isinstance(model, TimmWrapperPreTrainedModel):
        try:
            return input_spec(model)
        except OSError:  # made from a configuration, or saved without its image processor
            return None
    has_config = isinstance(model, TimmWrapperPreTrainedModel) or hasattr(model, "pretrained_cfg")
    return input_spec(model) if has_config else None


def load_processor(name_or_path: Any, trust_remote_code: bool = False) -> Any:
    """Return the image processor of a folder or a Hub id.

    Raises:
        NotFoundError: if there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_found_error("image processor", name_or_path, error) from error
