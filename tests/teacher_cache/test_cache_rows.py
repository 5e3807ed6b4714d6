"""A row of a teacher cache: what is stored of logits, and what comes back."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hfkd.losses import standardize
from hfkd.teacher_cache.rows import INDICES, LOGITS, RowFormat

HALF = 2**-11  # what rounding to float16 changes, relatively


def logits_of(*shape, scale=3.0, offset=0.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def stored(row, *views):
    """What a batch holds of the logits of each view."""
    return row.tensors(row.encode(views))


def test_all_logits_come_back_rounded():
    row, views = RowFormat(7, 2), [logits_of(5, 7, seed=seed) for seed in (1, 2)]
    batch = stored(row, *views)
    assert row.dtype.itemsize == 2 * 7 * 2
    for view, logits in enumerate(views):
        assert torch.equal(row.decode(batch, view, None, False), logits.half().float())


@pytest.mark.parametrize("offset", [0.0, 500.0])
@pytest.mark.parametrize("zscore", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_largest_are_exact_and_the_others_have_their_share(zscore, temperature, offset):
    """Wherever the logits' mean lies."""
    classes, k = 100, 16
    row = RowFormat(classes, 2, k, (1.0, 4.0))
    views = [logits_of(8, classes, seed=seed, offset=offset) for seed in (1, 2)]
    batch = stored(row, *views)
    for view, logits in enumerate(views):
        exact = standardize(logits) if zscore else logits
        given = row.decode(batch, view, temperature, zscore)
        largest = exact.topk(k).indices
        assert torch.equal(given.topk(k).indices.sort().values, largest.sort().values)
        error = (given.gather(1, largest) - exact.gather(1, largest)).abs()
        scale = 1 if zscore else logits.std(1, keepdim=True)
        assert (error <= scale * HALF * standardize(logits).gather(1, largest).abs() + 1e-6 * (1 + offset)).all()
        others = torch.ones_like(exact, dtype=torch.bool).scatter(1, largest, False)
        rest = given[others].view(8, -1)
        assert (rest == rest[:, :1]).all()
        expected = (exact / temperature).masked_fill(~others, -torch.inf).logsumexp(1)
        torch.testing.assert_close((rest / temperature).logsumexp(1), expected, rtol=1e-5, atol=1e-5)
        shares, true_shares = ((values / temperature).softmax(1) for values in (given, exact))
        torch.testing.assert_close(shares.gather(1, largest), true_shares.gather(1, largest), rtol=5e-3, atol=0)


@pytest.mark.parametrize("zscore", [False, True])
def test_all_classes_among_the_largest(zscore):
    logits = logits_of(6, 10)
    row = RowFormat(10, 1, 10, (2.0,))
    given = row.decode(stored(row, logits), 0, 2.0, zscore)
    exact = standardize(logits) if zscore else logits
    distances = (exact - exact.mean(1, keepdim=True)).abs()
    assert ((given - exact).abs() <= HALF * distances + 1e-6).all()


EXTREMES = {
    "one hot": F.one_hot(torch.arange(4), 50) * 1e4,
    "one cold": -1e4 * F.one_hot(torch.arange(4), 50),
    "one in front": torch.zeros(4, 50).index_fill_(1, torch.tensor([3]), 200.0) + logits_of(4, 50, scale=0.1),
    "equal": torch.full((4, 50), 3.0),
    "far from zero": logits_of(4, 50, offset=1e6),
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_logits_stay_numbers(kind):
    """Where the top k hold all probability within rounding, too."""
    logits = EXTREMES[kind].float()
    for k in (1, 16, 49, 50):
        row = RowFormat(50, 1, k, (0.5, 20.0))
        batch = stored(row, logits)
        for zscore in (False, True):
            exact = standardize(logits) if zscore else logits
            for temperature in row.temperatures:
                given = row.decode(batch, 0, temperature, zscore)
                assert given.isfinite().all()
                shares, true_shares = ((values / temperature).softmax(1) for values in (given, exact))
                # Of the first class, when its distance to the others is rounded to float16.
                spread = HALF * (exact.amax(1) - exact.amin(1)) / temperature + 1e-6 * exact.abs().amax(1) / temperature
                log_error = (shares.amax(1) / true_shares.amax(1)).log().abs()
                assert (log_error <= spread + 1e-5).all()


@pytest.mark.parametrize("classes, dtype", [(32_768, torch.int16), (32_769, torch.int32)])
def test_the_last_of_many_classes(classes, dtype):
    logits = torch.zeros(1, classes)
    logits[0, -1] = 9.0
    row = RowFormat(classes, 1, 1, (1.0,))
    batch = stored(row, logits)
    assert batch[INDICES].dtype == dtype and row.decode(batch, 0, 1.0, False).argmax().item() == classes - 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 70_000.0])
def test_logits_that_cannot_be_stored(bad):
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    with pytest.raises(RuntimeError, match="finite numbers, up to 65,504.*set top_k"):
        RowFormat(5, 1).encode([logits])
    if not np.isfinite(bad):
        with pytest.raises(RuntimeError, match="finite numbers"):
            RowFormat(5, 1, 2, (1.0,)).encode([logits])


def test_a_row_is_as_small_as_said():
    """Of ImageNet: 2,000 bytes of all logits; 80 of the largest 16 at one temperature."""
    assert RowFormat(1000, 1).dtype.itemsize == 2000
    assert RowFormat(1000, 1, 16, (2.0,)).dtype.itemsize == 16 * 4 + 4 * 4
    assert RowFormat(1000, 2).dtype.names == (LOGITS,)
