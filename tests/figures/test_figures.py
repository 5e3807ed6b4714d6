"""The numbers of the figures, against closed forms, and what is drawn of them."""

import csv
import json

import numpy as np
import pytest
import torch

from hfkd.figures import class_matrices, embeddings, logit_spread, reliability, temperature
from hfkd.figures.observations import NetworkOutputs, Observations, observe
from hfkd.figures.tables import LeftOutError, write_csv
from hfkd.networks.teacher import Teacher
from hfkd.runs.finished import FinishedRun
from hfkd.runs.published import published_runs

NAMES = ["cat", "dog", "eel"]


def observations(count=60, classes=3, **networks):
    """Random logits and embeddings; `networks` replaces some."""
    draws = np.random.default_rng(0)
    labels = np.arange(count) % classes
    outputs = {
        role: NetworkOutputs(
            (scale * draws.standard_normal((count, classes))).astype(np.float32),
            draws.standard_normal((count, 4)).astype(np.float32),
        )
        for role, scale in (("student", 1), ("teacher", 3))
    }
    return Observations(NAMES[:classes], labels, np.arange(count) + 100, outputs | networks)


def test_class_means():
    logits = np.array([[1.0, 2, 3], [3, 4, 5], [0, 0, 9]])
    means = class_matrices.class_means(logits, np.array([0, 0, 2]))
    np.testing.assert_array_equal(means, [[2, 3, 4], [np.nan] * 3, [0, 0, 9]])


def test_class_correlations():
    """Of a rising, a falling and an unrelated logit: 1, -1 and 0; nothing is known of a constant one."""
    rising = np.array([-1.5, -0.5, 0.5, 1.5])
    logits = np.stack([rising, 5 - 2 * rising, np.array([1, -1, -1, 1]), np.ones(4)], axis=1)
    expected = [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]
    correlations = class_matrices.class_correlations(logits)
    np.testing.assert_allclose(correlations[:3, :3], expected, atol=1e-12)
    assert np.isnan(correlations[3]).all()


def test_class_matrices():
    observed = observations()
    student = observed.networks["student"].logits
    # The same relations at another scale: only the logits themselves differ.
    wider = NetworkOutputs(4 * student + 1, None)
    table = class_matrices.measure(observations(teacher=wider))
    means = class_matrices.class_means(student, observed.labels)
    expected = np.abs(3 * means + 1) * (1 - np.eye(3))
    matrices = class_matrices.matrices_of(table)
    assert list(matrices) == ["mean logits", "mean Z-scores", "correlations"]
    np.testing.assert_allclose(matrices["mean logits"], expected, rtol=1e-5)
    for name in ("mean Z-scores", "correlations"):
        np.testing.assert_allclose(matrices[name], 0, atol=1e-5)
    assert list(table)[2:] == ["0 cat", "1 dog", "2 eel"] == table["class"].tolist()[3:6]
    figure = class_matrices.draw(table)
    for axes, values in zip(figure.axes[:3], matrices.values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), values)
    assert f"mean {expected.mean():.3f}, max {expected.max():.3f}" in figure.axes[0].get_title()


def test_no_title_runs_into_a_colour_bar():
    """Long class names leave the matrices little room."""
    observed = observations(classes=10)
    observed.class_names[:] = [f"golden retriever {index}" for index in range(10)]
    figure = class_matrices.draw(class_matrices.measure(observed))
    figure.canvas.draw()
    panels, bars = figure.axes[:3], figure.axes[3:]
    for panel, bar in zip(panels, bars, strict=True):
        assert not panel.title.get_window_extent().overlaps(bar.get_tightbbox())


def test_no_matrices_without_a_teacher():
    observed = observations()
    del observed.networks["teacher"]
    with pytest.raises(LeftOutError, match="no teacher"):
        class_matrices.measure(observed)


def test_calibration():
    """Four images by hand: two at 0.88 (one right), one at 0.75 (right), one at 0.55 (wrong), in ten bins."""
    confidence, right = np.array([0.88, 0.88, 0.75, 0.55]), [True, False, True, False]
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    table = reliability.reliability(logits, np.where(right, 0, 1), bins=10)
    np.testing.assert_array_equal(table["images"], [0, 0, 0, 0, 0, 1, 0, 1, 2, 0])
    np.testing.assert_allclose(table["accuracy"][[5, 7, 8]], [0, 100, 50])
    np.testing.assert_allclose(table["confidence"][[5, 7, 8]], [55, 75, 88])
    assert np.isnan(table["accuracy"][0]) and table["from"][8] == pytest.approx(80)
    assert reliability.calibration_error(table) == pytest.approx((55 + 25 + 2 * 38) / 4)
    # The upper end belongs to a bin: 0.5, the one end that a softmax gives to the bit on any processor.
    table = reliability.reliability(np.zeros((1, 2)), np.array([0]), bins=10)
    np.testing.assert_array_equal(table["images"], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0])


def test_the_reliability_diagram():
    observed = observations()
    table = reliability.measure(observed)
    figure = reliability.draw(table)
    above, above_teacher, below, _ = figure.axes
    bars = [bar.get_height() for bar in above.patches]
    np.testing.assert_array_equal(bars, np.nan_to_num(table["accuracy"][:15]))
    assert table["network"].tolist() == ["student"] * 15 + ["teacher"] * 15
    assert sum(bar.get_height() for bar in below.patches) == pytest.approx(100)
    one = {name: values[:15] for name, values in table.items()}
    assert f"{reliability.calibration_error(one):.2f} %" in above.get_title()
    assert above_teacher.get_title().startswith("teacher: expected")
    alone = reliability.draw(one).axes[0]
    assert alone.get_title().startswith("expected"), "one network needs no role"


def test_the_spread_of_logits():
    """Of 0, 3, 6: 6 and 3; a Z-score has a standard deviation of 1 whatever it is of."""
    logits = np.array([[0, 3, 6], [1, 1, 4]], dtype=np.float32)
    spread = logit_spread.spread(logits)
    np.testing.assert_allclose(spread["range"], [6, 3])
    np.testing.assert_allclose(spread["std"], [3, 3**0.5])
    table = logit_spread.measure(observations())
    for role in ("student", "teacher"):
        np.testing.assert_allclose(table[f"{role}_std_standardized"], 1, rtol=1e-5)
    scaled = table["teacher_range"] / table["teacher_std"]  # what the Z-score leaves of a range
    np.testing.assert_allclose(table["teacher_range_standardized"], scaled, rtol=1e-5)

    figure = logit_spread.draw(table)
    axes = figure.axes[0]
    for stairs, name in zip(axes.patches, ("student_range", "teacher_range"), strict=True):
        values, edges, _ = stairs.get_data()
        np.testing.assert_allclose(values, 100 * np.histogram(table[name], edges)[0] / 60)
        assert sum(values) == pytest.approx(100)
    assert f"student, mean {table['student_range'].mean():.2f}" in axes.get_legend_handles_labels()[1]


def test_embeddings():
    """Two distant clouds stay apart, and a map is the same every time."""
    draws = np.random.default_rng(1)
    points = draws.standard_normal((40, 5)) + 50 * (np.arange(40) % 2)[:, None]
    projected = embeddings.project(points.astype(np.float32), perplexity=5)
    np.testing.assert_array_equal(projected, embeddings.project(points.astype(np.float32), perplexity=5))
    distances = np.linalg.norm(projected[:, None] - projected[None], axis=2) + np.diag(np.full(40, np.inf))
    assert all(distances.argmin(axis=1) % 2 == np.arange(40) % 2)
    with pytest.raises(LeftOutError, match="perplexity of 40 .* there are 40.*--tsne_perplexity"):
        embeddings.project(points, perplexity=40)


def test_which_embeddings_are_shown():
    labels = np.array([5, 0, 1, 0, 2, 1])
    np.testing.assert_array_equal(embeddings.choose(labels, classes=2, images=10), [1, 2, 3, 5])
    few = embeddings.choose(labels, classes=2, images=3)
    assert len(few) == 3 and set(few) < {1, 2, 3, 5}
    table = embeddings.measure(observations(), classes=2, images=30, perplexity=5)
    assert set(table["class"]) == {"cat", "dog"} and len(table["image"]) == 30
    assert all(table["image"] == 100 + np.sort(table["image"] - 100)) and all((table["image"] - 100) % 3 < 2)
    figure = embeddings.draw(table)
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[1].collections])
    expected = np.stack([table["teacher_x"], table["teacher_y"]], axis=1)
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, expected))
    assert [text.get_text() for text in figure.legends[0].texts] == ["cat", "dog"]
    alone = observations(teacher=NetworkOutputs(observations().networks["teacher"].logits, None))  # an ensemble
    assert "teacher_x" not in embeddings.measure(alone, perplexity=5)


RUN = "cifar100/resnet56-resnet20/ctkd_zscore"


def ctkd_run(folder, rows, recipe=RUN):
    return FinishedRun(folder, {"recipe": recipe, "losses": {"ctkd": {}}, "epochs": rows}, {})


def test_temperature(tmp_path):
    rows = [{"epoch": epoch, "ctkd_temperature": 20.0 - epoch} for epoch in (1.0, 2.0)]
    state = [*rows[:1], {"epoch": 1.0, "eval_top1": 5.0}, {"epoch": 1.5, "ctkd_temperature": 18.4}, rows[1]]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": state}))
    table = temperature.measure(ctkd_run(tmp_path, rows))
    published = published_runs()[RUN].temperature
    assert table["curve"].tolist() == ["measured"] * 3 + ["published"] * 2
    np.testing.assert_array_equal(table["epoch"], [1, 1.5, 2, 1, 2])
    np.testing.assert_array_equal(table["temperature"], [19, 18.4, 18, *published[:2]])
    measured, dotted = temperature.draw(table).axes[0].lines
    np.testing.assert_array_equal(measured.get_ydata(), [19, 18.4, 18])
    assert not measured.get_clip_on(), "a point at the edge is whole"
    assert dotted.get_linestyle() == ":" and dotted.get_label() == "published"

    (tmp_path / "trainer_state.json").unlink()  # not copied, or the run was cut off: a value an evaluation is left
    table = temperature.measure(ctkd_run(tmp_path, rows, recipe="mine"))
    np.testing.assert_array_equal(table["temperature"], [19, 18])
    assert len(temperature.draw(table).axes[0].lines) == 1


def test_no_temperature(tmp_path):
    kd = FinishedRun(tmp_path, {"losses": {"kd": {}}}, {})
    for run in (None, kd):
        with pytest.raises(LeftOutError, match="only CTKD learns a temperature"):
            temperature.measure(run)
    with pytest.raises(LeftOutError, match="no ctkd_temperature.*logging_strategy"):
        temperature.measure(ctkd_run(tmp_path, [{"epoch": 1.0}]))


def test_csv(tmp_path):
    table = {"class": np.array(["a, b", "c"]), "images": np.array([3, 0]), "accuracy": np.array([2 / 3, np.nan])}
    write_csv(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["class", "images", "accuracy"], ["a, b", "3", "0.666667"], ["c", "0", ""]]


def test_observe():
    """Rows that were not chosen, or do not count, are left out; a network with other classes is refused."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    network = Teacher(model)
    network.prepare(torch.device("cpu"), None, False, layers=["embedding"])
    pixels = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels, index = torch.tensor([0, 1, 2, 0, -100, 2]), torch.arange(6)
    batches = [
        {"pixel_values": pixels[part], "labels": labels[part], "index": index[part]}
        for part in (slice(0, 3), slice(3, 5), slice(5, 6))
    ]
    observed = observe({"student": network}, batches, NAMES, torch.device("cpu"), np.array([0, 2, 4, 5]))
    assert observed.rows.tolist() == [0, 2, 5] and observed.labels.tolist() == [0, 2, 2]
    expected = model(pixels[[0, 2, 5]])
    np.testing.assert_allclose(observed.networks["student"].logits, expected.detach(), rtol=1e-5)
    np.testing.assert_array_equal(observed.networks["student"].embeddings, pixels[[0, 2, 5]].flatten(1))
    with pytest.raises(ValueError, match="student has 3 classes and the data set 2"):
        observe({"student": network}, batches, NAMES[:2], torch.device("cpu"), np.arange(6))
    with pytest.raises(ValueError, match="empty"):
        observe({"student": network}, batches, NAMES, torch.device("cpu"), np.array([4]))
