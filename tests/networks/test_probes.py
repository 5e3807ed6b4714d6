"""Probes of features, against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from hfkd.networks import probes


@pytest.mark.parametrize("same_images", [False, True])
def test_neighbours(same_images, monkeypatch):
    monkeypatch.setattr(probes, "CHUNK", 7)
    known, labels = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 4
    features = known if same_images else torch.randn(16, 6, dtype=torch.float64)
    expected = []
    for row, feature in enumerate(features):
        votes = {}
        similar = [(F.cosine_similarity(feature, other, dim=0), other_row) for other_row, other in enumerate(known)]
        similar = [pair for pair in similar if not (same_images and pair[1] == row)]
        for cosine, other_row in sorted(similar, reverse=True)[:20]:
            votes[labels[other_row].item()] = votes.get(labels[other_row].item(), 0) + (cosine / 0.07).exp().item()
        expected.append(max(votes, key=votes.get))
    assert probes.knn_classes(features, known, labels, same_images=same_images).tolist() == expected
    assert len(set(expected)) > 1


def test_fewer_images_than_neighbours():
    known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([2, 2, 0])
    assert probes.knn_classes(known, known, labels).tolist() == [2, 2, 0]
    assert probes.knn_classes(known, known, labels, same_images=True).tolist() == [2, 2, 2]


def test_linear_classifier():
    """Features of very different scale, one of which tells the class."""
    labels = torch.arange(60) % 3
    features = torch.randn(60, 4) * torch.tensor([1000.0, 1.0, 1e-3, 1.0])
    features[:, 2] += labels * 0.01
    assert probes.top1(probes.linear_classes(features[:20], features[20:], labels[20:]), labels[:20]) == 100
    assert probes.top1(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 2, 2])) == 50


def test_linear_cka():
    """By the definition of Kornblith et al., from the centred similarities of the images."""
    one, other = torch.randn(12, 5), torch.randn(12, 3)
    center = torch.eye(12, dtype=torch.float64) - 1 / 12
    first, second = (center @ (values @ values.T).double() @ center for values in (one, other))
    expected = (first * second).sum() / (first.norm() * second.norm())
    assert probes.linear_cka(one, other) == pytest.approx(expected.item())
    rotated = one @ torch.linalg.qr(torch.randn(5, 5)).Q * 3 + 1
    assert probes.linear_cka(one, rotated) == pytest.approx(1)


def test_mean_cosine():
    one, other = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert probes.mean_cosine(one, other) == pytest.approx(0.5)
