"""What a search tries: what the section of a recipe says, or what follows from the losses."""

import pytest
from helpers import config

from hfkd.search.space import search_space, settings

KD = {"kd": {"temperature": 2.0, "weight": 9.0}}
TEMPERATURE = "losses.kd.temperature"


def space_of(section, losses=None, **changes):
    return {each.key: each for each in search_space(section, config(losses=losses or KD, **changes))}


def test_by_default_temperature_and_weight_of_each_loss_and_the_learning_rate():
    losses = {"kd": {"temperature": 2, "weight": 9}, "crd": {}, "ctkd": {"weight": 0}}
    space = space_of(None, losses, learning_rate=0.06)
    # CRD's temperature is not one of logits, and of a weight of 0 there is no third.
    assert list(space) == [TEMPERATURE, "losses.kd.weight", "losses.crd.weight", "learning_rate"]
    rate = space["learning_rate"]
    assert (rate.low, rate.default, rate.high, rate.log) == (pytest.approx(0.02), 0.06, pytest.approx(0.18), True)
    assert space["losses.crd.weight"].default == 0.8  # which the recipe leaves to the loss


def test_a_section():
    section = {
        TEMPERATURE: {"low": 1, "high": 8, "log": True},
        "losses.kd.weight": {"low": "1e0", "high": 20},  # YAML reads that as a string
        "learning_rate": {"choices": [0.025, "5e-2"]},
        "losses.crd.negatives": {"low": 256, "high": 16384},
        "losses.crd.relaxed_positives": {"choices": [False, True]},
    }
    space = space_of(section, KD | {"crd": {}})
    temperature, weight, rate, negatives, relaxed = space.values()
    assert (temperature.low, temperature.high, temperature.log, temperature.default) == (1, 8, True, 2)
    assert (weight.low, weight.high, weight.log) == (1, 20, False) and isinstance(weight.low, float)
    assert rate.choices == (0.025, 0.05) and rate.default == 0.05
    assert (negatives.low, negatives.high) == (256, 16384) and isinstance(negatives.low, int)
    assert relaxed.choices == (False, True)


@pytest.mark.parametrize(
    "section, message",
    [
        ({}, r"search is {}: give keys with their values, such as `search: {losses.kd"),
        ([TEMPERATURE], "give keys with their values"),
        (
            {"losses.kd.temperatur": {"low": 1, "high": 2}},
            f"'losses.kd.temperatur' cannot.* Did you mean '{TEMPERATURE}'",
        ),
        ({"learning_rat": {"low": 1, "high": 2}}, "Did you mean 'learning_rate'"),
        ({"seed": {"low": 1, "high": 2}}, "'seed' cannot be searched.*Valid: losses.kd.temperature, .*, ce_weight"),
        ({TEMPERATURE: {"low": 8, "high": 1}}, "low 8 and high 1: low must be below high"),
        ({TEMPERATURE: {"low": 2, "high": 2}}, "low must be below high"),
        ({TEMPERATURE: {"low": 1}}, "give `low` and `high`"),
        ({TEMPERATURE: {"low": 1, "high": 4, "step": 1}}, "give `low` and `high`"),
        ({TEMPERATURE: [1, 4]}, "give `low` and `high`"),
        ({TEMPERATURE: {"low": 1, "high": "four"}}, "takes numbers, got 'four'"),
        ({TEMPERATURE: {"low": 1, "high": 4, "log": 1}}, "log of losses.kd.temperature must be true or false"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "needs a low above 0"),
        ({TEMPERATURE: {"low": 3, "high": 4}}, "own value 2 lies outside"),
        ({TEMPERATURE: {"choices": [1, 4]}}, "own value 2.0 is not among them"),
        ({TEMPERATURE: {"choices": [2]}}, "a list of two values or more"),
        ({TEMPERATURE: {"choices": 2}}, "a list of two values or more"),
        ({TEMPERATURE: {"low": 0, "high": 4}}, "losses.kd: temperature is 0.0: give a finite number above 0"),
        ({"ce_weight": {"low": -1, "high": 4}}, "ce_weight must not be negative"),
        ({"losses.crd.negatives": {"low": 1.5, "high": 20000}}, "takes whole numbers, got 1.5"),
        ({"losses.crd.relaxed_positives": {"low": 0, "high": 1}}, "not a number: give `choices`"),
        ({"losses.crd.relaxed_positives": {"choices": [0, 1]}}, "takes true or false, got 0"),
    ],
)
def test_what_cannot_be_searched(section, message):
    with pytest.raises(ValueError, match=message):
        space_of(section, KD | {"crd": {}})


def test_settings_of_a_trial():
    losses = {"kd": {"temperature": 2.0, "weight": 9.0}, "pkt": None}
    values = {TEMPERATURE: 3.0, "losses.pkt.weight": 7.0, "learning_rate": 0.1}
    assert settings(values, losses) == {
        "learning_rate": 0.1,
        "losses": {"kd": {"temperature": 3.0, "weight": 9.0}, "pkt": {"weight": 7.0}},
    }
    assert losses == {"kd": {"temperature": 2.0, "weight": 9.0}, "pkt": None}
