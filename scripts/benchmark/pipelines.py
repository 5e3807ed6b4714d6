"""Sections of the benchmark that make batches and do not train."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from meters import DEVICE, Meter, Row
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hfkd.data import (
    ImageDataset,
    LazyImageDataset,
    RandomResizedCrop,
    WeakAugmentation,
    collate_batch,
    load_image_splits,
)
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD

CLASSES = 100


def random_images(count: int) -> ImageDataset:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels, names = torch.randint(0, CLASSES, (count,)), [str(label) for label in range(CLASSES)]
    return ImageDataset(images, labels, names, transform=WeakAugmentation(), mean=CIFAR_MEAN, std=CIFAR_STD)


# ---- Data path ---------------------------------------------------------------------------------------------------


class PILImages(Dataset):
    """The usual CIFAR pipeline: one image at a time, from PIL to a normalised tensor."""

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


def published_batches(images: ImageDataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches on the device as the published code makes them; on CUDA with its eight worker processes."""
    workers = 8 if DEVICE.type == "cuda" else 0
    for pixels, labels in DataLoader(PILImages(images), batch_size, shuffle=True, num_workers=workers):
        yield {"pixel_values": pixels.to(DEVICE, non_blocking=True), "labels": labels.to(DEVICE, non_blocking=True)}


def data_rows(args: argparse.Namespace) -> list[Row]:
    """Compare both views, made on the device, with torchvision. A round is one epoch, and shorter where it is slow."""
    scale = 1 if args.quick else 4
    weak, both, usual = (random_images(scale * batches * args.batch_size) for batches in (50, 10, 3))
    both.views = 2
    weak.to(DEVICE)
    both.to(DEVICE)
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
    """Write JPEGs of 500 x 375 and about 100 KB, like ImageNet's: coarse to fine noise, chroma at half resolution."""
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
    """Compare a worker's work with torchvision's, in this process. A round is one batch."""
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
