"""Distillation losses, one method a file, and the table of methods that a recipe can name.

Each file holds a pure function, the module that a recipe builds, and the citation of its paper. A new method costs one
import here, which publishes its loss and its function (`import A as A`, PEP 484); its name in recipes is the name of
its file: `kd.py` is `losses: {kd: ...}`. Of hfkd, the room imports `hfkd.errors` and never anything else: no data, no
models, no networks, no recipe, no training.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import HfkdError, did_you_mean
from .base import DistillationLoss as DistillationLoss
from .checks import checked_arguments
from .own import installed_losses as installed_losses
from .own import own_loss
from .standardize import standardize as standardize

# --help and the benchmark list the methods in this order.
# isort: off
from .kd import KDLoss as KDLoss, kd_loss as kd_loss
from .dkd import DKDLoss as DKDLoss, dkd_loss as dkd_loss
from .mlkd import MLKDLoss as MLKDLoss, mlkd_loss as mlkd_loss
from .ctkd import CTKDLoss as CTKDLoss, ctkd_instance_loss as ctkd_instance_loss
from .dist import DISTLoss as DISTLoss, dist_loss as dist_loss
from .ttm import TTMLoss as TTMLoss, ttm_loss as ttm_loss
from .wttm import WTTMLoss as WTTMLoss, wttm_loss as wttm_loss
from .nkd import NKDLoss as NKDLoss, nkd_loss as nkd_loss
from .abkd import ABKDLoss as ABKDLoss, abkd_loss as abkd_loss
from .wsld import WSLDLoss as WSLDLoss, wsld_loss as wsld_loss
from .hard import HardLoss as HardLoss, hard_loss as hard_loss
from .rld import RLDLoss as RLDLoss, rld_loss as rld_loss
from .crld import CRLDLoss as CRLDLoss, crld_loss as crld_loss
from .skd import SKDLoss as SKDLoss, skd_loss as skd_loss
from .ofa import OFALoss as OFALoss, ofa_loss as ofa_loss
from .ca_mkd import (
    CAMKDLoss as CAMKDLoss,
    ca_mkd_features_loss as ca_mkd_features_loss,
    ca_mkd_logits_loss as ca_mkd_logits_loss,
    ca_mkd_weights as ca_mkd_weights,
)
from .tf_kd import TfKDLoss as TfKDLoss, tf_kd_loss as tf_kd_loss
from .uskd import USKDLoss as USKDLoss, uskd_loss as uskd_loss
from .locality_guidance import (
    LocalityGuidanceLoss as LocalityGuidanceLoss,
    locality_guidance_loss as locality_guidance_loss,
)
from .fitnet import FitNetLoss as FitNetLoss, fitnet_loss as fitnet_loss
from .at import ATLoss as ATLoss, at_loss as at_loss
from .sp import SPLoss as SPLoss, sp_loss as sp_loss
from .vid import VIDLoss as VIDLoss, vid_loss as vid_loss
from .semckd import SemCKDLoss as SemCKDLoss, semckd_loss as semckd_loss
from .reviewkd import ReviewKDLoss as ReviewKDLoss, reviewkd_loss as reviewkd_loss
from .cat_kd import CATKDLoss as CATKDLoss, cat_kd_loss as cat_kd_loss
from .ofd import OFDLoss as OFDLoss, ofd_loss as ofd_loss, ofd_margin as ofd_margin
from .mgd import MGDLoss as MGDLoss, mgd_loss as mgd_loss
from .pkt import PKTLoss as PKTLoss, pkt_loss as pkt_loss
from .crd import CRDLoss as CRDLoss, crd_loss as crd_loss
from .srrl import SRRLLoss as SRRLLoss, srrl_loss as srrl_loss
from .rkd import RKDLoss as RKDLoss, rkd_loss as rkd_loss
from .nst import NSTLoss as NSTLoss, nst_loss as nst_loss
from .cc import CCLoss as CCLoss, cc_loss as cc_loss
from .srd import SRDLoss as SRDLoss, srd_loss as srd_loss
from .vkd import VkDLoss as VkDLoss, vkd_loss as vkd_loss
from .token_mse import TokenMSELoss as TokenMSELoss, token_mse_loss as token_mse_loss
from .feature_queue import FeatureQueueLoss as FeatureQueueLoss, feature_queue_loss as feature_queue_loss
from .itrd import (
    ITRDLoss as ITRDLoss,
    itrd_correlation_loss as itrd_correlation_loss,
    itrd_mutual_loss as itrd_mutual_loss,
)
from .simkd import SimKDLoss as SimKDLoss, simkd_loss as simkd_loss
# isort: on


def _methods(imported: Mapping[str, Any]) -> dict[str, type[DistillationLoss]]:
    """Return the losses among imported names, each under the name of its file."""
    classes = (value for value in imported.values() if isinstance(value, type) and issubclass(value, DistillationLoss))
    return {loss.__module__.rpartition(".")[2]: loss for loss in classes if loss is not DistillationLoss}


LOSSES = _methods(globals())


def build_losses(
    losses: Mapping[str, Mapping[str, Any] | DistillationLoss | None], logit_standardization: bool
) -> nn.ModuleDict:
    """Build the losses of a run, by name, in the order given.

    Args:
        losses: for each method (see `loss_class`) its keyword arguments, or None for its defaults. Under any other
            name, an instance of a DistillationLoss. A loss named `module:Class` gets the name of its class.
        logit_standardization: the run's switch. It is set on every loss, given instances included.

    Raises:
        HfkdError: an unknown method, an unknown, missing or ill-typed parameter, a value out of range, or a name that a
            module cannot have, or that the cross-entropy or another class of loss has.
    """
    if not isinstance(losses, Mapping):
        raise HfkdError(f"losses is {losses!r}: give a mapping of methods, such as {{'kd': {{'temperature': 4.0}}}}")
    modules = nn.ModuleDict()
    for method, given in losses.items():
        loss = given if isinstance(given, DistillationLoss) else _build(method, given)
        name = method.rpartition(":")[2] if isinstance(method, str) else method
        if name in modules:
            raise HfkdError(f"losses: two losses have the name {name!r}: {', '.join(losses)}")
        if not (isinstance(name, str) and name.isidentifier()) or name in dir(modules):
            raise HfkdError(f"losses: {name!r} cannot name a loss; use letters, digits and underscores")
        if name == "ce":
            raise HfkdError("losses: 'ce' is the name of the cross-entropy with the labels; give the loss another name")
        if name in LOSSES and not isinstance(loss, LOSSES[name]):
            raise HfkdError(
                f"losses: {name!r} is a method of hfkd, and the given {type(loss).__name__} is another: rename it"
            )
        loss.logit_standardization = logit_standardization
        modules[name] = loss
    return modules


def loss_class(method: str) -> type[DistillationLoss]:
    """Return the class of a method: a name in `LOSSES`, an entry point of a package, or `module:Class`.

    Raises:
        HfkdError: if there is none; the message names the nearest.
    """
    found = LOSSES.get(method) or own_loss(str(method))
    if found is None:
        raise HfkdError(f"losses: no method {method!r}.{did_you_mean(method, [*LOSSES, *installed_losses()])}")
    return found


def _build(name: str, arguments: Mapping[str, Any] | None) -> DistillationLoss:
    method = loss_class(name)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise HfkdError(
            f"losses.{name} is {arguments!r}: give its parameters by name, nothing for the defaults, "
            "or an instance of a DistillationLoss"
        )
    arguments = checked_arguments(name, method, arguments or {})
    try:
        loss = method(**arguments)
    except ValueError as error:
        raise HfkdError(f"losses.{name}: {error}") from error
    loss.arguments = arguments
    return loss
