"""python scripts/benchmark/run.py [--quick] [--pairs 11] [--batch_size 64] [--threads N] [--torch_compile] [--only ...]

Is hfkd fast where it claims to be, and what does each method cost? Measured in one run on random images:

data       Images/s of finished batches (float32, cropped, flipped, normalised) from one CPU thread: the weak view, and
           the weak and the strong one. Against them, for scale, torchvision's transforms on one PIL image at a time.
jpeg       The same from files: JPEGs of 500 x 375, decoded, a random part resized to 224, flipped, normalised, as one
           DataLoader worker does it. Against the usual loop of PIL and torchvision's transforms over the same files.
trainer    A step of DistillationTrainer as the recipe runs it, against a loop written by hand: same batches, networks,
           losses, optimizer, precision, memory format and compile setting. So the ratio is what Trainer costs.
reference  The same against the loop of the published code: float32, contiguous, eager, the loss written out.
           With --torch_compile these two sections have a compiled Trainer; the published loop stays eager.
cache      A step of KD with resnet20 that reads the teacher's logits from a cache, all or the largest 16, against one
           from the labels alone: making the batch, forward, backward and update, nothing else of Trainer.
methods    A step of each method's recipe, resnet32x4 -> resnet8x4, against one of the recipe with KD alone: on batches
           that lie ready, forward, backward and update by the same few lines, nothing else of Trainer. `kd` itself
           shows how far two equal contenders differ.
profile    Where the time of a Trainer's step goes, resnet32x4 -> resnet8x4, KD + Z-score, in percent of the step. On
           CUDA it waits for the device after each part, which a real step does not.

Contenders alternate in short rounds, and `ratio` is the median over the rounds of ours / theirs, `times as long` that
of the method's time / KD's: what slows the machine for a while slows both. Trust the ratios and their quartiles;
images/s and ms, medians too, are this machine's at this moment. On CUDA `peak MiB` is what a round allocates on top of
what stood before it. `peak MiB of a step` counts tensors, on any device: the most that live at one moment, from the
batch to the optimizer's and CRD's memory; `over KD` is that less KD's. On a CPU that others use too, give --threads 1:
threads that wait for one another wait for the others as well. Weights are random: they cost the same.
"""

import argparse

import torch
from data import data_rows, jpeg_rows
from meters import DEVICE, print_table
from steps import cache_rows, method_rows, profile_rows, reference_rows, trainer_rows
from transformers.utils import logging

SECTIONS = {
    "data": data_rows,
    "jpeg": jpeg_rows,
    "trainer": trainer_rows,
    "reference": reference_rows,
    "cache": cache_rows,
    "methods": method_rows,
    "profile": profile_rows,
}


def machine(args: argparse.Namespace) -> str:
    cpu = torch.cpu.get_capabilities()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    bf16 = ", ".join(name for name in ("amx_bf16", "avx512_bf16") if cpu.get(name)) or "neither AMX nor avx512_bf16"
    return (
        f"torch {torch.__version__}, device {device}, CPU {cpu.get('cpu_name', 'unknown')} ({bf16}), "
        f"{args.threads} threads, batch {args.batch_size}, {'compiled, ' * args.torch_compile}{args.pairs} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures hfkd's speed on random images.")
    parser.add_argument("--quick", action="store_true", help="Few small rounds, to see that it runs.")
    parser.add_argument("--pairs", type=int, help="Rounds of each contender (11; quick: 2).")
    parser.add_argument("--batch_size", type=int, help="Images a step (64; quick: 8).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of a step.")
    parser.add_argument("--torch_compile", action="store_true", help="Compile in the sections trainer and reference.")
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
