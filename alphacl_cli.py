"""The entry point of ``alphacl``: it finds the command that `alphacl_fast.cli` then runs.

It is a module of its own because importing `alphacl_fast` imports torch, which takes seconds: help,
a version or a misspelt command should not cost that much.
"""

import argparse
import difflib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "train": "train an encoder",
    "eval": "evaluate a run: kNN and linear probe",
    "reproduce": "compare objectives as the paper does",
    "inspect": "plot which pairs a run's loss weighs, and how much",
    "theory": "check the paper's theorems numerically",
    "check": "compare every backend's results on this machine with float64",
    "bench": "time losses beside each other",
    "tune": "choose the Triton kernels' tiles for this GPU",
    "plan": "predict the cost of a loss over many devices",
    "info": "show versions, backends and devices",
}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line on stderr."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """End the process with exit code 2 and one line on stderr."""
    print(f"alphacl: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> int:
    """Run ``alphacl`` with ``arguments`` (default: the process's own).

    Returns the exit code: 0 for success; 1 if a check of a theorem or a backend fails; 2 after an
    error, which is one line on stderr; 130 or 143 after SIGINT or SIGTERM; 141 after a broken pipe
    (`… | head`).
    """
    command, rest = _parse(arguments)
    try:
        from alphacl_fast import cli

        return cli.COMMANDS[command](rest)
    except KeyboardInterrupt:
        print("alphacl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has stopped reading
        # Python flushes what is left in the buffer when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(arguments: list[str] | None) -> tuple[str, list[str]]:
    """The command and its arguments."""
    parser = Parser(
        prog="alphacl",
        usage="alphacl COMMAND [ARGUMENTS]",
        description="Contrastive learning with pair-weighted losses.",
        epilog="commands (COMMAND --help lists the flags):\n"
        + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"alphacl {_version()}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if given.command not in COMMANDS:
        near = difflib.get_close_matches(given.command, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        fail(f"command must be one of {', '.join(COMMANDS)}, got {given.command!r}{hint}")
    return given.command, given.arguments


def _version() -> str:
    """`alphacl_fast.__version__`, read without importing the package."""
    (folder,) = importlib.util.find_spec("alphacl_fast").submodule_search_locations
    return runpy.run_path(str(Path(folder, "_version.py")))["__version__"]


if __name__ == "__main__":
    sys.exit(main())
