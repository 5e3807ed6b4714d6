"""A teacher that is not there: what it said of every image, epoch after epoch, is read from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..data import ImageSource, IndexedImageSource
from ..errors import HfkdError
from ..losses import DistillationLoss
from ..networks.features import Outputs
from ..recipe.arguments import DistillationConfig
from .files import CacheFiles, read_facts
from .identity import appearance, differences, given_teachers, is_public, looks_alike, with_weights

logger = logging.get_logger(__name__)

# What `hfkd cache-teacher` would make another cache of.
WAY_OUT = "Write a cache for this run with `hfkd cache-teacher RECIPE`, or leave teacher_cache out."


@dataclass(frozen=True)
class CachedMember:
    """What results say of a teacher whose logits were stored."""

    name: str
    hub_id: str | None


class CachedTeacher:
    """Stands in for the `Teacher` or `TeacherEnsemble` whose logits `hfkd cache-teacher` stored.

    The data set reads its rows with the images, in DataLoader workers where there are any; `CachedTeacher(batch)` makes
    logits of them on the device. Epoch e has the images and logits of epoch e mod `epochs`, in an order of its own.

    Args:
        folder: of the cache.

    Raises:
        ValueError: if there is no cache, or it is not finished, or a file has another size than it was written with.
    """

    def __init__(self, folder: str | Path):
        self.files = CacheFiles(folder, read_facts(folder))
        self.files.check_complete()
        self.facts = self.files.facts
        self.name: str = self.facts["teacher"]["name"]
        self.members = [CachedMember(member["name"], member["hub_id"]) for member in self.facts["teacher"]["members"]]
        self._temperature: float | None = None
        self._standardized = False

    # ---- Does it fit? ----------------------------------------------------------------------------------------------

    def fit(
        self, dataset: ImageSource | None, losses: Mapping[str, DistillationLoss], args: DistillationConfig
    ) -> None:
        """Checks that the cache holds what a run is to read, and settles how.

        Args:
            dataset: the training images.

        Raises:
            ValueError: if not, with what differs and the way out.
        """
        where = f"The teacher cache {self.files.folder}"
        check_supported(losses, args)
        if not isinstance(dataset, IndexedImageSource):
            given = "none is given" if dataset is None else f"this one is a {type(dataset).__name__}"
            raise HfkdError(
                f"{where} knows images by their row in a training set of hfkd.data that is not streamed, and {given}: "
                "set streaming: false, or leave teacher_cache out."
            )
        different = differences(self.facts["train"], dataset.identity())
        views = max([loss.views for loss in losses.values()], default=1)
        if views > self.files.format.views:
            different.append(f"views: {self.files.format.views} in the cache, {views} here")
        averaged = self.facts["teacher"]["standardized_mean"]
        if averaged not in (None, args.logit_standardization):
            different.append(f"logit_standardization: {averaged} in the cache, {args.logit_standardization} here")
        if not different and not looks_alike(self.facts["appearance"], appearance(dataset)):
            names = ("hfkd", "timm", "torchvision")
            versions = ", ".join(f"{name} {self.facts['versions'][name]}" for name in names)
            different.append(f"augmentation: the same settings give other images here; it was written with {versions}")
        if different:
            raise HfkdError(f"{where} was written for another run:\n  " + "\n  ".join(different) + f"\n{WAY_OUT}")
        if self.files.format.top_k is not None:
            self._temperature = self._common_temperature(losses, args)
            self._standardized = args.logit_standardization

    def _common_temperature(self, losses, args) -> float | None:
        """At which all losses read the teacher."""
        way_out = "Write a cache of all logits (without --top_k), or leave teacher_cache out."
        where = f"The teacher cache {self.files.folder} holds the largest {self.files.format.top_k} logits"
        wanted = {}
        for name, loss in losses.items():
            raw = loss.reads_raw_logits and args.logit_standardization
            if loss.teacher_temperature is None or raw:
                raise HfkdError(f"{where}, and the loss '{name}' needs all of them. {way_out}")
            wanted[loss.teacher_temperature] = name
        if len(wanted) > 1:
            listed = ", ".join(f"{name} at {temperature:g}" for temperature, name in wanted.items())
            raise HfkdError(
                f"{where}, with which the others can stand for one temperature only, and the losses read them at "
                f"several: {listed}. Give them one temperature. {way_out}"
            )
        for temperature, name in wanted.items():
            if temperature not in self.files.format.temperatures:
                cached = ", ".join(f"{value:g}" for value in self.files.format.temperatures)
                raise HfkdError(
                    f"{where} for the temperatures {cached}, and the loss '{name}' reads them at {temperature:g}. "
                    f"Write one with --temperatures {cached.replace(',', '')} {temperature:g} and another --cache_dir. "
                    f"{way_out}"
                )
        return next(iter(wanted), None)

    def check_given(
        self, names: Sequence[str], checkpoints: Sequence[str] | None, class_indices: Sequence[int] | None
    ) -> None:
        """Is this the teacher that a recipe names? Nothing of it is loaded: weights that lie on this machine are
        compared by their files' hash, others by name; those of a path that is not there are not compared.

        Raises:
            ValueError: if not.
        """
        recorded = self.facts["given"]
        if not recorded:  # written from code, where a teacher has no name
            logger.warning(f"{self.files.folder} does not say where its teacher came from: it is not compared.")
            return
        given = given_teachers(names, checkpoints, class_indices)
        different = []
        if len(given) != len(recorded):
            different.append(f"{len(recorded)} teachers in the cache, {len(given)} here")
        for cached, here in zip(recorded, given, strict=False):
            if here["files"] is None and (here["name"] == cached["name"] or not is_public(here["name"])):
                if cached["files"] is not None:
                    logger.warning(f"{here['name']} is not here: {self.files.folder} is taken to be of it.")
            elif here["files"] is None or here["files"] != cached["files"]:
                different.append(f"teacher: {with_weights(cached)} in the cache, {with_weights(here)} here")
            different += differences(
                {"teacher_class_indices": cached["class_indices"]}, {"teacher_class_indices": here["class_indices"]}
            )
        if different:
            listed = "\n  ".join(different)
            raise HfkdError(f"The teacher cache {self.files.folder} is of another teacher:\n  {listed}\n{WAY_OUT}")

    # ---- As a teacher ----------------------------------------------------------------------------------------------

    def prepare(self, *settings: Any) -> None:
        """Nothing: there is no network, and `fit` has seen to images and layers."""

    def align_classes(self, student_names: Sequence[str], batch: dict[str, Tensor]) -> None:
        """The logits are those of the data set's classes.

        Raises:
            ValueError: if the student has others.
        """
        classes = self.files.format.classes
        if len(student_names) != classes:
            raise HfkdError(
                f"The teacher cache {self.files.folder} holds {classes} classes and the student has "
                f"{len(student_names)}: build the student with num_classes={classes}."
            )

    def __call__(self, batch: dict[str, Tensor]) -> Outputs:
        """Outputs for every view in `batch`, whose rows the data set has read; in float32."""
        views = []
        for view in range(2 if "pixel_values_strong" in batch else 1):
            logits = self.files.format.decode(batch, view, self._temperature, self._standardized)
            views.append(Outputs(logits, logits, standardized=self._standardized))
        if len(views) == 2:
            views[0].strong = views[1]
        return views[0]

    def choices(self, dataset: ImageSource) -> Tensor | None:
        """The teacher's most probable class (N,) for each image of the evaluation set; None, with a warning, for other
        images than those that it has seen.

        Raises:
            ValueError: if the file is damaged.
        """
        indexed = isinstance(dataset, IndexedImageSource)
        different = differences(self.facts["evaluation"], dataset.identity()) if indexed else ["they are streamed"]
        if different:
            listed = "; ".join(different)
            logger.warning(
                f"{self.files.folder} does not know what the teacher says of these images, so there is no agreement "
                f"with it ({listed})."
            )
            return None
        return torch.from_numpy(self.files.read_choices()).long()

    def compile(self, **options) -> None:
        """Nothing: there is no network."""

    def parameter_count(self) -> int:
        return self.facts["teacher"]["parameters"]

    def settings(self) -> dict[str, Any]:
        """What results say of the cache."""
        return {"epochs": self.files.epochs, "top_k": self.files.format.top_k}


def check_supported(losses: Mapping[str, DistillationLoss], args: DistillationConfig) -> None:
    """Raises ValueError for a run that reads more than the logits of whole images."""
    if args.mixes:
        raise HfkdError(
            "A teacher cache holds the logits of whole images, and mixup and cutmix mix them after they are augmented, "
            "each time with another partner: leave mixup and cutmix at 0, or train with the teacher itself."
        )
    for name, loss in losses.items():
        if loss.teacher_layers is None or len(loss.teacher_layers) or loss.reuses_classifier is not None:
            raise HfkdError(
                f"The loss '{name}' reads the teacher's features or classifier, and a teacher cache holds its logits "
                "only: train with the teacher itself, or take losses that read logits."
            )
