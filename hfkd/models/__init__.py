"""Image classifiers of the distillation literature, registered with timm by importing this package.

`timm.create_model("cifar_resnet8x4", num_classes=10)` works after `import hfkd.models`. Parameter names are
those of the published checkpoints, which `load_checkpoint` reads.
"""

import timm  # noqa: F401  (first: its import hook in hfkd/__init__.py imports hfkd.models.base, which needs timm whole)

from . import mobilenetv2, pvt, resnet, resnet_wide_stem, shufflenetv1, shufflenetv2, t2t_vit, vgg, wrn
from .checkpoints import load_checkpoint

__all__ = [
    "load_checkpoint",
    "mobilenetv2",
    "pvt",
    "resnet",
    "resnet_wide_stem",
    "shufflenetv1",
    "shufflenetv2",
    "t2t_vit",
    "vgg",
    "wrn",
]
