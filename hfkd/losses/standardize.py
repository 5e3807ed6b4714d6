"""Logit standardization: a Z-score, so that the student need not match the scale of the teacher's logits.

Paper: Sun, Ren, Li, Wang and Cao, Logit Standardization in Knowledge Distillation, CVPR 2024.
"""

import torch
from torch import Tensor

from ..errors import HfkdError

# BibTeX entry, as `DistillationLoss.citation`; a run with `logit_standardization` quotes it in its model card.
CITATION = """
    @inproceedings{sun2024logit,
        title = {Logit Standardization in Knowledge Distillation},
        author = {Sun, Shangquan and Ren, Wenqi and Li, Jingzhi and Wang, Rui and Cao, Xiaochun},
        booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
        year = {2024},
    }
"""


def at_least_float32(logits: Tensor) -> Tensor:
    """Widen float16 and bfloat16 to float32; leave float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the Z-score of each row: (z - mean) / (eps + std), std unbiased.

    A row whose entries are all equal (the output of a zero-initialised head) has std 0 and standardizes to zeros. It
    gets the gradient of (z - mean). The formula would give a gradient 1 / eps = 1e7 times larger, which overflows
    float16 and ruins the first step of SGD. A row that is nearly constant keeps the formula, and so a gradient scaled
    by 1 / (eps + std).

    Args:
        logits: (B, C), C at least 2; float16 and bfloat16 are computed in float32.
        eps: added to the standard deviation.

    Returns:
        (B, C), float32 or float64.

    Raises:
        HfkdError: logits are not (B, C) with two classes or more.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise HfkdError(f"logits of shape (B, C) with C >= 2 expected, got {tuple(logits.shape)}")
    logits = at_least_float32(logits)
    std, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / torch.where(std == 0, 1.0, eps + std)
