import pytest
import torch
from helpers import Plain, config, images
from torch.autograd import gradcheck

from hfkd import DistillationTrainer
from hfkd.losses import kd_loss
from hfkd.losses.ttm import TTMLoss, ttm_loss


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("ttm"):
        new_golden.check_loss(case, TTMLoss(settings["l"]), settings["zscore"])


def test_the_target_is_the_normalized_power_of_the_probabilities():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    powers = teacher.softmax(1) ** 0.3
    target = powers / powers.sum(1, keepdim=True)
    expected = (target * (target.log() - student.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(ttm_loss(student, teacher, 0.3), expected)


def test_an_exponent_of_one_is_kd_at_temperature_one():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    torch.testing.assert_close(ttm_loss(student, teacher, 1.0), kd_loss(student, teacher, 1.0))


def test_the_teacher_is_read_at_the_inverse_of_the_exponent():
    assert TTMLoss(0.25).teacher_temperature == 4
    assert TTMLoss(0.1).teacher_temperature == pytest.approx(10)


@pytest.mark.parametrize("method", ["ttm", "wttm"])
def test_zscores_of_a_softened_teacher_are_warned_of(method, caplog):
    """The Z-scores of a student cannot be as flat."""
    for exponent in (1.0, 0.5):
        assert "does not suit Z-scores" not in caplog.text
        args = config(losses={method: {"exponent": exponent}}, logit_standardization=True)
        DistillationTrainer(Plain(), Plain(), args, train_dataset=images(8))
    assert f"The loss '{method}' does not suit Z-scores" in caplog.text and "temperature 2," in caplog.text


def test_gradcheck():
    assert gradcheck(lambda logits: ttm_loss(logits, random(3, 5, seed=1), 0.3), random(3, 5).requires_grad_())
