"""Image classifiers of the distillation literature, registered with timm when this package is imported.

After `import hfkd.models`, `timm.create_model("cifar_resnet8x4", num_classes=10)` works, and parameter names are the
names of the published checkpoints, which `load_checkpoint` reads. Of hfkd, the room imports `hfkd.errors` and never
anything else: no losses, no data, no recipe, no networks.
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
