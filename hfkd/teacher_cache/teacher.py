"""Teacher whose logits and embeddings are read from a cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..data import ImageSource, IndexedImageSource
from ..errors import HfkdError
from ..losses import DistillationLoss
from ..networks.features import EMBEDDING, Layer, Outputs
from ..recipe.config import DistillationConfig
from .files import CacheFiles, read_facts
from .identity import appearance, describe_given, differences, is_public, same_augmentation
from .rows import EMBEDDINGS

logger = logging.get_logger(__name__)

# End of the messages about a cache that does not fit the run.
HOW_TO_FIX = "Write a cache for this run with `hfkd cache-teacher RECIPE`, or leave teacher_cache out."


@dataclass(frozen=True)
class CachedMember:
    """Name and Hub id of a teacher whose logits were stored."""

    name: str
    hub_id: str | None


class CachedTeacher:
    """Stand-in for the `Teacher` or `TeacherEnsemble` whose logits or embeddings `hfkd cache-teacher` stored.

    The data set reads the rows together with the images, in DataLoader workers if there are any. `CachedTeacher(batch)`
    turns them into outputs on the device. Epoch e has the images and rows of epoch e mod `epochs`, in its own order.

    Args:
        folder: folder of the cache.

    Raises:
        HfkdError: if there is no cache, if it is not finished, or if a file has another size than it was written with.
    """

    def __init__(self, folder: str | Path):
        self.files = CacheFiles(folder, read_facts(folder, whole=True))
        self.files.check_complete()
        self.facts = self.files.facts
        self.name: str = self.facts["teacher"]["name"]
        self.members = [CachedMember(member["name"], member["hub_id"]) for member in self.facts["teacher"]["members"]]
        self._temperature: float | None = None
        self._standardized = False

    @property
    def has_classifier(self) -> bool:
        """False where features alone are stored."""
        return self.files.format.classes > 0

    @property
    def shares_classes(self) -> bool:
        """True if logits are stored, which belong to the data set's classes."""
        return self.has_classifier

    # ---- Comparison with a run -------------------------------------------------------------------------------------

    def fit(
        self, dataset: ImageSource | None, losses: Mapping[str, DistillationLoss], args: DistillationConfig
    ) -> None:
        """Check that the cache fits a run, and choose the temperature at which it is read.

        Args:
            dataset: the training images.

        Raises:
            HfkdError: if it does not; the message names the differences and the way out.
        """
        where = f"The teacher cache {self.files.folder}"
        check_supported(losses, args)
        if not isinstance(dataset, IndexedImageSource):
            given = "none is given" if dataset is None else f"this one is a {type(dataset).__name__}"
            raise HfkdError(
                f"{where} needs a training set of hfkd.data that is not streamed, and {given}: set streaming: false, "
                "or leave teacher_cache out."
            )
        reading = [name for name, loss in losses.items() if EMBEDDING in (loss.teacher_layers or ())]
        if reading and self.files.format.width is None:
            raise HfkdError(f"{where} holds no features, and the loss '{reading[0]}' reads them. {HOW_TO_FIX}")
        different = differences(self.facts["train"], dataset.identity())
        views = max([loss.views for loss in losses.values()], default=1)
        if views > self.files.format.views:
            different.append(f"views: {self.files.format.views} in the cache, {views} here")
        averaged = self.facts["teacher"]["standardized_mean"]
        if averaged not in (None, args.logit_standardization):
            different.append(f"logit_standardization: {averaged} in the cache, {args.logit_standardization} here")
        if not different and not same_augmentation(self.facts["appearance"], appearance(dataset)):
            names = ("hfkd", "timm", "torchvision")
            versions = ", ".join(f"{name} {self.facts['versions'][name]}" for name in names)
            different.append(f"augmentation: the same settings give other images here; it was written with {versions}")
        if different:
            raise HfkdError(f"{where} was written for another run:\n  " + "\n  ".join(different) + f"\n{HOW_TO_FIX}")
        if self.files.format.top_k is not None:
            self._temperature = self._common_temperature(losses, args)
            self._standardized = args.logit_standardization

    def _common_temperature(self, losses, args) -> float | None:
        """Return the temperature at which all losses read the teacher; None without losses.

        Raises:
            HfkdError: if a loss needs all logits, if temperatures differ, or if the cache was not written for theirs.
        """
        # The stored equivalent of the other classes is right at one temperature only: see `RowFormat`.
        way_out = "Write a cache of all logits (without --top_k), or leave teacher_cache out."
        where = f"The teacher cache {self.files.folder} holds the largest {self.files.format.top_k} logits"
        wanted = {}
        for name, loss in losses.items():
            if not (loss.needs_teacher and loss.reads_logits):
                continue
            raw = loss.reads_raw_logits and args.logit_standardization
            if loss.teacher_temperature is None or raw:
                raise HfkdError(f"{where}, and the loss '{name}' needs all of them. {way_out}")
            wanted[loss.teacher_temperature] = name
        if len(wanted) > 1:
            listed = ", ".join(f"{name} at {temperature:g}" for temperature, name in wanted.items())
            raise HfkdError(
                f"{where}, which can be read at one temperature only, and the losses use several: {listed}. Give them "
                f"one temperature. {way_out}"
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

    def check_given(self, given: Sequence[dict[str, Any]]) -> None:
        """Compare the cache's teacher with the one that a recipe names, without loading either.

        Weights on this machine are compared by the hash of their files, others by name. A path that does not exist is
        not compared.

        Args:
            given: result of `given_teachers`.

        Raises:
            HfkdError: if they differ.
        """
        recorded = self.facts["given"]
        if not recorded:  # the cache was written from code, where a teacher has no name
            logger.warning(f"{self.files.folder} does not name its teacher, so the recipe's teacher is not compared.")
            return
        different = []
        if len(given) != len(recorded):
            different.append(f"{len(recorded)} teachers in the cache, {len(given)} here")
        for cached, here in zip(recorded, given, strict=False):
            if here["files"] is None and (here["name"] == cached["name"] or not is_public(here["name"])):
                if cached["files"] is not None:
                    logger.warning(
                        f"There are no weights at {here['name']}, so they are not compared with {self.files.folder}."
                    )
            elif here["files"] is None or here["files"] != cached["files"]:
                different.append(f"teacher: {describe_given(cached)} in the cache, {describe_given(here)} here")
            settings = [
                {
                    "teacher_class_indices": each["class_indices"],
                    "teacher_image": each.get("image", {}),
                    "teacher_prompts": each.get("prompts"),
                }
                for each in (cached, here)
            ]
            different += differences(*settings)
        if different:
            listed = "\n  ".join(different)
            raise HfkdError(
                f"The teacher cache {self.files.folder} was written for another teacher:\n  {listed}\n{HOW_TO_FIX}"
            )

    # ---- Interface of a teacher ------------------------------------------------------------------------------------

    def prepare(self, *settings: Any) -> None:
        """Do nothing: there is no network, and `fit` has checked images and layers."""

    def align_classes(self, student_names: Sequence[str], batch: dict[str, Tensor], required: bool = True) -> None:
        """Check that the student has the classes of the data set, which are the classes of the logits.

        Raises:
            HfkdError: if the student has another number of classes and logits are compared.
        """
        classes = self.files.format.classes
        if required and len(student_names) != classes:
            raise HfkdError(
                f"The teacher cache {self.files.folder} holds {classes} classes and the student has "
                f"{len(student_names)}: build the student with num_classes={classes}."
            )

    def __call__(self, batch: dict[str, Tensor]) -> Outputs:
        """Return the outputs for every view in `batch`, which holds the rows of the cache, in float32."""
        views = []
        for view in range(2 if "pixel_values_strong" in batch else 1):
            logits = self.files.format.decode(batch, view, self._temperature, self._standardized)
            views.append(Outputs(logits, logits, standardized=self._standardized))
        if EMBEDDINGS in batch:
            views[0].features = {EMBEDDING: batch[EMBEDDINGS].float()}
        if len(views) == 2:
            views[0].strong = views[1]
        return views[0]

    def choices(self, dataset: ImageSource) -> Tensor | None:
        """Return the teacher's most probable class (N,) for each image of the evaluation set.

        For other images than the cache's, return None with a warning.

        Raises:
            HfkdError: if the file is damaged.
        """
        different = ["they are streamed"]
        if isinstance(dataset, IndexedImageSource):
            different = differences(self.facts["evaluation"], dataset.identity())
        if different:
            listed = "; ".join(different)
            logger.warning(
                f"{self.files.folder} was written for other evaluation images, so the agreement with the teacher is "
                f"not measured ({listed})."
            )
            return None
        return torch.from_numpy(self.files.read_choices()).long()

    def compile(self, **options) -> None:
        """Do nothing: there is no network."""

    def parameter_count(self) -> int:
        """Return the number of parameters of the teacher that was stored."""
        return self.facts["teacher"]["parameters"]

    def settings(self) -> dict[str, Any]:
        """Return the settings of the cache for `results.json`."""
        return {"epochs": self.files.epochs, "top_k": self.files.format.top_k}


def check_supported(losses: Mapping[str, DistillationLoss], args: DistillationConfig) -> None:
    """Check that a run reads nothing of its teacher but the logits and the embedding of whole images.

    Raises:
        HfkdError: for mixup or cutmix, or a loss that reads the teacher's features or classifier.
    """
    if args.mixes:
        raise HfkdError(
            "A teacher cache holds the logits of whole images, and mixup and cutmix mix images in each batch anew: "
            "leave mixup and cutmix at 0, or train with the teacher itself."
        )
    for name, loss in losses.items():
        if reads_beyond(loss, [EMBEDDING]) or loss.reads_classifier:
            raise HfkdError(
                f"The loss '{name}' reads the teacher's features or classifier, and a teacher cache holds its logits "
                "and its pooled embedding only: train with the teacher itself, or take losses that read these."
            )


def reads_beyond(loss: DistillationLoss, layers: Iterable[Layer]) -> bool:
    """Return whether a loss reads more of the teacher than its logits, its classifier's weights and these layers."""
    read = loss.teacher_layers
    return read is None or bool(set(read) - set(layers) or loss.teacher_norms) or loss.reads_members


def reads_embedding(losses: Mapping[str, DistillationLoss]) -> bool:
    """Return whether a loss reads the teacher's embedding."""
    return any(EMBEDDING in (loss.teacher_layers or ()) for loss in losses.values())
