"""python scripts/search.py recipes/cifar100/resnet56-resnet20/kd_zscore.yaml [--n_trials 20 --key value ...]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
