"""Distillation losses: one method a file, and the one table of methods that a recipe can name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .abkd import ABKDLoss, abkd_loss
from .at import ATLoss, at_loss
from .base import DistillationLoss
from .cc import CCLoss, cc_loss
from .checks import checked_arguments, did_you_mean
from .crd import CRDLoss, crd_loss
from .crld import CRLDLoss, crld_loss
from .ctkd import CTKDLoss, ctkd_instance_loss
from .dist import DISTLoss, dist_loss
from .dkd import DKDLoss, dkd_loss
from .feature_queue import FeatureQueueLoss, feature_queue_loss
from .fitnet import FitNetLoss, fitnet_loss
from .hard import HardLoss, hard_loss
from .itrd import ITRDLoss, itrd_correlation_loss, itrd_mutual_loss
from .kd import KDLoss, kd_loss
from .locality_guidance import LocalityGuidanceLoss, locality_guidance_loss
from .mlkd import MLKDLoss, mlkd_loss
from .nkd import NKDLoss, nkd_loss
from .nst import NSTLoss, nst_loss
from .pkt import PKTLoss, pkt_loss
from .rkd import RKDLoss, rkd_loss
from .rld import RLDLoss, rld_loss
from .semckd import SemCKDLoss, semckd_loss
from .simkd import SimKDLoss, simkd_loss
from .sp import SPLoss, sp_loss
from .srd import SRDLoss, srd_loss
from .srrl import SRRLLoss, srrl_loss
from .standardize import standardize
from .token_mse import TokenMSELoss, token_mse_loss
from .ttm import TTMLoss, ttm_loss
from .vid import VIDLoss, vid_loss
from .vkd import VkDLoss, vkd_loss
from .wsld import WSLDLoss, wsld_loss
from .wttm import WTTMLoss, wttm_loss

__all__ = [
    "LOSSES",
    "ABKDLoss",
    "ATLoss",
    "CCLoss",
    "CRDLoss",
    "CRLDLoss",
    "CTKDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FeatureQueueLoss",
    "FitNetLoss",
    "HardLoss",
    "ITRDLoss",
    "KDLoss",
    "LocalityGuidanceLoss",
    "MLKDLoss",
    "NKDLoss",
    "NSTLoss",
    "PKTLoss",
    "RKDLoss",
    "RLDLoss",
    "SPLoss",
    "SRDLoss",
    "SRRLLoss",
    "SemCKDLoss",
    "SimKDLoss",
    "TTMLoss",
    "TokenMSELoss",
    "VIDLoss",
    "VkDLoss",
    "WSLDLoss",
    "WTTMLoss",
    "abkd_loss",
    "at_loss",
    "build_losses",
    "cc_loss",
    "crd_loss",
    "crld_loss",
    "ctkd_instance_loss",
    "dist_loss",
    "dkd_loss",
    "feature_queue_loss",
    "fitnet_loss",
    "hard_loss",
    "itrd_correlation_loss",
    "itrd_mutual_loss",
    "kd_loss",
    "locality_guidance_loss",
    "mlkd_loss",
    "nkd_loss",
    "nst_loss",
    "pkt_loss",
    "rkd_loss",
    "rld_loss",
    "semckd_loss",
    "simkd_loss",
    "sp_loss",
    "srd_loss",
    "srrl_loss",
    "standardize",
    "token_mse_loss",
    "ttm_loss",
    "vid_loss",
    "vkd_loss",
    "wsld_loss",
    "wttm_loss",
]

LOSSES: dict[str, type[DistillationLoss]] = {
    "kd": KDLoss,
    "dkd": DKDLoss,
    "mlkd": MLKDLoss,
    "ctkd": CTKDLoss,
    "locality_guidance": LocalityGuidanceLoss,
    "fitnet": FitNetLoss,
    "at": ATLoss,
    "sp": SPLoss,
    "vid": VIDLoss,
    "semckd": SemCKDLoss,
    "pkt": PKTLoss,
    "crd": CRDLoss,
    "srrl": SRRLLoss,
    "simkd": SimKDLoss,
    "dist": DISTLoss,
    "ttm": TTMLoss,
    "wttm": WTTMLoss,
    "nkd": NKDLoss,
    "abkd": ABKDLoss,
    "wsld": WSLDLoss,
    "hard": HardLoss,
    "rld": RLDLoss,
    "crld": CRLDLoss,
    "rkd": RKDLoss,
    "nst": NSTLoss,
    "cc": CCLoss,
    "token_mse": TokenMSELoss,
    "srd": SRDLoss,
    "itrd": ITRDLoss,
    "vkd": VkDLoss,
    "feature_queue": FeatureQueueLoss,
}


def build_losses(
    losses: Mapping[str, Mapping[str, Any] | DistillationLoss | None], logit_standardization: bool
) -> nn.ModuleDict:
    """The losses of a run, by name, in the order given.

    Args:
        losses: for each method of `LOSSES` its keyword arguments, None for its defaults; or, under any name,
            an instance of a DistillationLoss.
        logit_standardization: the run's switch, set on every loss, given instances included.

    Raises:
        ValueError: an unknown method, an unknown, missing or ill-typed parameter, a value out of range, or a
            name that cannot be a module's.
    """
    if not isinstance(losses, Mapping):
        raise ValueError(
            f"losses is {losses!r}: give a mapping of methods, such as {{'kd': {{'temperature': 4.0}}}}"
        )
    modules = nn.ModuleDict()
    for name, given in losses.items():
        loss = given if isinstance(given, DistillationLoss) else _build(name, given)
        if not (isinstance(name, str) and name.isidentifier()) or name in dir(modules):
            raise ValueError(f"losses: {name!r} cannot name a loss; take letters, digits and underscores")
        loss.logit_standardization = logit_standardization
        modules[name] = loss
    return modules


def _build(name: str, arguments: Mapping[str, Any] | None) -> DistillationLoss:
    if name not in LOSSES:
        raise ValueError(f"losses: no method {name!r}.{did_you_mean(name, LOSSES)}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(
            f"losses.{name} is {arguments!r}: give its parameters by name, nothing for the defaults, "
            "or an instance of a DistillationLoss"
        )
    arguments = checked_arguments(name, LOSSES[name], arguments or {})
    try:
        loss = LOSSES[name](**arguments)
    except ValueError as error:
        raise ValueError(f"losses.{name}: {error}") from error
    loss.arguments = arguments
    return loss
