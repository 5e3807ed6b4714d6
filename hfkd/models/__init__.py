"""Image classifiers of the distillation literature, registered with timm by importing this package.

`timm.create_model("cifar_resnet8x4", num_classes=10)` works after `import hfkd.models`. Parameter names are
those of the published checkpoints, which `load_checkpoint` reads.
"""

from . import mobilenetv2, pvt, resnet, resnet_wide_stem, shufflenetv1, shufflenetv2, simkd, t2t_vit, vgg, wrn
from .checkpoints import load_checkpoint

__all__ = [
    "load_checkpoint",
    "mobilenetv2",
    "pvt",
    "resnet",
    "resnet_wide_stem",
    "shufflenetv1",
    "shufflenetv2",
    "simkd",
    "t2t_vit",
    "vgg",
    "wrn",
]
