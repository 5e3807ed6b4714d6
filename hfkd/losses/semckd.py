"""SemCKD: every map of the student learns from every map of the teacher, weighted by a learnt attention.

Paper: Chen, Mei, Zhang, Wang, Wang, Feng and Chen, Cross-Layer Distillation with Semantic Calibration, AAAI 2021.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import Outputs
from .checks import count
from .feature_maps import MapsLoss, pooled_to_smaller
from .projectors import comparable, images_for_batch_norm
from .standardize import at_least_float32

WIDTH_FACTOR = 4  # rows of similarities are this much wider than queries and keys


def semckd_loss(
    projected_maps: Sequence[Sequence[Tensor]], teacher_maps: Sequence[Tensor], attention: Tensor
) -> Tensor:
    """Return the mean over images and student maps of sum_j attention_j * (mean squared difference to teacher map j).

    Args:
        projected_maps: S lists of T maps (B, C, H, W): student map i with the channels of teacher map j.
        teacher_maps: T maps (B, C, H', W'), averaged down to the sides of the projected maps.
        attention: (B, S, T), each row a distribution over the teacher's maps. Gradients reach it.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels of a pair differ, or attention is not (B, S, T).
        ValueError: a row of maps is not as long as teacher_maps.
    """
    rows = [[_distances(*pair) for pair in zip(row, teacher_maps, strict=True)] for row in projected_maps]
    distances = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    if attention.shape != distances.shape:
        raise HfkdError(f"attention of shape {tuple(distances.shape)} expected, got {tuple(attention.shape)}")
    return (attention * distances).sum(dim=2).mean()


def _distances(projected: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of each image's maps, (B,)."""
    projected, teacher = comparable(projected, teacher)
    return ((projected - teacher) ** 2).flatten(1).mean(dim=1)


def semckd_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Return softmax over T of query . key, (B, S, T), for queries (B, S, D) and keys (B, T, D)."""
    return (queries @ keys.transpose(1, 2)).softmax(dim=2)


def similarity_rows(feature_map: Tensor, width: int) -> Tensor:
    """Return each image's similarities (dot products of maps) to the images of its group, (B, width).

    A batch of up to `width` images is one group. A larger batch is split into the smallest number of groups that hold
    it, with sizes as equal as possible. The columns of a group with fewer than `width` images are filled with 0: an
    image that does not exist is similar to none.

    Args:
        feature_map: (B, C, H, W).
    """
    flat = at_least_float32(feature_map).flatten(1)
    groups = flat.tensor_split(math.ceil(len(flat) / width))
    return torch.cat([F.pad(group @ group.T, (0, width - len(group))) for group in groups])


class SimilarityEmbedding(nn.Module):
    """Network that turns an image's similarities (B, width) into a query or a key (B, width // 4) of length 1."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 2 * (width // WIDTH_FACTOR))
        self.linear2 = nn.Linear(2 * (width // WIDTH_FACTOR), width // WIDTH_FACTOR)

    def forward(self, similarities: Tensor) -> Tensor:
        embedding = self.linear2(self.linear1(similarities).relu())
        length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        return embedding / torch.where(length == 0, 1.0, length)


def _projector(student_map: Tensor, teacher_map: Tensor) -> nn.Sequential:
    channels = teacher_map.shape[1]
    return nn.Sequential(
        nn.Conv2d(student_map.shape[1], 2 * channels, 1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, channels, 1, bias=False),
    )


class SemCKDLoss(MapsLoss):
    """`semckd_loss` as a method of a recipe: a projector a pair, a query a student map, a key a teacher map.

    Batches may have any size, see `similarity_rows`; at `batch_size` the loss is the published method. Similarities and
    the statistics of the projectors' BatchNorm are taken over the images of one process.

    Args:
        student_layers: stage indices or module paths. None: every stage except the first.
        teacher_layers: layers of the teacher, in the same form; their number may differ.
        batch_size: images of one process in one step, from which queries and keys are made; 4 or above.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: an argument is not a list of layers, or batch_size or weight is out of range.
    """

    citation = """
        @inproceedings{chen2021cross,
            title = {Cross-Layer Distillation with Semantic Calibration},
            author = {Chen, Defang and Mei, Jian-Ping and Zhang, Yuan and Wang, Can and Wang, Zhe and Feng, Yan and
                Chen, Chun},
            booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
            year = {2021},
        }
    """

    def __init__(
        self,
        student_layers: list | None = None,
        teacher_layers: list | None = None,
        batch_size: int = 64,
        weight: float = 400.0,
    ):
        super().__init__(student_layers, teacher_layers, weight)
        self.batch_size = count("batch_size", batch_size, least=WIDTH_FACTOR)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        student_maps, teacher_maps = self.maps(student, teacher)
        self.least_images = images_for_batch_norm([*student_maps, *teacher_maps])
        self.queries = nn.ModuleList(SimilarityEmbedding(self.batch_size) for _ in student_maps)
        self.keys = nn.ModuleList(SimilarityEmbedding(self.batch_size) for _ in teacher_maps)
        self.projectors = nn.ModuleList(
            nn.ModuleList(_projector(student_map, teacher_map) for teacher_map in teacher_maps)
            for student_map in student_maps
        )

    def attention(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Return the share of each teacher map in the loss of each student map, (B, S, T)."""
        return semckd_attention(self._embed(self.queries, student_maps), self._embed(self.keys, teacher_maps))

    def _embed(self, embeddings: nn.ModuleList, maps: Sequence[Tensor]) -> Tensor:
        pairs = zip(embeddings, maps, strict=True)
        return torch.stack(
            [embed(similarity_rows(feature_map, self.batch_size)) for embed, feature_map in pairs], dim=1
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            projected = [
                [
                    project(pooled_to_smaller(student_map, teacher_map)[0])
                    for project, teacher_map in zip(row.children(), teacher_maps, strict=True)
                ]
                for row, student_map in zip(self.projectors, student_maps, strict=True)
            ]
        return semckd_loss(projected, teacher_maps, self.attention(student_maps, teacher_maps))
