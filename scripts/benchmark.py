"""python scripts/benchmark.py [--quick] [--pairs 11] [--batch_size 64] [--threads N] [--only SECTION ...]

Is hfkd fast where it claims to be, and what does each method cost? Two tables, measured in one run on random images:

data       Images/s of finished batches (float32, cropped, flipped, normalised) from one CPU thread: the weak view, and
           the weak and the strong one. Against them, for scale, torchvision's transforms on one PIL image at a time.
jpeg       The same from files: JPEGs of 500 x 375, decoded, a random part resized to 224, flipped, normalised, as one
           DataLoader worker does it. Against the usual loop of PIL and torchvision's transforms over the same files.
trainer    A step of DistillationTrainer as the recipe runs it, against a loop written by hand: same batches, networks,
           losses, optimizer, precision, memory format and compile setting. So the ratio is what Trainer costs.
reference  The same against the loop of the published code: float32, contiguous, eager, the loss written out.
cache      A step of KD with resnet20 that reads the teacher's logits from a cache, all or the largest 16, against one
           from the labels alone: making the batch, forward, backward and update, nothing else of Trainer.
methods    A step of each feature method's recipe, resnet32x4 -> resnet8x4, against one of the recipe with KD alone: on
           batches that lie ready, forward, backward and update by the same few lines, nothing else of Trainer.

Contenders alternate in short rounds, and `ratio` is the median over the rounds of ours / theirs, `times as long` that
of the method's time / KD's: what slows the machine for a while slows both. Trust the ratios and their quartiles;
images/s and ms, medians too, are this machine's at this moment. On CUDA `peak MiB` is what a round allocates on top of
what stood before it. `MiB over KD alone` counts tensors, on any device: the most that live at one moment of a step,
from the batch to the optimizer's and CRD's memory, less the same of KD. On a CPU that others use too, give --threads 1:
threads that wait for one another wait for the others as well. Weights are random: they cost the same.
"""

import sys

from benchmark_meters import DEVICE, Meter, MethodRow, Row, alternate, print_table, step_bytes

sys.path.pop(0)  # this folder: from here on its evaluate.py would hide the library of that name

import argparse  # noqa: E402
import copy  # noqa: E402
import itertools  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hfkd import DistillationConfig, DistillationTrainer, Teacher, load_student  # noqa: E402
from hfkd.cache_rows import RowFormat  # noqa: E402
from hfkd.caching import write_cache  # noqa: E402
from hfkd.data import (  # noqa: E402
    ImageDataset,
    LazyImageDataset,
    RandomResizedCrop,
    WeakAugmentation,
    collate_batch,
    load_image_splits,
)
from hfkd.losses import kd_loss, standardize  # noqa: E402
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD  # noqa: E402
from hfkd.recipe import parse_recipe  # noqa: E402
from hfkd.teacher_cache import CachedTeacher  # noqa: E402

RECIPES = Path(__file__).parents[1] / "recipes" / "cifar100"
CLASSES = 100
METHODS = ("fitnet", "at", "sp", "vid", "pkt", "crd", "srrl", "semckd", "simkd")


def random_images(count: int) -> ImageDataset:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels, names = torch.randint(0, CLASSES, (count,)), [str(label) for label in range(CLASSES)]
    return ImageDataset(images, labels, names, transform=WeakAugmentation(), mean=CIFAR_MEAN, std=CIFAR_STD)


# ---- Data path ---------------------------------------------------------------------------------------------------


class PILImages(Dataset):
    """The usual CIFAR pipeline: every image by itself, from PIL to a normalised tensor."""

    def __init__(self, images: ImageDataset):
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        convert = [transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
        self.transform = transforms.Compose(augment + convert)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def data_rows(args: argparse.Namespace) -> list[Row]:
    """A round is one epoch; the slower pipelines have shorter ones, so that rounds last about equally long."""
    scale = 1 if args.quick else 4
    weak, both, usual = (random_images(scale * batches * args.batch_size) for batches in (50, 10, 3))
    both.views = 2
    loaders = [DataLoader(part, args.batch_size, shuffle=True, collate_fn=collate_batch) for part in (weak, both)]
    loaders.append(DataLoader(PILImages(usual), args.batch_size, shuffle=True))
    meters = [Meter() for _ in loaders]
    for _ in range(args.pairs + 1):
        for loader, meter in zip(loaders, meters, strict=True):
            meter.start()
            for _ in loader:
                pass
            meter.stop(len(loader.dataset))
    weak_row = Row("data: weak view", meters[0], "torchvision, PIL", meters[2], ">= 60,000 images/s")
    return [weak_row, Row("data: weak + strong view", meters[1], "torchvision, PIL", meters[2])]


# ---- JPEG files --------------------------------------------------------------------------------------------------


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of 500 x 375 and about 100 KB, as ImageNet's: clouds from coarse to fine, chroma at half resolution."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    files = [folder / f"{number:03}.jpg" for number in range(count)]
    for file in files:
        pixels = torch.full((1, 3, 375, 500), 120.0)
        for width, strength in ((4, 90), (16, 50), (64, 30), (250, 45)):
            noise = torch.randn(1, 3, width * 3 // 4, width, generator=generator) * strength
            noise = 0.3 * noise + 1.2 * noise.mean(1, keepdim=True)  # photographs are mostly light and shadow
            pixels += F.interpolate(noise, (375, 500), mode="bicubic")
        pixels = pixels.clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, quality=90, subsampling="4:2:0")
    return files


def jpeg_row(args: argparse.Namespace, folder: Path, files: list[Path], interpolation: str) -> Row:
    """A round is one batch. In this process: what is compared is the worker's work and not the way to it."""
    normalisation = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    _, split = load_image_splits(str(folder), train_split=None, eval_split="train")
    ours = LazyImageDataset(split, transform=RandomResizedCrop(224, *normalisation, interpolation=interpolation))
    crop = transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode(interpolation))
    convert = [transforms.ToTensor(), transforms.Normalize(*normalisation)]
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *convert])
    meters = Meter(), Meter()
    for epoch in range(args.pairs + 1):
        ours.set_epoch(epoch)
        meters[0].start()
        ours.__getitems__(range(len(files)))
        meters[0].stop(len(files))
        meters[1].start()
        torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        meters[1].stop(len(files))
    return Row(f"jpeg: one worker, {interpolation}", meters[0], "torchvision, PIL", meters[1], ">= 0.90")


def jpeg_rows(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder, "train", "photo"), args.batch_size)
        return [jpeg_row(args, Path(folder), files, mode) for mode in ("bicubic", "bilinear")]


# ---- A training step ---------------------------------------------------------------------------------------------


class Alternate(TrainerCallback):
    """Cuts a Trainer's run into rounds, from the end of one step to that of the `steps`-th after it, so that all that
    Trainer does in between counts; each is followed by a round of the other loop."""

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
    student: nn.Module, teacher: nn.Module | None, config: DistillationConfig, published: bool, batches: DataLoader
) -> Iterator[None]:
    """Trains, one step for each `next`."""
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
    """KD on Z-scores, written out; logits (B, C)."""
    student, teacher = (
        (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, keepdim=True)) / temperature
        for logits in (student_logits, teacher_logits)
    )
    divergence = F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="none")
    return divergence.sum(1).mean() * temperature**2


def library_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    return kd_loss(standardize(student_logits), standardize(teacher_logits), temperature)


def recipe_config(recipe: str, batch_size: int, folder: str) -> DistillationConfig:
    """The recipe's settings, for a run of one epoch that neither evaluates, nor saves, nor logs a step."""
    changes = {"output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": batch_size}
    changes |= {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    changes |= {"load_best_model_at_end": False, "report_to": "none", "disable_tqdm": True}
    changes |= {"use_cpu": DEVICE.type == "cpu"}
    overrides = [token for key, value in changes.items() for token in (f"--{key}", str(value))]
    return parse_recipe([str(RECIPES / recipe), *overrides])[2]


def step_row(
    args: argparse.Namespace, title: str, recipe: str, student: str, teacher: str | None, steps: int, published=False
) -> Row:
    """The trainer of a recipe in rounds of `steps` steps, against the published loop or its own equal by hand."""
    steps = 1 if args.quick else steps if DEVICE.type == "cpu" else 50
    dataset = random_images(args.batch_size * steps * (args.pairs + 1))
    student_model = load_student(student, num_classes=CLASSES)
    student_by_hand = copy.deepcopy(student_model.timm_model).to(DEVICE)
    teacher_model = teacher and timm.create_model(teacher, num_classes=CLASSES)
    teacher_by_hand = copy.deepcopy(teacher_model).requires_grad_(False).eval().to(DEVICE) if published else None
    with tempfile.TemporaryDirectory() as folder:
        config = recipe_config(recipe, args.batch_size, folder)
        losses = config.losses if teacher else {}
        trainer = DistillationTrainer(student_model, teacher_model, config, train_dataset=dataset, losses=losses)
        if not published:
            teacher_by_hand = teacher and trainer.teacher.model  # in the precision and layout of the run
            if config.channels_last:
                student_by_hand.to(memory_format=torch.channels_last)
            if config.torch_compile:
                student_by_hand.compile()
        loader = DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=collate_batch)
        loop = loop_by_hand(student_by_hand, teacher_by_hand, config, published, loader)
        rounds = Alternate(loop, steps, args.batch_size)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(rounds)
        trainer.train()
    against, target = ("published loop", ">= 3 with AMX") if published else ("loop by hand", ">= 0.90")
    return Row(title, rounds.ours, against, rounds.theirs, target)


def trainer_rows(args: argparse.Namespace) -> list[Row]:
    recipe, student, teacher = "resnet56-resnet20/kd_zscore.yaml", "cifar_resnet20", "cifar_resnet56"
    return [
        step_row(args, "trainer: resnet20, labels alone", recipe, student, None, steps=5),
        step_row(args, "trainer: resnet56 -> resnet20, KD + Z-score", recipe, student, teacher, steps=3),
    ]


def reference_rows(args: argparse.Namespace) -> list[Row]:
    recipe, pair = "resnet32x4-resnet8x4/kd_zscore.yaml", ("cifar_resnet8x4", "cifar_resnet32x4")
    return [step_row(args, "reference: resnet32x4 -> resnet8x4, KD + Z-score", recipe, *pair, steps=1, published=True)]


# ---- Cached logits ------------------------------------------------------------------------------------------------


def data_and_steps(
    args: argparse.Namespace, teacher: CachedTeacher | None, dataset: ImageDataset, folder: str
) -> Iterator[None]:
    """Makes a batch and trains on it, one step for each `next`; without a teacher from the labels alone."""
    config = recipe_config("resnet56-resnet20/kd_zscore.yaml", args.batch_size, folder)
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
    """A small teacher writes the caches: what they hold costs the same."""
    steps, epochs = (1, 1) if args.quick else (5, 3)
    datasets = [random_images(1_000 if args.quick else 20_000)]
    datasets += [copy.copy(datasets[0]) for _ in range(2)]  # each has a cache of its own, or none
    temperature = recipe_config("resnet56-resnet20/kd_zscore.yaml", 1, "").losses["kd"]["temperature"]
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


def training_steps(
    args: argparse.Namespace, method: str, dataset: ImageDataset, batches: list[dict[str, Tensor]], folder: str
) -> Iterator[None]:
    """Trains as the method's recipe says, one step for each `next`; in quick mode smaller networks."""
    student, teacher = ("cifar_resnet8", "cifar_resnet14") if args.quick else ("cifar_resnet8x4", "cifar_resnet32x4")
    config = recipe_config(f"resnet32x4-resnet8x4/{method}.yaml", args.batch_size, folder)
    networks = load_student(student, num_classes=CLASSES), timm.create_model(teacher, num_classes=CLASSES)
    trainer = DistillationTrainer(*networks, config, train_dataset=dataset)
    model = trainer.accelerator.prepare_model(trainer.distiller).train()
    decay = config.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, 0.9, weight_decay=decay, fused=True)
    for batch in itertools.cycle(batches):
        trainer.compute_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def method_rows(args: argparse.Namespace) -> list[MethodRow]:
    """KD alone goes on beside every method; on a CPU a round is one step."""
    steps = 50 if DEVICE.type == "cuda" and not args.quick else 1
    dataset = random_images(1_000 if args.quick else 50_000)  # CRD remembers every image
    dataset.to(DEVICE)
    loader = DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=collate_batch)
    batches = list(itertools.islice(loader, 8))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        alone = training_steps(args, "kd_ce1", dataset, batches, folder)
        next(alone)
        alone_bytes = step_bytes(alone)
        for method in METHODS:
            ours = training_steps(args, method, dataset, batches, folder)
            meters = alternate(ours, alone, args.pairs + 1, steps, steps * args.batch_size)
            name = method if method == "simkd" else f"kd + {method}"  # which is its recipe's only loss
            rows.append(MethodRow(name, *meters, args.batch_size, step_bytes(ours) - alone_bytes))
    return rows


# ---- The tables --------------------------------------------------------------------------------------------------

SECTIONS = {
    "data": data_rows,
    "jpeg": jpeg_rows,
    "trainer": trainer_rows,
    "reference": reference_rows,
    "cache": cache_rows,
    "methods": method_rows,
}


def machine(args: argparse.Namespace) -> str:
    cpu = torch.cpu.get_capabilities()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    bf16 = ", ".join(name for name in ("amx_bf16", "avx512_bf16") if cpu.get(name)) or "neither AMX nor avx512_bf16"
    return (
        f"torch {torch.__version__}, device {device}, CPU {cpu.get('cpu_name', 'unknown')} ({bf16}), "
        f"{args.threads} threads, batch {args.batch_size}, {args.pairs} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures hfkd's speed on random images.")
    parser.add_argument("--quick", action="store_true", help="Few small rounds, to see that it runs.")
    parser.add_argument("--pairs", type=int, help="Rounds of each contender (11; quick: 2).")
    parser.add_argument("--batch_size", type=int, help="Images a step (64; quick: 8).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of a step.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="Sections to run (all).")
    args = parser.parse_args()
    args.pairs = args.pairs or (2 if args.quick else 11)
    args.batch_size = args.batch_size or (8 if args.quick else 64)
    logging.set_verbosity_error()
    print(machine(args), flush=True)
    tables: dict[type, list] = {}
    for section in args.only:
        torch.set_num_threads(1 if section in ("data", "jpeg") else args.threads)
        for row in SECTIONS[section](args):
            tables.setdefault(type(row), []).append(row)
    for table in tables.values():
        print_table(table)


if __name__ == "__main__":
    main()
