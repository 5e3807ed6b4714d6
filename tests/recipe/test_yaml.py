"""YAML 1.2: what values mean, keys given twice, and files that read back as they were written."""

import math

import pytest
import yaml

from hfkd.cli import main
from hfkd.recipe.reading import load_recipe, parse_recipe
from hfkd.recipe.yaml_file import dump_yaml, parse_yaml

MINIMAL = "student_name_or_path: cifar_resnet8\ndataset_name: digits\n"


@pytest.mark.parametrize(
    "text, value",
    [
        *(("1:30", "1:30"), ("010", 10), ("0o10", 8), ("0x10", 16), ("-3", -3), ("+3", 3), ("1_000", "1_000")),
        *(("1e3", 1000.0), ("5e-1", 0.5), ("1.", 1.0), (".5", 0.5), ("-.inf", -math.inf), ("0b1", "0b1")),
        *(("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True), ("FALSE", False)),
        *(("null", None), ("~", None), ("", None), ("2026-01-01", "2026-01-01"), ("=", "="), ("'1e3'", "1e3")),
        ("{a: [1, no], b: {c: 1e1}}", {"a": [1, "no"], "b": {"c": 10.0}}),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text, value):
    read = parse_yaml(text, "text")
    assert read == value and type(read) is type(value)


def test_not_a_number():
    assert math.isnan(parse_yaml(".nan", "text"))


@pytest.mark.parametrize(
    "value",
    [
        *("1e3", "no", "1:30", "010", "0o10", "5e-1", "null", "~", "", "true", "0x1f", ".inf", ".nan", "=", "a: b"),
        *(1e3, 1e-5, 1e22, 0.1, -math.inf, 10, True, None, "straße 🦔", "two\nlines"),
        {"a": ["no", 1e-05, {"1e3": "1e3"}], "b": {}, "c": []},
    ],
    ids=repr,
)
def test_what_is_written_reads_back_the_same(value):
    """Also with PyYAML, which reads YAML 1.1."""
    text = dump_yaml({"z": value, "a": value})
    for read in (parse_yaml(text, "text"), yaml.safe_load(text)):
        assert list(read) == ["z", "a"] and read["z"] == value and type(read["z"]) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nbf16: no\nseed: 2\n", "the key 'seed' is given twice, in lines 3 and 5: remove one"),
        ("losses:\n  kd: {}\n  kd: {}\n", "the key 'kd' is given twice, in lines 4 and 5"),
        ("losses: {kd: {weight: 1, weight: 2}}\n", "the key 'weight' is given twice, in line 3"),
        ("learning_rate: 1:30\n", "argument --learning_rate: invalid float value: '1:30'"),
        ("seed: 1:30\n", "argument --seed: invalid int value: '1:30'"),
        ("losses: &a {kd: *a}\n", "r.yaml is not valid YAML: found unconstructable recursive node"),
        ("lr_milestones: " + 2000 * "[" + "\n", "r.yaml is not valid YAML"),
        ("seed: !!python/object:os.system 1\n", "r.yaml is not valid YAML: could not determine a constructor"),
        ("--- \nseed: 1\n", "r.yaml is not valid YAML: expected a single document"),
        ("run_name: \ud83e\n", "r.yaml cannot be read"),
    ],
    ids=range(10),
)
def test_mistakes_in_a_file(text, message, tmp_path, capsys):
    (tmp_path / "r.yaml").write_bytes((MINIMAL + text).encode(errors="surrogatepass"))
    with pytest.raises(SystemExit) as ending:
        main(["distill", "r.yaml"])
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_a_recipe_is_read_as_yaml_1_2(tmp_path):
    lines = "per_device_train_batch_size: 010\neval_strategy: no\nlearning_rate: 1e-3\nrandom_flip: no\n"
    (tmp_path / "r.yaml").write_text(MINIMAL + lines + "run_name: '1e3'\nlosses: {kd: {temperature: 2e0}}\n")
    _, data_args, config, resolved = parse_recipe(["r.yaml", "--losses.kd.weight", "5e-1"])
    assert config.per_device_train_batch_size == 10 and config.eval_strategy == "no" and config.learning_rate == 1e-3
    assert data_args.random_flip is False and config.losses == {"kd": {"temperature": 2.0, "weight": 0.5}}
    (tmp_path / "again.yaml").write_text(dump_yaml(resolved))
    assert load_recipe("again.yaml") == resolved and resolved["run_name"] == "1e3"
    assert parse_recipe(["again.yaml"])[3] == resolved
