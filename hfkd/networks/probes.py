"""Probes of frozen features: nearest neighbours, a linear classifier, and their similarity to a teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as in DINO (Caron et al., 2021)
CHUNK = 1024  # images that are compared with all others at a time


def knn_classes(
    features: Tensor, known: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS, same_images: bool = False
) -> Tensor:
    """Return the class (N,) of each image by a vote of its most similar known images.

    The similarity is the cosine, and a neighbour's vote weighs exp(cosine / 0.07).

    Args:
        features: (N, D), of the images to classify.
        known: (M, D), of the images with labels.
        labels: (M,), in 0 ... C - 1.
        neighbours: number of voters; all known images where there are fewer.
        same_images: `features` are those of the known images, and an image has no vote for itself.
    """
    features, known = F.normalize(features, dim=1), F.normalize(known, dim=1)
    neighbours = min(neighbours, len(known) - same_images)
    classes = []
    for start in range(0, len(features), CHUNK):
        similarity = features[start : start + CHUNK] @ known.T
        if same_images:
            similarity.diagonal(start).fill_(-torch.inf)
        cosine, index = similarity.topk(neighbours, dim=1)
        votes = similarity.new_zeros(len(similarity), int(labels.max()) + 1)
        classes.append(votes.scatter_add_(1, labels[index], (cosine / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(classes)


def linear_classes(features: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Return the class (N,) of each image by logistic regression on standardized features.

    It is scikit-learn's, with its default L2 penalty (C = 1), fitted on `known` (M, D) and `labels` (M,).
    """
    from sklearn.linear_model import LogisticRegression  # a second to import, and only this probe needs it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(known.numpy(), labels.numpy())
    return torch.from_numpy(classifier.predict(features.numpy()))


PROBES = {"knn": knn_classes, "linear": linear_classes}


def top1(classes: Tensor, labels: Tensor) -> float:
    """Return the share of right classes (N,) in percent."""
    return 100 * (classes == labels).double().mean().item()


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return the linear centred kernel alignment of two networks' features (N, D) and (N, E) of the same images.

    It is 1 for features that agree up to rotation and scale (Kornblith et al., 2019).
    """
    one, other = (values.double() - values.double().mean(dim=0) for values in (one, other))
    norms = (one.T @ one).norm() * (other.T @ other).norm()
    return ((one.T @ other).square().sum() / norms).item()


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine of two networks' features (N, D) of the same images."""
    return F.cosine_similarity(one.double(), other.double(), dim=1).mean().item()
