"""python scripts/reproduce.py resnet32x4-resnet8x4 [--methods kd,kd_zscore] [--seeds 3] [--key value ...]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
