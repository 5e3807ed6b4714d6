"""Command line `hfkd COMMAND ...`, also started as `python -m hfkd ...` and `accelerate launch -m hfkd ...`."""

from __future__ import annotations

import os
import pkgutil
import sys
import time

from . import __version__
from .commands.importing import importing
from .commands.messages import hide_token
from .errors import HfkdError, did_you_mean

# Name of each command: its function, which takes the other arguments, and its description. A function is imported only
# when its command is called, so that `--help` and mistyped commands are answered at once.
COMMANDS = {
    "distill": ("hfkd.commands.train:distill", "train the student of a recipe"),
    "train-teacher": ("hfkd.commands.train:train_teacher", "train the network of a recipe from the labels alone"),
    "cache-teacher": ("hfkd.commands.cache_teacher:cache_teacher", "store a teacher's outputs for many students"),
    "search": ("hfkd.commands.search:search", "find the temperature, weights and learning rate of a recipe"),
    "choose": ("hfkd.commands.choose:choose", "try ways of teaching on held-out images, and say which to take"),
    "recipes": ("hfkd.commands.recipes:recipes", "list, search and copy recipes"),
    "evaluate": ("hfkd.commands.evaluate:evaluate", "measure a trained model, or its features"),
    "reproduce": (
        "hfkd.commands.reproduce:reproduce",
        "repeat runs of the published tables, in slices of time",
    ),
    "compare": ("hfkd.commands.compare:compare", "compare runs: a table, a figure, the gain over the teacher"),
    "visualize": ("hfkd.commands.visualize:visualize", "draw a student beside its teacher"),
    "export": ("hfkd.commands.export:export", "write a trained model as one file, ONNX or torch.export"),
    "env": ("hfkd.commands.env:env", "print versions and devices, for a bug report"),
    "push": ("hfkd.commands.push:push", "upload a trained model, with its card, to the Hub"),
}


def main(argv: list[str] | None = None) -> None:
    """Run one command. An error of hfkd is printed as one message; any other error keeps its traceback.

    Raises:
        SystemExit: with 2 for a wrong command line, recipe or file, 1 for a later failure, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    hide_token(sys.argv)
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(help_text())
        return
    if name == "--version":
        print(f"hfkd {__version__}")
        return
    if not name:
        print(help_text(), file=sys.stderr)
        raise SystemExit(2)
    if name not in COMMANDS:
        print(f"hfkd: error: there is no command '{name}'.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        with importing():
            command = pkgutil.resolve_name(COMMANDS[name][0])
        command(rest)
        _leave_process_group()
    except KeyboardInterrupt:
        print(f"hfkd {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except HfkdError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(10)  # if the first process has the same error, the launcher ends this one before it repeats it
        print(f"hfkd {name}: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _leave_process_group() -> None:
    """Close the connections to the other processes: threads that still serve them may abort the end of this one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def help_text() -> str:
    """Return the help of `hfkd`: every command with its description."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {description}" for name, (_, description) in COMMANDS.items())
    return (
        "usage: hfkd COMMAND ...\n\n"
        "Train a small image classifier with a large one as its teacher.\n\n"
        f"commands:\n{commands}\n\n"
        "`hfkd COMMAND --help` explains hfkd's keys with their defaults, `--help-all` transformers' as well.\n"
        "`hfkd --version` prints the version.\n"
        "On several GPUs: `accelerate launch -m hfkd COMMAND ...`."
    )
