"""accelerate launch scripts/train_teacher.py recipes/cifar100/teachers/resnet56.yaml [--key value ...]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["train-teacher", *sys.argv[1:]])
