"""accelerate launch scripts/cache_teacher.py recipe.yaml [--epochs 30] [--top_k 16] [--key value ...]"""

import sys

sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from hfkd.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["cache-teacher", *sys.argv[1:]])
