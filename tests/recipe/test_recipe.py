import pytest
import yaml

from hfkd.recipe.reading import load_recipe, parse_recipe

MINIMAL = {"student_name_or_path": "cifar_resnet8", "dataset_name": "digits"}


def write(path, **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(MINIMAL | keys))
    return str(path)


def test_a_recipe_lies_over_its_parent(tmp_path):
    write(tmp_path / "base.yaml", learning_rate=0.05, seed=3)
    child = write(tmp_path / "pair" / "kd.yaml", extends="../base.yaml", learning_rate=0.01)
    recipe = load_recipe(child)
    assert recipe["learning_rate"] == 0.01 and recipe["seed"] == 3 and "extends" not in recipe


def test_a_recipe_lies_over_any_number_of_others(tmp_path):
    write(tmp_path / "a.yaml", learning_rate=1.0, seed=1, weight_decay=1.0)
    write(tmp_path / "b" / "b.yaml", extends="../a.yaml", learning_rate=2.0, seed=2)
    write(tmp_path / "c.yaml", extends="b/b.yaml", learning_rate=3.0)
    recipe = load_recipe(write(tmp_path / "d.yaml", extends="c.yaml", learning_rate=4.0))
    assert recipe == MINIMAL | {"learning_rate": 4.0, "seed": 2, "weight_decay": 1.0}


def test_the_command_line_wins(tmp_path):
    path = write(
        tmp_path / "r.yaml", learning_rate="5e-2", losses={"dkd": {"beta": 8.0, "alpha": 1.0}}, lr_milestones=[1, 2]
    )
    overrides = ["--losses.dkd.beta", "2", "--logit_standardization", "true", "--learning_rate", "0.1", "--bf16=false"]
    model_args, data_args, config, resolved = parse_recipe([path, *overrides])
    assert config.losses == {"dkd": {"beta": 2, "alpha": 1.0}} == resolved["losses"]
    assert config.logit_standardization is True and config.learning_rate == 0.1
    assert config.lr_milestones == [1.0, 2.0]
    assert resolved["learning_rate"] == 0.1 and resolved["logit_standardization"] is True
    assert model_args.student_name_or_path == "cifar_resnet8" and data_args.dataset_name == "digits"


def test_the_resolved_recipe_gives_the_same_run_again(tmp_path):
    path = write(tmp_path / "r.yaml", losses={"kd": {"temperature": 4.0}}, optim="sgd")
    first = parse_recipe([path, "--losses.kd.weight", "0.9", "--eval_strategy", "epoch", "--lr_milestones", "3", "4"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first[3]))
    again = parse_recipe([str(tmp_path / "again.yaml")])
    assert again[3] == first[3] and again[2].losses == first[2].losses and again[2].output_dir == first[2].output_dir
    assert again[2].lr_milestones == [3.0, 4.0] and again[2].eval_strategy == "epoch"


def test_unknown_keys_name_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'learning_rat' in .*r.yaml.*'learning_rate'"):
        load_recipe(write(tmp_path / "r.yaml", learning_rat=1))
    path = write(tmp_path / "s.yaml")
    with pytest.raises(ValueError, match="'datset_name' in the command line.*'dataset_name'"):
        parse_recipe([path, "--datset_name", "digits"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_train_epochs", "many"], "num_train_epochs.*many"),
        (["--losses.kd", "4"], "losses.METHOD.PARAMETER"),
        (["--losses.kd.weight=", "--seed", "3"], "losses.METHOD.PARAMETER"),
        (["--losses", '{"kd": {}}', "--losses.kd.weight", "9"], "not both"),
        (["--image_size", "0"], "image_size must be"),
        (["--ce_weight", "-1"], "ce_weight must not be negative"),
        (["--label_smoothing_factor", "0.1", "--losses.kd.weight", "1"], "label_smoothing_factor.*labels alone"),
        (["--class_weights", "1", "x"], "class_weights must be balanced, or a number above 0 for each class, got 'x'"),
        (["--class_weights", "balanced", "--ce_weight", "0"], "class_weights weigh the cross-entropy"),
        (["--lr_milestones", "3", "--warmup_steps", "5"], "lr_milestones has no warm-up"),
    ],
)
def test_bad_values_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe([write(tmp_path / "r.yaml"), *arguments])


def test_what_is_typed_is_what_is_recorded(tmp_path):
    keys = {"learning_rate": "5e-2", "eval_strategy": False, "lr_milestones": None, "ce_weight": 1e-05}
    path = write(tmp_path / "r.yaml", run_name="-x", **keys)
    overrides = ["--no_random_flip", "--report_to", "none", "--hub_token", "secret", "--resume_from_checkpoint", "true"]
    overrides += ["--accelerator_config", '{"split_batches": true}', "--max_steps=-1"]
    _, data_args, config, resolved = parse_recipe([path, *overrides])
    assert data_args.random_flip is False is resolved["random_flip"]
    assert resolved["learning_rate"] == 0.05 and resolved["report_to"] == ["none"] and resolved["run_name"] == "-x"
    assert resolved["eval_strategy"] == "no" == config.eval_strategy and resolved["max_steps"] == -1
    assert resolved["accelerator_config"] == {"split_batches": True}
    assert "secret" not in str(resolved) and "resume_from_checkpoint" not in resolved
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(resolved))
    assert parse_recipe([str(tmp_path / "again.yaml")])[3] == resolved


def test_a_list_where_one_value_belongs(tmp_path):
    with pytest.raises(ValueError, match="seed takes one value"):
        parse_recipe([write(tmp_path / "r.yaml", seed=[1, 2])])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match="must be a recipe"):
        parse_recipe(["--learning_rate", "1"])
    with pytest.raises(ValueError, match="losses must map"):
        parse_recipe([write(tmp_path / "r.yaml", losses="kd")])


def test_runs_go_below_runs(tmp_path):
    for path, folder in (("a/recipes/cifar100/x-y/kd.yaml", "runs/cifar100/x-y/kd"), ("b/mine.yaml", "runs/mine")):
        assert parse_recipe([write(tmp_path / path)])[2].output_dir == folder
