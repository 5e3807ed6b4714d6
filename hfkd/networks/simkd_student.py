"""Student of SimKD: a network up to one of its maps, a projector, and the classifier of its teacher.

Paper: Chen, Mei, Zhang, Wang, Feng and Chen, Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import HfkdError
from ..losses.feature_maps import as_map
from ..models.base import CifarModel
from ..models.tokens import TokenClassifier


class SimKDStudent(nn.Module):
    """Classifier: images -> map of the trunk -> projector -> average over positions -> classifier.

    All arguments are JSON values, so that the configuration of a saved model can hold them. The trunk is either a timm
    architecture up to one of its stages, or the base model of a transformers classifier.

    Args:
        num_classes: 0 for no classifier.
        student_width: channels of the trunk's map.
        teacher_width: channels of the teacher's map, whose average the classifier reads.
        teacher_size: height and width of the teacher's map; a larger map of the trunk is averaged down to it.
        factor: the projector's inner channels are teacher_width divided by it.
        architecture: a timm architecture.
        architecture_args: keywords for the timm architecture.
        stage: index into its `feature_info`.
        student_config: configuration of a transformers classifier with its `model_type`, in place of an architecture.
        removed: paths of the trunk's modules that do not affect its map, such as the classifier.

    Raises:
        HfkdError: if factor is larger than teacher_width.
    """

    def __init__(
        self,
        num_classes: int,
        student_width: int,
        teacher_width: int,
        teacher_size: Sequence[int],
        factor: int,
        architecture: str | None = None,
        architecture_args: dict[str, Any] | None = None,
        stage: int | None = None,
        student_config: dict[str, Any] | None = None,
        removed: Sequence[str] = (),
    ):
        super().__init__()
        if factor > teacher_width:
            raise HfkdError(f"factor is {factor}: it must not be above the teacher's {teacher_width} channels")
        self.teacher_size = tuple(teacher_size)
        self.stage = stage
        self.num_features = self.head_hidden_size = teacher_width
        self.backbone = new_trunk(architecture, architecture_args, student_config)
        remove_modules(self.backbone, removed)
        if stage is not None:  # a trunk of transformers has no stages
            stages = self.backbone.feature_info[: stage + 1]
            self.feature_info = [info | {"module": f"backbone.{info['module']}"} for info in stages]
        self.projector = new_projector(student_width, teacher_width, factor)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or an identity if `num_classes` is 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; `num_classes=0` removes it."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute the trunk's stages or blocks in the backward pass.

        Raises:
            HfkdError: for a trunk that is not an architecture of hfkd. Half of timm's families do not checkpoint in
                `forward_intermediates`, which gives the map of a stage.
        """
        if enable and not isinstance(self.backbone, (CifarModel, TokenClassifier)):
            raise HfkdError(f"gradient checkpointing: {type(self.backbone).__name__} does not support it as a trunk")
        if isinstance(self.backbone, (CifarModel, TokenClassifier)):
            self.backbone.set_grad_checkpointing(enable)

    @property
    def extra_parameters(self) -> int:
        """Number of parameters of projector and classifier, beyond the trunk."""
        return sum(value.numel() for part in (self.projector, self.classifier) for value in part.parameters())

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> projected map (B, teacher_width, h, w), no larger than the teacher's."""
        x = trunk_map(self.backbone, self.stage, x)
        size = [min(sides) for sides in zip(x.shape[2:], self.teacher_size, strict=True)]
        return self.projector(x if list(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of `forward_features` -> logits (B, num_classes) or embedding (B, teacher_width)."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def new_trunk(
    architecture: str | None, architecture_args: dict[str, Any] | None, student_config: dict[str, Any] | None
) -> nn.Module:
    """Return a trunk with random weights; for the arguments, see `SimKDStudent`."""
    if student_config is None:
        return timm.create_model(architecture, **(architecture_args or {}))
    # Imported here, since this module is imported with timm: `import timm` must not import transformers.
    from transformers import AutoConfig, AutoModelForImageClassification

    return AutoModelForImageClassification.from_config(AutoConfig.for_model(**student_config)).base_model


def trunk_map(trunk: nn.Module, stage: int | None, images: Tensor) -> Tensor:
    """Return the trunk's map (B, C, H, W).

    It is the map of a stage of a timm model, or without a stage the last hidden state of a transformers base model.

    Raises:
        HfkdError: if the hidden state is no map.
    """
    if stage is None:
        return as_map(trunk(images).last_hidden_state)
    return trunk.forward_intermediates(images, indices=[stage], stop_early=True, intermediates_only=True)[0]


def remove_modules(trunk: nn.Module, paths: Sequence[str]) -> None:
    """Replace modules by identities: the trunk's forward may still call them after the map is computed."""
    for path in paths:
        trunk.set_submodule(path, nn.Identity())


def new_projector(student_width: int, teacher_width: int, factor: int) -> nn.Sequential:
    """Return 1x1, 3x3 and 1x1 convolutions with BatchNorm and ReLU, from the student's channels to the teacher's."""
    inner = teacher_width // factor

    def layers(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*layers(student_width, inner, 1), *layers(inner, inner, 3), *layers(inner, teacher_width, 1))


default_cfgs = generate_default_cfgs(
    {
        "simkd_student": {  # placeholders: a trained student has the values of its trunk
            "input_size": (3, 224, 224),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "classifier": "classifier",
        }
    }
)


@register_model
def simkd_student(pretrained: bool = False, **kwargs: Any) -> SimKDStudent:
    """Build a `SimKDStudent`; timm calls this function by its name."""
    return build_model_with_cfg(SimKDStudent, "simkd_student", pretrained, kwargs_filter=("in_chans",), **kwargs)
