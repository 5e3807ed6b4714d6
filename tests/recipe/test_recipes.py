"""Every recipe that ships: loads, builds its networks and losses, and takes a step."""

import functools
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from helpers import GOLDEN, ROOT, images
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import get_scheduler

from hfkd import DistillationTrainer, load_student
from hfkd.commands.train import distill
from hfkd.losses import LOSSES, build_losses
from hfkd.networks.features import find_layer, settle_layers
from hfkd.networks.teacher import Teacher
from hfkd.recipe.finding import find_recipe, packaged_names
from hfkd.recipe.reading import load_recipe, parse_recipe

FOLDER = ROOT / "recipes"
RECIPES = packaged_names()
CIFAR, IMAGENET, VITS, TOOLBOX, NEW = (
    json.loads((GOLDEN / f"published_{name}.json").read_text())
    for name in ("cifar100", "imagenet", "vit", "simkd", "new")
)
PAIRS = sorted({name.split("/")[1] for name in RECIPES if re.match("cifar100/.*-", name)})
NEW_PAIRS = ["resnet32x4-shufflenetv1", "resnet50-vgg8", "wrn_40_2-shufflenetv1"]
# Methods of tables whose rows all have the same settings, and name no layers. They take their step with these pairs,
# in which each kind of network is once. The teachers that are stronger than ResNet-34 take it with the first.
SAME_FOR_ALL = ["dist", "ttm", "wttm", "wttm_crd", "wttm_itrd", "itrd", "rkd", "nst", "cc"]
STEPPED = ["resnet32x4-resnet8x4", "resnet50-vgg8", "vgg13-mobilenetv2", "wrn_40_2-shufflenetv1"]
STRONGER = [f"resnet{teacher}-resnet{student}" for student in (18, 34) for teacher in (50, 101, 152)]
VIT_PAIRS = [f"resnet56-{student}" for student in sorted(VITS)]
METHODS = [method + suffix for method in ("kd", "dkd", "mlkd", "ctkd") for suffix in ("", "_zscore")]
FEATURE_METHODS = ["fitnet", "at", "sp", "vid", "pkt", "crd", "srrl", "semckd"]
TOOLBOX_METHODS = [method + suffix for method in ("kd_ce1", *FEATURE_METHODS) for suffix in ("", "_zscore")]
TOOLBOX_METHODS += ["simkd", "simkd_f4", "simkd_f8"]
TERMS = {  # of methods with several
    "mlkd": ("kd", "class_correlation", "batch_correlation"),
    "ofa": ("logits", "branches"),
    "ca_mkd": ("logits", "features"),
    "skd": ("instance", "direction"),
    "itrd": ("correlation", "mutual"),
    "crld": ("within_view", "cross_view"),
    "uskd": ("target", "others", "weak"),
}
CLASSES = {"digits": 10, "uoft-cs/cifar100": 100, "ILSVRC/imagenet-1k": 1000}
HUB = {"resnet34-resnet18": ("timm/resnet34.tv_in1k", "resnet18")}
HUB["resnet50-mobilenetv1"] = ("timm/resnet50.tv_in1k", "mobilenetv1_100")


def last_parts(folder=""):
    """The last part of each name directly below a folder."""
    return [name.rpartition("/")[2] for name in RECIPES if name.rpartition("/")[0] == folder]


def teacher_architecture(teacher):
    """The architecture behind a recipe's teacher: a Hub id's own, of a run's folder that of the recipe of the run."""
    if teacher.startswith("timm/regnety_160"):
        return "regnety_002"  # of the same family, and 25 times smaller
    if teacher.startswith("timm/"):
        return teacher.removeprefix("timm/")
    return load_recipe(teacher.removeprefix("runs/").removesuffix("/teacher"))["student_name_or_path"]


def takes_a_step(name):
    _, pair, method = f"//{name}".rsplit("/", 2)
    return pair not in STRONGER[1:] and not (
        name.startswith("cifar100/") and method in SAME_FOR_ALL and pair not in STEPPED
    )


@functools.lru_cache(maxsize=1)  # pair after pair, and making one takes as long as the step
def network_of(architecture, classes):
    size = {"img_size": 32} if "deit" in architecture else {}
    return timm.create_model(architecture, num_classes=classes, **size)


def test_the_published_pairs_are_complete():
    assert len(CIFAR) == 14 and len(VITS) == 6 and len(TOOLBOX) == 3
    assert set(PAIRS) == {*CIFAR, *VIT_PAIRS, *TOOLBOX, *NEW_PAIRS}
    for pair in PAIRS:
        published = {*METHODS * (pair in CIFAR), *TOOLBOX_METHODS * (pair in TOOLBOX)}
        published |= {"locality_guidance"} if pair in VIT_PAIRS else set()
        others = {
            prefix + method + suffix for method in LOSSES for prefix in ("", "sdd_") for suffix in ("", "_zscore")
        }
        others |= {"wttm_crd", "wttm_itrd"}
        assert published <= set(last_parts(f"cifar100/{pair}")) <= published | others
    assert last_parts() == sorted([*VITS, "deit_tiny_32px"])
    assert len(last_parts("cifar100/teachers")) == 7
    students = {pair.split("-")[1] for pair in PAIRS}
    taught_by_none = {"deit_tiny_32px", "resnet20_tf_kd", "resnet20_uskd"}
    assert set(last_parts("cifar100/students")) == students | taught_by_none
    assert {name.split("/")[1] for name in RECIPES if name.startswith("imagenet/")} == {*HUB, *NEW["imagenet"]}
    for pair in HUB:
        assert set(METHODS) <= set(last_parts(f"imagenet/{pair}")) <= {*METHODS, *NEW["imagenet"][pair], "rld", "mgd"}


@pytest.mark.parametrize("method", NEW["cifar100"])
def test_the_numbers_of_the_newer_tables(method):
    """Of CIFAR-100; the settings of SAME_FOR_ALL are compared, too."""
    recipes = {pair: load_recipe(f"cifar100/{pair}/{method}") for pair in NEW["cifar100"][method]}
    assert {pair: recipe["published_top1"] for pair, recipe in recipes.items()} == NEW["cifar100"][method]
    for pair, recipe in recipes.items():
        assert recipe["learning_rate"] == (0.01 if re.search("(mobile|shuffle)net", pair) else 0.05)
        assert recipe["num_train_epochs"] == 240 and recipe["per_device_train_batch_size"] == 64
        assert recipe["ce_weight"] == (0.1 if method in ("kd", "sdd_kd") else 1.0)
        if method in SAME_FOR_ALL:
            assert recipe["losses"] == recipes[STEPPED[0]]["losses"]


@pytest.mark.parametrize("pair", NEW["imagenet"])
def test_the_numbers_of_the_newer_tables_on_imagenet(pair):
    recipes = {method: load_recipe(f"imagenet/{pair}/{method}") for method in NEW["imagenet"][pair]}
    assert {method: recipe["published_top1"] for method, recipe in recipes.items()} == NEW["imagenet"][pair]
    if pair in STRONGER:
        assert [recipe["losses"] for recipe in recipes.values()] == [
            load_recipe(f"imagenet/{STRONGER[0]}/{method}")["losses"] for method in recipes
        ]


@pytest.mark.parametrize("name", [name for name in RECIPES if takes_a_step(name)])
def test_one_step(name):
    """At 16 px, whatever the recipe's size, for both networks, and on images in memory.

    Transformers have patches of 16 px, or stages that halve their map five times: at 32 px.
    """
    overrides = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--bf16", "false", "--disable_tqdm", "true"]
    overrides += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    overrides += ["--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"]
    model_args, data_args, config, recipe = parse_recipe([name, *overrides])
    source = find_recipe(name)
    command = name if source.section is None else name.rpartition("/")[0] + "/"
    assert re.search(f"(distill|train-teacher|distill.py) (recipes/)?{command}", source.path.read_text())
    assert recipe["output_dir"] == f"runs/{name}"
    classes = CLASSES[data_args.dataset_name]
    size = 16 if re.search("resnet|vgg|wrn|mobilenet|shufflenet", model_args.student_name_or_path) else 32
    torch.manual_seed(0)
    student = load_student(
        model_args.student_name_or_path,
        num_classes=classes,
        image_size=size,
        patch_size=model_args.patch_size,
        drop_path_rate=model_args.drop_path_rate,
    )
    teacher = None
    if model_args.teacher_name_or_path:
        architectures = map(teacher_architecture, model_args.teacher_name_or_path)
        teacher = [Teacher(network_of(each, classes), class_indices=range(classes)) for each in architectures]
    trainer = DistillationTrainer(student, teacher, config, train_dataset=images(4, classes=classes, size=size))
    trainer.train()
    log = trainer.state.log_history[0]
    terms = {key: value for key, value in log.items() if key.startswith("loss_")}
    expected = {"loss_ce"} if config.ce_weight > 0 else set()
    for loss in config.losses:
        expected |= {f"loss_{loss}_{term}" for term in TERMS[loss]} if loss in TERMS else {f"loss_{loss}"}
    assert set(terms) == expected
    assert all(map(math.isfinite, terms.values()))
    assert log["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)


@pytest.mark.parametrize("pair", CIFAR)
def test_the_published_settings(pair):
    """The rules of the protocols, and each published run's own temperature and weight."""
    teacher, student = pair.split("-")
    published = CIFAR[pair]
    for method in METHODS:
        _, _, config, recipe = parse_recipe([f"cifar100/{pair}/{method}"])
        loss, zscore = method.removesuffix("_zscore"), method.endswith("_zscore")
        settings = config.losses[loss]
        light = student in ("mobilenetv2", "shufflenetv2")
        assert config.logit_standardization is zscore
        assert config.published_top1 == published[method]["top1"]
        assert config.learning_rate == (0.01 if light else 0.025 if loss == "mlkd" else 0.05)
        assert config.lr_milestones == [150, 180, 210] and config.weight_decay == 5e-4 and config.decay_all_parameters
        assert config.per_device_train_batch_size == 64 and config.optim == "sgd"
        assert config.optim_args == "momentum=0.9" and config.max_grad_norm == 0
        assert config.num_train_epochs == published[method].get("epochs", 240)
        if loss in ("kd", "ctkd") or (loss == "mlkd" and zscore):
            assert config.ce_weight == 0.1
        else:
            assert config.ce_weight == 1.0
        default = {"kd": 0.9, "ctkd": 0.9, "dkd": None, "mlkd": 1.0}[loss]
        assert settings.get("weight") == (published[method]["weight"] if zscore else default)
        if loss == "ctkd":
            assert "temperature" not in settings
        else:
            assert settings["temperature"] == (published[method]["temperature"] if zscore else 4.0)
        if loss == "dkd":
            from_rule = 2.0 if re.match("resnet(56|110)", teacher) else 8.0
            from_rule = 6.0 if teacher == "vgg13" or (teacher == "wrn_40_2" and "wrn" in student) else from_rule
            assert settings["beta"] == from_rule and settings["alpha"] == 1 and settings["warmup_epochs"] == 20


@pytest.mark.parametrize("pair", TOOLBOX)
@pytest.mark.parametrize("method", TOOLBOX_METHODS)
def test_the_settings_of_the_simkd_toolbox(pair, method):
    """CE 1 + KL 1 + the method's own, SimKD alone; with Z-score the same but for KD's temperature and weight."""
    model_args, _, config, _ = parse_recipe([f"cifar100/{pair}/{method}"])
    zscore, loss = method.endswith("_zscore"), method.split("_")[0]
    settings = dict(TOOLBOX[pair][method.removesuffix("_zscore")])
    top1 = settings.pop("top1", None)
    assert config.published_top1 == (None if zscore else top1) and (top1 is None) == (loss == "pkt")
    kd = {"temperature": 2.0, "weight": 9.0} if zscore else {"temperature": 4.0, "weight": 1.0}
    own = {} if loss == "kd" else {loss: settings}
    assert config.losses == (own if loss == "simkd" else {"kd": kd} | own)
    assert config.ce_weight == (0.0 if loss == "simkd" else 1.0) and config.logit_standardization is zscore
    student = pair.removeprefix("resnet32x4-")
    assert model_args.student_name_or_path == f"cifar_{student}"
    assert model_args.teacher_name_or_path == ["runs/cifar100/teachers/resnet32x4/teacher"]
    assert config.learning_rate == (0.01 if student == "shufflenetv2_150" else 0.05)
    assert config.num_train_epochs == 240 and config.per_device_train_batch_size == 64


@pytest.mark.parametrize("pair", TOOLBOX)
def test_the_layers_of_the_simkd_toolbox(pair):
    """What the toolbox compares: its lists are cut to the shorter one, but for SemCKD, which takes all against all."""
    student, teacher = (timm.create_model(f"cifar_{name}") for name in reversed(pair.split("-")))
    three, every = [1, 2, 3], [1, 2, 3, 4] if pair == "resnet32x4-vgg8" else [1, 2, 3]
    expected = {"fitnet": ([1], [1]), "at": (three, three), "vid": (three, three), "semckd": (every, three)}
    expected |= {"sp": ([-1], [-1])} | {method: (["embedding"], ["embedding"]) for method in ("pkt", "crd", "srrl")}
    for method, (student_layers, teacher_layers) in expected.items():
        _, _, config, _ = parse_recipe([f"cifar100/{pair}/{method}"])
        losses = build_losses(config.losses, logit_standardization=False)
        settle_layers(losses.values(), student, teacher)
        assert losses[method].student_layers == student_layers, method
        assert losses[method].teacher_layers == teacher_layers, method
    for method, factor in (("simkd", 2), ("simkd_f4", 4), ("simkd_f8", 8)):
        _, _, config, _ = parse_recipe([f"cifar100/{pair}/{method}"])
        reused = build_losses(config.losses, logit_standardization=False)["simkd"].reuses_classifier
        assert (reused.student_layer, reused.teacher_layer, reused.factor) == (-1, -1, factor)


def test_the_contrast_of_the_simkd_toolbox():
    """The recipes leave it to CRD's defaults."""
    _, _, config, _ = parse_recipe(["cifar100/resnet32x4-vgg8/crd"])
    crd = build_losses(config.losses, logit_standardization=False)["crd"]
    assert (crd.negatives, crd.temperature, crd.momentum, crd.dimension) == (16384, 0.07, 0.5, 128)
    assert not crd.relaxed_positives


def test_the_published_student_of_the_simkd_toolbox():
    """The other two students are in other tables, too, with other numbers."""
    _, _, config, _ = parse_recipe(["cifar100/students/shufflenetv2_150"])
    assert config.published_top1 == TOOLBOX["resnet32x4-shufflenetv2_150"]["student"]["top1"]
    assert config.learning_rate == 0.01


def vit_recipes(student):
    """The student alone, with guidance and with KD + Z-score, as parsed."""
    names = (f"cifar100/students/{student}", f"cifar100/resnet56-{student}/locality_guidance", student)
    return [parse_recipe([name])[:3] for name in names]


@pytest.mark.parametrize("student", VITS)
def test_the_published_settings_of_vit_students(student):
    published = VITS[student]
    alone, guided, distilled = vit_recipes(student)
    for model_args, data_args, config in (alone, guided, distilled):
        assert model_args.drop_path_rate == 0.1 and data_args.image_size is None
        assert timm.get_pretrained_cfg(model_args.student_name_or_path).input_size == (3, 224, 224)
        augmentation = (data_args.augmentation, data_args.interpolation, data_args.auto_augment, data_args.crop_pct)
        assert augmentation == ("random_resized_crop", "bicubic", "rand-m9-mstd0.5-inc1", 1.0)
        assert (data_args.color_jitter, data_args.random_erasing, data_args.random_flip) == (0.4, 0.25, True)
        assert config.mixup == config.cutmix == 0 and config.ema_decay is None
        assert config.optim == "adamw_torch_fused" and (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)
        assert config.weight_decay == 0.05 and not config.decay_all_parameters and config.max_grad_norm == 0
        assert config.num_train_epochs == 300 and config.per_device_train_batch_size == 128
        assert config.dataloader_drop_last
    for model_args, _, _ in (guided, distilled):
        assert model_args.teacher_name_or_path == ["runs/cifar100/teachers/resnet56_cosine/teacher"]
    assert alone[2].losses == {} and alone[2].published_top1 == published["student"]
    kd = published["kd_zscore"]
    assert distilled[2].losses == {"kd": {"temperature": kd["temperature"], "weight": kd["weight"]}}
    assert distilled[2].ce_weight == 0.5 and distilled[2].logit_standardization
    assert distilled[2].published_top1 == kd["top1"]
    assert list(guided[2].losses) == ["locality_guidance"] and guided[2].losses["locality_guidance"]["weight"] == 2.5
    assert guided[2].ce_weight == 1.0 and guided[2].published_top1 == published["locality_guidance"]["top1"]


def test_only_a_distilled_deit_has_two_heads():
    for student in VITS:
        names = [model_args.student_name_or_path for model_args, _, _ in vit_recipes(student)]
        assert ["distilled" in name for name in names] == [False, False, student == "deit_tiny"]


@pytest.mark.parametrize("student", VITS)
def test_the_guided_blocks(student):
    """Layers are named by index or path; published are the blocks' numbers over all stages."""
    model_args, _, config = vit_recipes(student)[1]
    settings = config.losses["locality_guidance"]
    model = timm.create_model(model_args.student_name_or_path)
    blocks = [module for path, module in model.named_modules() if re.search(r"(^|\.)block(s|\d)\.\d+$", path)]
    expected = [blocks[number] for number in VITS[student]["locality_guidance"]["blocks"]]
    assert [find_layer(model, layer) for layer in settings["student_layers"]] == expected
    assert blocks[-1] is expected[-1]
    teacher = timm.create_model("cifar_resnet56")
    stages = [teacher.layer1, teacher.layer2, teacher.layer3]
    assert [find_layer(teacher, layer) for layer in settings["teacher_layers"]] == stages


def test_the_schedule_of_vit_students():
    """Warm-up from 5e-7 to 5e-4 over 20 epochs, a cosine to 5e-6 at the end of 300."""
    _, _, config = vit_recipes("deit_tiny")[2]
    epoch = 50_000 // 128
    steps = 300 * epoch
    assert config.get_warmup_steps(steps) == 20 * epoch
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler_type, optimizer, 20 * epoch, steps, scheduler_specific_kwargs=config.lr_scheduler_kwargs
    )
    (factor,) = schedule.lr_lambdas
    rates = 5e-4 * torch.tensor([factor(step) for step in range(steps)], dtype=torch.float64)
    published = torch.tensor([5e-7, 5e-4, 5e-6], dtype=torch.float64)
    torch.testing.assert_close(rates[[0, 20 * epoch - 1, -1]], published)
    assert (rates[: 20 * epoch].diff() > 0).all() and (rates[20 * epoch :].diff() < 0).all()
    # The published cosine starts at epoch 0 and moves once an epoch.
    numbers = torch.arange(20, 300, dtype=torch.float64)
    theirs = 5e-6 + (5e-4 - 5e-6) * (1 + torch.cos(torch.pi * numbers / 300)) / 2
    ratio = rates.view(300, epoch).mean(1)[20:] / theirs
    assert ratio.min() > 0.99 and ratio.max() < 1.12, "the header says by how much the rates differ"


def test_the_published_settings_of_the_vit_teacher():
    model_args, data_args, config, _ = parse_recipe(["cifar100/teachers/resnet56_cosine"])
    assert model_args.student_name_or_path == "cifar_resnet56" and data_args.augmentation == "crop"
    assert config.num_train_epochs == 300 and config.per_device_train_batch_size == 128
    assert config.lr_milestones is None and config.lr_scheduler_type == "cosine" and config.warmup_steps == 0
    optimizer_class, settings = DistillationTrainer.get_optimizer_cls_and_kwargs(config)
    assert optimizer_class is torch.optim.SGD and settings["lr"] == 0.1
    assert settings["momentum"] == 0.9 and settings["nesterov"] is True
    assert config.weight_decay == 5e-4 and config.decay_all_parameters


@pytest.mark.parametrize("pair", HUB)
@pytest.mark.parametrize("method", METHODS)
def test_the_published_settings_on_imagenet(pair, method):
    published = dict(IMAGENET[pair][method])
    model_args, data_args, config, _ = parse_recipe([f"imagenet/{pair}/{method}"])
    teacher, student = HUB[pair]
    assert (model_args.teacher_name_or_path, model_args.student_name_or_path) == ([teacher], student)
    assert timm.get_pretrained_cfg(teacher.removeprefix("timm/")).origin_url == "https://github.com/pytorch/vision"
    assert (data_args.dataset_name, data_args.eval_split) == ("ILSVRC/imagenet-1k", "validation")
    assert (data_args.augmentation, data_args.interpolation) == ("random_resized_crop", "bilinear")
    assert data_args.crop_pct == 0.875 and data_args.random_flip
    assert data_args.auto_augment is None and data_args.color_jitter == data_args.random_erasing == 0
    loss, zscore = method.removesuffix("_zscore"), method.endswith("_zscore")
    curriculum = loss == "ctkd"
    assert config.published_top1 == published.pop("top1", None)
    assert config.learning_rate == published.pop("learning_rate", 0.1 if curriculum else 0.2)
    assert config.ce_weight == published.pop("ce_weight") and config.logit_standardization is zscore
    assert config.losses == {loss: published}
    assert config.per_device_train_batch_size == (256 if curriculum else 512)
    assert config.num_train_epochs == (120 if curriculum else 100) and config.lr_milestones == [30, 60, 90]
    assert config.optim == "sgd" and config.optim_args == "momentum=0.9" and config.max_grad_norm == 0
    assert config.weight_decay == 1e-4 and config.decay_all_parameters


def test_imagenet_from_a_folder(tmp_path):
    """`--dataset_name path/to/imagefolder --streaming true`: two of ImageNet's classes, named by WordNet's ids."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for wordnet_id in ("n01440764", "n02123045"):
            folder = tmp_path / "imagenet" / split / wordnet_id
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    weights = tmp_path / "resnet34.pth"
    torch.save({"model": timm.create_model("resnet34").state_dict()}, weights)
    recipe = "imagenet/resnet34-resnet18/kd_zscore"
    overrides = ["--dataset_name", str(tmp_path / "imagenet"), "--streaming", "true", "--image_size", "32"]
    overrides += ["--teacher_name_or_path", "resnet34", "--teacher_checkpoint", str(weights)]
    overrides += ["--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    overrides += ["--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false", "--bf16", "false"]
    overrides += ["--save_strategy", "no", "--load_best_model_at_end", "false"]
    trainer = distill([recipe, *overrides])
    train_log, evaluation = trainer.state.log_history[:2]
    assert train_log["loss_kd"] > 0 and train_log["learning_rate"] == 0.2
    assert trainer.state.global_step == 1 and evaluation["eval_top1"] in (0, 25, 50, 75, 100)
    assert trainer.model.config.id2label == {0: "n01440764", 1: "n02123045"}


def test_imagenet_on_paper(capsys):
    """The README's program prints its tables, and the networks have the sizes that it says."""
    text = (FOLDER / "imagenet" / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(program, {})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 16 and rows == [line for line in text.splitlines() if re.search(r"\| \d+ x \d+ \|", line)]
    sizes = re.findall(r"\(`(\w+)`\) \| ([\d,]+) \| ([\d.]+e9) \| ([\d.]+e9) \|", text)
    assert {architecture for architecture, *_ in sizes} == {
        name.removeprefix("timm/").removesuffix(".tv_in1k") for pair in HUB.values() for name in pair
    }
    for architecture, parameters, multiply_adds, flops in sizes:
        with torch.device("meta"):
            model, image = timm.create_model(architecture), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            model(image)
        assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" == parameters
        assert (multiply_adds, flops) == tuple(f"{counter.get_total_flops() / each:.3f}e9" for each in (2e9, 1e9))
        assert flops in program
