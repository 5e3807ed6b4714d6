"""python scripts/export.py runs/cifar100/resnet56-resnet20/kd_zscore/student [--key value ...]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
