"""Ways of teaching a student among which `hfkd choose` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALONE = "student alone"
OWN = "the recipe's own losses"


@dataclass(frozen=True)
class Candidate:
    """A way of teaching: the keys of a recipe that differ from one to the next.

    Attributes:
        name: for tables, and unique among the candidates.
        losses: as in a recipe; empty for the student alone.
        ce_weight: weight of the cross-entropy with the labels.
        logit_standardization: whether the logits are standardised by their Z-score.
    """

    name: str
    losses: Mapping[str, Mapping[str, Any]]
    ce_weight: float = 1.0
    logit_standardization: bool = False

    def keys(self) -> dict[str, Any]:
        """Return the keys of a recipe."""
        losses = {method: dict(parameters) for method, parameters in self.losses.items()}
        return {
            "losses": losses,
            "ce_weight": self.ce_weight,
            "logit_standardization": self.logit_standardization,
        }


def candidates(own: Candidate | None = None) -> list[Candidate]:
    """Return the candidates: the student alone, KD and KD + Z-score over temperature and weight, DKD + Z-score, KD on
    regions of the image, and KD beside the feature methods that fit any pair of networks.

    The weights are those of the papers, and smaller ones beside a full cross-entropy.

    Args:
        own: of the recipe; left out where another candidate is the same.
    """
    found = [Candidate(ALONE, {})]
    for temperature in (1.0, 2.0, 4.0):
        for ce_weight, weight in ((0.1, 0.9), (1.0, 1.0)):
            name = f"KD, temperature {temperature:g}, weights {ce_weight:g} and {weight:g}"
            found.append(Candidate(name, {"kd": {"temperature": temperature, "weight": weight}}, ce_weight))
        for ce_weight, weight in ((0.1, 9.0), (1.0, 3.0)):
            name = f"KD + Z-score, temperature {temperature:g}, weights {ce_weight:g} and {weight:g}"
            found.append(Candidate(name, {"kd": {"temperature": temperature, "weight": weight}}, ce_weight, True))
    for weight in (1.0, 9.0):
        losses = {"dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 2.0, "warmup_epochs": 0, "weight": weight}}
        found.append(Candidate(f"DKD + Z-score, weight {weight:g}", losses, 1.0, True))
    on_regions = {"kd": {"temperature": 4.0, "weight": 1.0, "regions": [1, 2, 4]}}
    found.append(Candidate("KD on regions", on_regions))
    kd = {"kd": {"temperature": 4.0, "weight": 1.0}}
    for method, weight in (("sp", 3000.0), ("pkt", 30000.0)):
        found.append(Candidate(f"KD and {method.upper()}", kd | {method: {"weight": weight}}))
    if own is not None and own.losses and all(own.keys() != each.keys() for each in found):
        found.insert(1, own)
    return found
