"""Train the network of a recipe from the labels alone, as `hfkd train-teacher` does.

accelerate launch scripts/train_teacher.py recipes/cifar100/teachers/resnet56.yaml [--key value ...]
"""

import sys

from hfkd.cli import main

if __name__ == "__main__":
    main(["train-teacher", *sys.argv[1:]])
