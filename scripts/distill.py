"""Train the student of a recipe, as `hfkd distill` does.

accelerate launch scripts/distill.py recipes/cifar100/resnet56-resnet20/kd_zscore.yaml [--key value ...]
"""

import sys

from hfkd.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
