"""Sections of the benchmark that train."""

import argparse
import copy
import itertools
import tempfile
from collections.abc import Iterable, Iterator

import timm
import torch
import torch.nn.functional as F
from meters import DEVICE, Meter, MethodRow, Row, ShareRow, StepClock, alternate, step_bytes
from pipelines import CLASSES, published_batches, random_images
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from hfkd import DistillationConfig, DistillationTrainer, Teacher, load_student
from hfkd.data import ImageDataset, collate_batch
from hfkd.losses import LOSSES, kd_loss, standardize
from hfkd.recipe.finding import packaged_names
from hfkd.recipe.reading import parse_recipe
from hfkd.teacher_cache.rows import RowFormat
from hfkd.teacher_cache.teacher import CachedTeacher
from hfkd.teacher_cache.writing import write_cache

PAIR = "cifar100/resnet32x4-resnet8x4"  # of the sections other than methods, which takes --pair


# ---- A training step ---------------------------------------------------------------------------------------------


class Alternate(TrainerCallback):
    """Callback that alternates rounds of a Trainer with rounds of another loop.

    A round lasts from the end of one step to the end of the `steps`-th step after it, so that everything that Trainer
    does in between counts.
    """

    def __init__(self, other: Iterator[None], steps: int, batch_size: int):
        self.other, self.steps, self.images = other, steps, steps * batch_size
        self.ours, self.theirs = Meter(), Meter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.ours.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        self.ours.stop(self.images)
        self.theirs.start()
        for _ in itertools.islice(self.other, self.steps):
            pass
        self.theirs.stop(self.images)
        self.ours.start()


def loop_by_hand(
    student: nn.Module,
    teacher: nn.Module | None,
    config: DistillationConfig,
    published: bool,
    batches: Iterable[dict[str, Tensor]],
) -> Iterator[None]:
    """Train one step for each `next`."""
    bf16, kd = (False, published_kd) if published else (config.bf16, library_kd)
    fused = None if published else True  # None: what torch chooses for the device
    decay = config.weight_decay
    optimizer = torch.optim.SGD(student.parameters(), config.learning_rate, 0.9, weight_decay=decay, fused=fused)
    student.train()
    for batch in batches:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = student(batch["pixel_values"]).float()
        loss = config.ce_weight * F.cross_entropy(logits, batch["labels"])
        if teacher is not None:
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                teacher_logits = teacher(batch["pixel_values"]).float()
            loss = loss + config.losses["kd"]["weight"] * kd(logits, teacher_logits, config.losses["kd"]["temperature"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def published_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute KD on Z-scores as the published code does. Logits are (B, C)."""
    student, teacher = (
        (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, keepdim=True)) / temperature
        for logits in (student_logits, teacher_logits)
    )
    divergence = F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="none")
    return divergence.sum(1).mean() * temperature**2


def library_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    return kd_loss(standardize(student_logits), standardize(teacher_logits), temperature)


def recipe_config(recipe: str, batch_size: int, folder: str, torch_compile=False) -> DistillationConfig:
    """Read the settings of a recipe, for one epoch without evaluations, checkpoints and logs."""
    changes = {"output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": batch_size}
    changes |= {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    changes |= {"load_best_model_at_end": False, "report_to": "none", "disable_tqdm": True}
    changes |= {"use_cpu": DEVICE.type == "cpu", "torch_compile": torch_compile}
    overrides = [token for key, value in changes.items() for token in (f"--{key}", str(value))]
    return parse_recipe([recipe, *overrides])[2]


def step_row(
    args: argparse.Namespace,
    title: str,
    recipe: str,
    student: str,
    teacher: str | None,
    steps: int,
    steps_on_cuda=50,
    published=False,
    published_loaders=False,
) -> Row:
    """Compare the trainer of a recipe with the published loop, or with the same loop written by hand."""
    steps = 1 if args.quick else steps if DEVICE.type == "cpu" else steps_on_cuda
    dataset = random_images(args.batch_size * steps * (args.pairs + 1))
    student_model = load_student(student, num_classes=CLASSES)
    student_by_hand = copy.deepcopy(student_model.timm_model).to(DEVICE)
    teacher_model = teacher and timm.create_model(teacher, num_classes=CLASSES)
    teacher_by_hand = copy.deepcopy(teacher_model).requires_grad_(False).eval().to(DEVICE) if published else None
    with tempfile.TemporaryDirectory() as folder:
        config = recipe_config(recipe, args.batch_size, folder, args.torch_compile)
        losses = config.losses if teacher else {}
        trainer = DistillationTrainer(student_model, teacher_model, config, train_dataset=dataset, losses=losses)
        if not published:
            teacher_by_hand = teacher and trainer.teacher.running  # in the precision and layout of the run
            if config.channels_last:
                student_by_hand.to(memory_format=torch.channels_last)
            if config.torch_compile:
                student_by_hand.compile()
        batches: Iterable[dict[str, Tensor]] = DataLoader(dataset, args.batch_size, True, collate_fn=collate_batch)
        if published_loaders:
            batches = published_batches(copy.copy(dataset).to("cpu"), args.batch_size)
        loop = loop_by_hand(student_by_hand, teacher_by_hand, config, published, batches)
        rounds = Alternate(loop, steps, args.batch_size)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(rounds)
        trainer.train()
    against, target = ("published loop", ">= 4 with AMX") if published else ("loop by hand", ">= 0.95")
    against += " and loaders" * published_loaders
    return Row(title, rounds.ours, against, rounds.theirs, target)


def trainer_rows(args: argparse.Namespace) -> list[Row]:
    recipe, student, teacher = "cifar100/resnet56-resnet20/kd_zscore", "cifar_resnet20", "cifar_resnet56"
    return [
        step_row(args, "trainer: resnet20, labels alone", recipe, student, None, steps=5),
        step_row(args, "trainer: resnet56 -> resnet20, KD + Z-score", recipe, student, teacher, steps=3),
    ]


def reference_rows(args: argparse.Namespace) -> list[Row]:
    recipe, pair = f"{PAIR}/kd_zscore", ("cifar_resnet8x4", "cifar_resnet32x4")
    return [step_row(args, "reference: resnet32x4 -> resnet8x4, KD + Z-score", recipe, *pair, steps=1, published=True)]


def released_rows(args: argparse.Namespace) -> list[Row]:
    # Its workers prepare 16 batches while the trainer's round runs, so rounds on CUDA are long beside these.
    recipe, pair = f"{PAIR}/kd_zscore", ("cifar_resnet8x4", "cifar_resnet32x4")
    settings = {"steps": 1, "steps_on_cuda": 200, "published": True, "published_loaders": True}
    return [step_row(args, "released: resnet32x4 -> resnet8x4, KD + Z-score", recipe, *pair, **settings)]


# ---- Cached logits ------------------------------------------------------------------------------------------------


def data_and_steps(
    args: argparse.Namespace, teacher: CachedTeacher | None, dataset: ImageDataset, folder: str
) -> Iterator[None]:
    """Make a batch and train on it, one step for each `next`; without a teacher from the labels alone."""
    config = recipe_config("cifar100/resnet56-resnet20/kd_zscore", args.batch_size, folder)
    student = load_student("cifar_resnet8" if args.quick else "cifar_resnet20", num_classes=CLASSES)
    losses = config.losses if teacher else {}
    trainer = DistillationTrainer(student, teacher, config, train_dataset=dataset, losses=losses)
    model = trainer.accelerator.prepare_model(trainer.distiller).train()
    decay = config.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, 0.9, weight_decay=decay, fused=True)
    for epoch in itertools.count():
        dataset.set_epoch(epoch)
        for batch in DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate_batch):
            trainer.compute_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def cache_rows(args: argparse.Namespace) -> list[Row]:
    """Compare KD from a cache with the labels alone. A small teacher writes the caches, which cost the same to read."""
    steps, epochs = (1, 1) if args.quick else (5, 3)
    datasets = [random_images(1_000 if args.quick else 20_000)]
    datasets += [copy.copy(datasets[0]) for _ in range(2)]  # each has a cache of its own, or none
    temperature = recipe_config("cifar100/resnet56-resnet20/kd_zscore", 1, "").losses["kd"]["temperature"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for (top_k, what), dataset in zip({None: "all logits", 16: "the largest 16"}.items(), datasets, strict=False):
            row = RowFormat(CLASSES, 1, top_k, (temperature,) if top_k else ())
            teacher = Teacher(timm.create_model("cifar_resnet8", num_classes=CLASSES))
            config = DistillationConfig(folder, per_device_eval_batch_size=500, disable_tqdm=True)
            write_cache(f"{folder}/{top_k}", teacher, dataset, dataset, config, row, epochs=epochs)
            ours = data_and_steps(args, CachedTeacher(f"{folder}/{top_k}"), dataset, folder)
            alone = data_and_steps(args, None, datasets[2], folder)
            meters = alternate(ours, alone, args.pairs + 1, steps, steps * args.batch_size)
            rows.append(Row(f"cache: resnet20, KD from {what}", meters[0], "labels alone", meters[1], ">= 0.91"))
    return rows


# ---- What a method costs ------------------------------------------------------------------------------------------


def pair_trainer(args: argparse.Namespace, recipe: str, dataset: ImageDataset, folder: str) -> DistillationTrainer:
    """Build the trainer of a recipe of a CIFAR-100 pair; in quick mode with thin networks."""
    pair = recipe.split("/")[1]
    if args.quick:
        pair = pair.replace("x4", "")  # the thin ones have the same blocks, which recipes name
    teacher, student = (f"cifar_{name}" for name in pair.split("-"))
    config = recipe_config(recipe, args.batch_size, folder)
    networks = load_student(student, num_classes=CLASSES), timm.create_model(teacher, num_classes=CLASSES)
    return DistillationTrainer(*networks, config, train_dataset=dataset)


def training_steps(args: argparse.Namespace, recipe: str, dataset: ImageDataset, folder: str) -> Iterator[None]:
    """Train as a recipe of a pair says, one step for each `next`, on batches that are ready."""
    trainer = pair_trainer(args, recipe, dataset, folder)
    loader = DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=collate_batch)
    batches = list(itertools.islice(loader, 8))
    model = trainer.accelerator.prepare_model(trainer.distiller).train()
    rate, decay = trainer.args.learning_rate, trainer.args.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=decay, fused=True)
    for batch in itertools.cycle(batches):
        trainer.compute_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def method_recipes(pair: str) -> dict[str, str]:
    """Return the pair's recipes: KD, KD on Z-scores, and each other method of hfkd that has a recipe there.

    The names say what a recipe trains with, such as "kd + Z-score" or "kd + crd".
    """
    others = [method for method in LOSSES if method != "kd" and f"{pair}/{method}" in packaged_names()]
    recipes = {}
    for recipe in (f"{pair}/{method}" for method in ("kd", "kd_zscore", *others)):
        config = recipe_config(recipe, 1, "")
        recipes[" + ".join([*config.losses, *["Z-score"] * config.logit_standardization])] = recipe
    return recipes


def method_rows(args: argparse.Namespace) -> list[MethodRow]:
    """Compare each method with KD alone, which trains on beside every method. On a CPU a round is one step."""
    steps = 50 if DEVICE.type == "cuda" and not args.quick else 1
    dataset = random_images(1_000 if args.quick else 50_000)  # CRD remembers every image
    dataset.to(DEVICE)
    rows = []
    recipes = method_recipes(args.pair)  # before any trainer: reading a recipe resets accelerate's state
    with tempfile.TemporaryDirectory() as folder:
        alone = training_steps(args, f"{args.pair}/kd", dataset, folder)
        next(alone)
        alone_bytes = step_bytes(alone)
        for name, recipe in recipes.items():
            ours = training_steps(args, recipe, dataset, folder)
            meters = alternate(ours, alone, args.pairs + 1, steps, steps * args.batch_size)
            rows.append(MethodRow(name, *meters, args.batch_size, step_bytes(ours), alone_bytes))
    return rows


# ---- Where a step's time goes --------------------------------------------------------------------------------------


class ClockedSteps(TrainerCallback):
    """Callback that measures the share of each part of a trainer's steps, except the first and the last step.

    Time in no part counts as Trainer's.
    """

    def __init__(self, trainer: DistillationTrainer):
        self.clock, self.shares = StepClock("Trainer, accelerate, the rest"), []
        parts = {
            "data": (trainer.train_dataset, "__getitems__"),
            "teacher, forward": (trainer.teacher.running, "forward"),
            "losses": (trainer.distiller, "forward"),
            "student, forward": (trainer.distiller, "predict"),  # inside the former, from which it is taken out
            "backward": (trainer.accelerator, "backward"),
        }
        for part, (owner, method) in parts.items():
            setattr(owner, method, self.clock.timed(part, getattr(owner, method)))

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        optimizer.step = self.clock.timed("optimizer", optimizer.step)

    def on_step_end(self, args, state, control, **kwargs):
        seconds = self.clock.take()
        # The first step fetches two batches and the last step none: accelerate is one batch ahead.
        if 1 < state.global_step < state.max_steps:
            self.shares.append({part: value / sum(seconds.values()) for part, value in seconds.items()})


def profile_rows(args: argparse.Namespace) -> list[ShareRow]:
    """Measure where the time of a step goes, always in eager mode: a compiled forward is one call."""
    dataset = random_images(args.batch_size * (args.pairs + 2))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pair_trainer(args, f"{PAIR}/kd_zscore", dataset, folder)
        trainer.remove_callback(PrinterCallback)
        steps = ClockedSteps(trainer)
        trainer.add_callback(steps)
        trainer.train()
    rows = [ShareRow(part, [shares[part] for shares in steps.shares]) for part in steps.shares[0]]
    return sorted(rows, key=ShareRow.median, reverse=True)
