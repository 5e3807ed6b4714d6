"""Measure how fast hfkd is and what each method costs, in one run on random images.

python scripts/benchmark/run.py [--quick] [--pairs 11] [--batch_size 64] [--threads N] [--torch_compile]
                                [--pair NAME] [--only ...] [--json FILE]

data       Images/s of finished batches (float32, cropped, flipped, normalised) from one CPU thread, or made on the GPU:
           the weak view, and the weak and the strong view. torchvision's transforms on one PIL image at a time, on the
           CPU, give the scale.
jpeg       The same from files: JPEGs of 500 x 375 are decoded, cropped at random, resized to 224, flipped and
           normalised, as one DataLoader worker does it, against PIL and torchvision's transforms on the same files.
trainer    A step of DistillationTrainer as the recipe runs it, against a loop written by hand with the same batches,
           networks, losses, optimizer, precision, memory format and compile setting. The ratio is the cost of Trainer.
reference  The same against the loop of the published code: float32, contiguous, eager, the loss written out.
released   The same with the loaders of the published code as well, which make one PIL image at a time; on CUDA with its
           eight worker processes. Its meters and progress bar, which wait for the device in every step, are left out.
           With --torch_compile these three sections compile Trainer; the published loop stays eager.
cache      A step of KD with resnet20 that reads the teacher's logits from a cache, all or the largest 16, against one
           from the labels alone: make the batch, forward, backward and update, without the rest of Trainer.
methods    A step of each method of hfkd.losses.LOSSES that has a recipe for the pair of --pair, against one of the
           recipe with KD alone: forward, backward and update on batches that are ready, without the rest of Trainer.
           The row `kd` shows how far two equal contenders differ.
profile    Where the time of a Trainer's step goes, resnet32x4 -> resnet8x4, KD + Z-score, in percent of the step. On
           CUDA it waits for the device after each part, which a real step does not.

Contenders alternate in short rounds, so that other load on the machine slows both. `ratio` is the median over the
rounds of ours / theirs; `times as long` is the median of the method's time / KD's. Trust the ratios and their
quartiles; images/s and ms are medians too, but depend on the machine and the moment.

On CUDA `peak MiB` is the memory that a round allocates in addition to what was allocated before. `peak MiB of a step`
counts the tensors that live at one moment, on any device, from the batch to the optimizer's and CRD's memory; `over KD`
is the difference to KD alone. On a CPU that others use too, give --threads 1: threads wait for each other. Weights are
random, because they cost the same.
"""

import argparse
import json
from pathlib import Path

import torch
from meters import DEVICE, print_table, record
from pipelines import data_rows, jpeg_rows
from steps import PAIR, cache_rows, method_rows, profile_rows, reference_rows, released_rows, trainer_rows
from transformers.utils import logging

SECTIONS = {
    "data": data_rows,
    "jpeg": jpeg_rows,
    "trainer": trainer_rows,
    "reference": reference_rows,
    "released": released_rows,
    "cache": cache_rows,
    "methods": method_rows,
    "profile": profile_rows,
}


SEED = 0  # of images and weights


def machine(args: argparse.Namespace) -> str:
    cpu = torch.cpu.get_capabilities()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    bf16 = ", ".join(name for name in ("amx_bf16", "avx512_bf16") if cpu.get(name)) or "neither AMX nor avx512_bf16"
    return (
        f"torch {torch.__version__}, device {device}, CPU {cpu.get('cpu_name', 'unknown')} ({bf16}), "
        f"{args.threads} threads, batch {args.batch_size}, {'compiled, ' * args.torch_compile}{args.pairs} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure hfkd's speed on random images.")
    parser.add_argument("--quick", action="store_true", help="Few small rounds, to see that it runs.")
    parser.add_argument("--pairs", type=int, help="Rounds of each contender (11; quick: 2).")
    parser.add_argument("--batch_size", type=int, help="Images a step (64; quick: 8).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of a step.")
    parser.add_argument("--torch_compile", action="store_true", help="Compile Trainer's steps, except in profile.")
    parser.add_argument("--pair", default=PAIR, help=f"CIFAR-100 pair of the section methods ({PAIR}).")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="Sections to run (all).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the rows of the tables there as well.")
    args = parser.parse_args()
    args.pairs = args.pairs or (2 if args.quick else 11)
    args.batch_size = args.batch_size or (8 if args.quick else 64)
    logging.set_verbosity_error()
    torch.manual_seed(SEED)
    print(machine(args), flush=True)
    tables: dict[type, list] = {}
    for section in args.only:
        torch.set_num_threads(1 if section in ("data", "jpeg") else args.threads)
        for row in SECTIONS[section](args):
            tables.setdefault(type(row), []).append(row)
    for table in tables.values():
        print_table(table)
    if args.json:
        rows = [record(row) for table in tables.values() for row in table]
        args.json.write_text(json.dumps({"machine": machine(args), "seed": SEED, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
