"""The measurements of `hfkd evaluate` on frozen features: probes, and the similarity to a teacher's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data import ImageSource
from ..errors import HfkdError, did_you_mean
from ..hub.card import CARD_NAME, update_card
from ..hub.card_probes import record_probes
from ..names import last_part
from ..networks.embeddings import collect_embeddings
from ..networks.features import EMBEDDING
from ..networks.probes import PROBES, linear_cka, mean_cosine, top1
from ..networks.teacher import Teacher
from ..networks.teacher_loading import load_teacher
from ..recipe.arguments import DataArguments
from ..runs.folder import RESULTS_NAME
from ..training.loaders import plain_loader
from .build import evaluation_set, load_splits


@dataclass
class FeatureArguments:
    """Measurements of features, in place of the accuracy of the classifier."""

    _argument_group_name = "features"  # in `--help`

    probe: list[str] | None = field(
        default=None,
        metadata={
            "help": "knn, linear or both: top-1 on the evaluation split of 20 weighted nearest neighbours, and of "
            "logistic regression, in the frozen features of the training split. MODEL needs no classifier."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub id or timm architecture: Compare its features with MODEL's by CKA and cosine."},
    )
    teacher_checkpoint: str | None = field(
        default=None, metadata={"help": "Weights for a timm architecture that --teacher names."}
    )

    def __post_init__(self):
        for name in self.probe or []:
            if name not in PROBES:
                raise HfkdError(f"There is no probe '{name}'.{did_you_mean(name, PROBES)}.")
        if self.teacher is None and self.teacher_checkpoint:
            raise HfkdError("teacher_checkpoint goes with --teacher: name the teacher, too.")


def measure_features(name: str, data_args: DataArguments, args, wanted: FeatureArguments) -> dict[str, float]:
    """Return the top-1 of each probe in percent, and the similarity of a network's features to a teacher's.

    Args:
        name: folder, Hub id or timm architecture with weights, with or without a classifier.
        args: the `EvaluationArguments`.

    Returns:
        `eval_knn`, `eval_linear`, `eval_cka` and, for features of the same size, `eval_cosine`: those that are wanted.
    """
    # The images first: without labels there is no probe, and a network may take minutes to load.
    splits = load_splits(data_args if wanted.probe else dataclasses.replace(data_args, train_split=None))
    for split in splits if wanted.probe else ():
        if not split.has_labels:
            raise HfkdError(
                f"A probe tells classes apart, and {split.name} has no labels: name a data set with labels, or its "
                "label_column."
            )
    network = load_teacher(name)
    teachers = [load_teacher(wanted.teacher, wanted.teacher_checkpoint)] if wanted.teacher else []
    device = _prepare([network, *teachers], args.bf16)

    def embed(split, networks: list[Teacher]) -> tuple[list[Tensor], Tensor]:
        images: ImageSource = evaluation_set(split, network.input_spec, data_args)
        batches = plain_loader(images, args.batch_size, args.num_workers)
        return collect_embeddings(networks, batches, images.uncounted, device)

    (features, *others), labels = embed(splits[1], [network, *teachers])
    metrics = {}
    if wanted.probe:
        (known,), known_labels = embed(splits[0], [network])
        for probe in wanted.probe:
            metrics[f"eval_{probe}"] = top1(PROBES[probe](features, known, known_labels), labels)
        _record(Path(name), splits, (len(known_labels), len(labels)), metrics)
    for other in others:
        metrics["eval_cka"] = linear_cka(features, other)
        if features.shape == other.shape:
            metrics["eval_cosine"] = mean_cosine(features, other)
    return metrics


def _record(folder: Path, splits, counts: tuple[int, int], metrics: dict[str, float]) -> None:
    """Write probes into the results and the card of an export; other networks have none."""
    if not all((folder / file).is_file() for file in (RESULTS_NAME, CARD_NAME)):
        return
    images = {
        "dataset": last_part(splits[1].source),
        "train_split": splits[0].split,
        "train_images": counts[0],
        "eval_split": splits[1].split,
        "eval_images": counts[1],
    }
    try:
        record_probes(folder, images, {key.removeprefix("eval_"): value for key, value in metrics.items()})
        update_card(folder)
    except OSError as error:
        print(f"The card of {folder} was not changed: {error}.")


def _prepare(networks: list[Teacher], bf16: bool) -> torch.device:
    """Bring networks to the device to record embeddings, all of images for the first, and return the device."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for network in networks:
        network.prepare(device, torch.bfloat16 if bf16 else None, True, networks[0].input_spec, [EMBEDDING])
    return device
