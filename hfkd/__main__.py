"""Entry point of `python -m hfkd ...` and `accelerate launch -m hfkd ...`."""

from .cli import main

if __name__ == "__main__":  # not in the processes that a DataLoader spawns
    main()
