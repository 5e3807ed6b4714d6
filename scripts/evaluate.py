"""python scripts/evaluate.py runs/.../student [--dataset_name ... --eval_split ...]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
