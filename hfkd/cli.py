"""The command line: `hfkd COMMAND ...`, also as `python -m hfkd ...` and `accelerate launch -m hfkd ...`."""

from __future__ import annotations

import os
import pkgutil
import sys
import time

from . import __version__
from .commands.messages import hide_token
from .errors import HfkdError, did_you_mean

# name: the function, which takes the arguments behind it, and what it does; imported when it is called.
COMMANDS = {
    "distill": ("hfkd.commands.train:distill", "train the student of a recipe"),
    "train-teacher": ("hfkd.commands.train:train_teacher", "train the network of a recipe from the labels alone"),
    "cache-teacher": ("hfkd.commands.cache_teacher:cache_teacher", "store a teacher's logits for many students"),
    "search": ("hfkd.commands.search:search", "find the temperature, weights and learning rate of a recipe"),
    "evaluate": ("hfkd.commands.evaluate:evaluate", "measure a trained model"),
    "reproduce": (
        "hfkd.commands.reproduce:reproduce",
        "run cells of the published tables, a slice of time after the other",
    ),
    "compare": ("hfkd.commands.compare:compare", "set runs side by side: a table, a figure, what was gained"),
    "visualize": ("hfkd.commands.visualize:visualize", "draw a student beside its teacher"),
    "export": ("hfkd.commands.export:export", "write a trained model as one file, ONNX or torch.export"),
    "push": ("hfkd.commands.push:push", "upload a trained model, with its card, to the Hub"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command. What hfkd itself finds wrong is printed as one message; any other error keeps its traceback.

    Raises:
        SystemExit: with 2 for a wrong command line, recipe or file, 1 for what went wrong later, 130 after Ctrl-C.
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
        pkgutil.resolve_name(COMMANDS[name][0])(rest)
    except KeyboardInterrupt:
        print(f"hfkd {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except HfkdError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(10)  # where the first process fails alike, the launcher ends this one before it says so again
        print(f"hfkd {name}: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def help_text() -> str:
    """Every command with what it does."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {description}" for name, (_, description) in COMMANDS.items())
    return (
        "usage: hfkd COMMAND ...\n\n"
        "Teaches a small image classifier with a large one.\n\n"
        f"commands:\n{commands}\n\n"
        "`hfkd COMMAND --help` explains every key of a command with its default, `hfkd --version` prints the version.\n"
        "On several GPUs: `accelerate launch -m hfkd COMMAND ...`."
    )
