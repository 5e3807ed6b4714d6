import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import hfkd.losses
from hfkd.losses import LOSSES, CTKDLoss, DistillationLoss, DKDLoss, KDLoss, build_losses
from hfkd.losses.checks import checked_arguments


class SumLoss(DistillationLoss):
    def forward(self, student, teacher, batch):
        student_logits, _ = self.logits(student, teacher)
        return student_logits.square().sum()


def fails(losses, *words):
    with pytest.raises(ValueError) as failure:
        build_losses(losses, logit_standardization=False)
    for word in words:
        assert word in str(failure.value), f"{word!r} is not in {str(failure.value)!r}"


def test_every_loss_is_a_method_under_the_name_of_its_file():
    """Losses that other losses build on, which have no citation, are none."""
    found = {}
    for path in Path(hfkd.losses.__file__).parent.glob("[a-z]*.py"):
        module = importlib.import_module(f"hfkd.losses.{path.stem}")
        for loss in vars(module).values():
            if inspect.isclass(loss) and loss.__module__ == module.__name__ and getattr(loss, "citation", ""):
                assert path.stem not in found, f"{path} holds two methods"
                found[path.stem] = loss
    assert found == LOSSES
    assert LOSSES["kd"] is KDLoss and LOSSES["ctkd"] is CTKDLoss and next(iter(LOSSES)) == "kd"
    for name, loss in LOSSES.items():
        assert getattr(hfkd.losses, loss.__name__) is loss
        assert any(re.fullmatch(rf"{name}(_\w+)?_loss", function) for function in vars(hfkd.losses)), name


def test_parameters_reach_the_constructor_and_order_is_kept():
    losses = build_losses({"dkd": {"beta": 2, "weight": 0.5}, "kd": {}, "ctkd": None}, logit_standardization=False)
    assert list(losses) == ["dkd", "kd", "ctkd"]
    assert [type(loss) for loss in losses.values()] == [DKDLoss, KDLoss, CTKDLoss]
    assert (losses["dkd"].beta, losses["dkd"].alpha, losses["dkd"].weight) == (2.0, 1.0, 0.5)
    assert losses["kd"].temperature == 4.0
    assert len(list(losses.parameters())) == 1


def test_no_losses_is_training_without_a_teacher():
    assert len(build_losses({}, logit_standardization=True)) == 0


LAYERS = {"student_layers": [0], "teacher_layers": [0]}
REQUIRED = {"locality_guidance": LAYERS, "ofd": LAYERS | {"teacher_norms": ["bn1"]}}  # what has no default


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("switch", [False, True])
def test_one_switch_standardizes_every_loss(name, switch):
    losses = build_losses({name: REQUIRED.get(name), "mine": SumLoss()}, logit_standardization=switch)
    assert [loss.logit_standardization for loss in losses.values()] == [switch, switch]


def test_an_instance_is_taken_under_any_name(make_outputs):
    mine = SumLoss(weight=2.0)
    losses = build_losses({"my_loss": mine, "kd": {}}, logit_standardization=True)
    assert losses["my_loss"] is mine
    # Standardized rows of 10 entries have a square sum of 9.
    assert losses["my_loss"](make_outputs(), make_outputs(), {}).item() == pytest.approx(54, rel=1e-4)


def test_an_unknown_method_is_named_with_the_nearest_and_all():
    fails({"dkdd": {}}, "'dkdd'", "Did you mean 'dkd'?", *LOSSES)
    fails({"KD": {}}, "'KD'", "Did you mean 'kd'?")
    fails({"xyzzy": {}}, "'xyzzy'", *LOSSES)


def test_an_unknown_parameter_is_named_with_the_nearest_and_all():
    fails({"dkd": {"betta": 1.0}}, "losses.dkd", "'betta'", "Did you mean 'beta'?", "alpha, beta, temperature")
    fails({"kd": {"warmup_epochs": 3}}, "losses.kd", "'warmup_epochs'", "temperature, weight")


@pytest.mark.parametrize("value", ["hot", None, [4.0], {"T": 4.0}, True, ""])
def test_a_value_of_another_type_is_refused(value):
    fails({"kd": {"temperature": value}}, "losses.kd.temperature", repr(value), type(value).__name__)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_switch_takes_true_or_false(value):
    fails({"ctkd": {"instance_wise": value}}, "losses.ctkd.instance_wise", repr(value), "true or false")


@pytest.mark.parametrize(("written", "number"), [("5e-1", 0.5), ("1e3", 1000.0), (" 2 ", 2.0), (3, 3.0)])
def test_numbers_that_yaml_reads_as_strings_are_numbers(written, number):
    temperature = build_losses({"kd": {"temperature": written}}, logit_standardization=False)["kd"].temperature
    assert temperature == number and isinstance(temperature, float)


RANGES = [
    ("kd", "temperature", (0, -1.0, float("nan"), float("inf"), "nan", "-2e0")),
    ("kd", "weight", (-0.1, float("nan"))),
    ("dkd", "temperature", (0.0,)),
    ("dkd", "alpha", (-1,)),
    ("dkd", "beta", (-1, float("inf"))),
    ("dkd", "warmup_epochs", (-1, float("nan"))),
    ("dkd", "weight", (-1,)),
    ("mlkd", "temperature", (0, -4)),
    ("mlkd", "weight", (-1,)),
    ("ctkd", "start", (0, -1)),
    ("ctkd", "end", (0, float("nan"))),
    ("ctkd", "curriculum_epochs", (-1,)),
    ("ctkd", "weight", (-1,)),
    *(("dist", key, (-1, float("nan"))) for key in ("beta", "gamma", "weight")),
    ("dist", "temperature", (0, -1)),
    *((method, "exponent", (0, -1, float("nan"))) for method in ("ttm", "wttm")),
    *((method, "weight", (-1,)) for method in ("ttm", "wttm", "nkd", "abkd", "wsld", "hard", "rld")),
    ("nkd", "gamma", (-1, float("nan"))),
    *((method, "temperature", (0, -1)) for method in ("nkd", "abkd", "wsld", "rld")),
    *(("abkd", key, (float("nan"), float("inf"))) for key in ("alpha", "beta")),
    ("wsld", "alpha", (-1,)),
    *(("rld", key, (-1, float("nan"))) for key in ("alpha", "beta", "warmup_epochs")),
    ("rld", "target_temperature", (0, -1)),
    *(("crld", key, (-1, float("nan"))) for key in ("within_view", "cross_view", "weight")),
    ("crld", "temperature", (0,)),
    *(("crld", key, (-0.1, 1.1)) for key in ("weak_threshold", "strong_threshold")),
    *(("rkd", key, (-1, float("nan"))) for key in ("distance", "angle", "weight")),
    *((method, "weight", (-1,)) for method in ("nst", "cc", "token_mse", "srd", "itrd", "vkd", "feature_queue")),
    ("srd", "exponent", (0.5, float("inf"))),
    *(("itrd", key, (-1,)) for key in ("correlation", "mutual")),
    ("itrd", "alpha", (0.4,)),
    ("feature_queue", "temperature", (0,)),
    *(("reviewkd", key, (-1, float("nan"))) for key in ("warmup_epochs", "weight")),
    *((method, "weight", (-1,)) for method in ("cat_kd", "mgd")),
    ("mgd", "dropped", (-0.1, 1.1)),
    *(("skd", key, (-1, float("nan"))) for key in ("instance", "direction", "weight")),
    *(("skd", key, (0, -1)) for key in ("temperature", "damping")),
    *(("ofa", key, (-1, float("nan"))) for key in ("logits", "branches", "weight")),
    *(("ofa", key, (0,)) for key in ("eps", "temperature")),
    *(("ca_mkd", key, (-1, float("nan"))) for key in ("logits", "features", "weight")),
    ("ca_mkd", "temperature", (0,)),
    *(("tf_kd", key, (-1, float("nan"))) for key in ("alpha", "multiplier", "weight")),
    ("tf_kd", "temperature", (0,)),
    *(("uskd", key, (-1, float("nan"))) for key in ("alpha", "beta", "mu", "weight")),
]


@pytest.mark.parametrize(("method", "key", "value"), [(m, k, value) for m, k, values in RANGES for value in values])
def test_a_value_out_of_range_is_refused(method, key, value):
    number = float(value)
    fails({method: {key: value}}, f"losses.{method}", key, repr(number), "give a finite number")
    with pytest.raises(ValueError, match=re.escape(f"{key} is {number!r}: give a finite number")):
        LOSSES[method](**{key: number})


@pytest.mark.parametrize("value", ["4", None, True])
def test_a_constructor_refuses_what_is_no_number(value):
    with pytest.raises(ValueError, match=re.escape(f"temperature is {value!r}")):
        KDLoss(temperature=value)


def test_edges_of_the_ranges_are_taken():
    losses = build_losses(
        {
            "dkd": {"alpha": 0, "beta": 0, "warmup_epochs": 0, "weight": 0},
            "ctkd": {"curriculum_epochs": 0, "start": 1e-3},
        },
        logit_standardization=False,
    )
    assert (losses["dkd"].alpha, losses["dkd"].beta, losses["dkd"].weight) == (0, 0, 0)
    assert list(losses) == ["dkd", "ctkd"]


@pytest.mark.parametrize("given", [4.0, "temperature=4", [4.0], torch.nn.Linear(1, 1), KDLoss])
def test_what_is_neither_parameters_nor_a_loss_is_refused(given):
    fails({"kd": given}, "losses.kd", "by name", "instance of a DistillationLoss")


@pytest.mark.parametrize("losses", [["kd"], "kd", None])
def test_losses_must_be_a_mapping(losses):
    fails(losses, repr(losses), "mapping")


@pytest.mark.parametrize("name", ["my.loss", "my loss", "", 3, "items", "training"])
def test_a_name_must_fit_a_module(name):
    fails({name: SumLoss()}, repr(name), "letters")


def test_parameters_a_method_requires_and_their_types():
    class Layered(DistillationLoss):
        def __init__(self, layer: str, size: int, shapes: list[int] | None = None, weight: float = 1.0):
            super().__init__(weight)

    given = {"layer": "stage3", "size": "1e2", "shapes": [1, 2]}
    assert checked_arguments("layered", Layered, given) == {
        "layer": "stage3",
        "size": 100,
        "shapes": [1, 2],
        "weight": 1.0,
    }
    with pytest.raises(ValueError, match="losses.layered needs the parameter 'size'"):
        checked_arguments("layered", Layered, {"layer": "stage3"})
    with pytest.raises(ValueError, match=r"losses.layered.size is 2.5 \(float\)"):
        checked_arguments("layered", Layered, {"layer": "stage3", "size": 2.5})
    with pytest.raises(ValueError, match=r"losses.layered.layer is 3 \(int\): give a string"):
        checked_arguments("layered", Layered, {"layer": 3, "size": 2})


def test_a_loss_needs_a_forward(make_outputs):
    with pytest.raises(NotImplementedError, match="DistillationLoss does not define forward"):
        DistillationLoss()(make_outputs(), make_outputs(), {})
