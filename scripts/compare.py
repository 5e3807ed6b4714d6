"""python scripts/compare.py runs/a runs/b ... [--output_dir DIR] [--teacher NAME_OR_PATH]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
