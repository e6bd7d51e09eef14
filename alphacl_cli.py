"""The entry point of ``alphacl``: it finds the command that `alphacl_fast.cli` then runs.

It imports little, because Ctrl-C is handled from its first line of work on, and because help, a
version or a misspelt flag should not wait for torch, whose import takes seconds.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
INTERRUPTED = 128 + signal.SIGINT


def fail(message: str) -> NoReturn:
    """End the process with exit code 2 and one line on stderr."""
    print(f"alphacl: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> int:
    """Run ``alphacl`` with ``arguments``; without any, as the program of this process.

    Returns the exit code: 0 for success; 1 if a check of a theorem or a backend fails; 2 after an
    error, which is one line on stderr; 128 + N after the signal N (SIGINT is 2, SIGTERM 15); 141
    after a broken pipe (`… | head`).
    """
    if arguments is None:
        return program(sys.argv[1:])
    try:
        command, rest = _parse(arguments)
        from alphacl_fast import cli

        return cli.COMMANDS[command](rest)
    except KeyboardInterrupt:
        print("alphacl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has stopped reading
        # Python flushes what is left in the buffer when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def program(arguments: list[str]) -> int:
    """Run ``alphacl`` as the program of this process, where Ctrl-C never prints a traceback."""
    # A shell starts background jobs with SIGINT ignored; they stay so.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable
    try:
        return main(arguments)
    finally:
        if signal.getsignal(signal.SIGINT) in (_interrupt, _quit):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # while the interpreter shuts down


@contextmanager
def importing() -> Iterator[None]:
    """Let Ctrl-C end the process at once inside, as it may while large packages are imported.

    A KeyboardInterrupt there would be lost or reported by the code that happens to catch it.
    """
    if signal.getsignal(signal.SIGINT) != _interrupt:  # not the program of this process
        yield
        return
    signal.signal(signal.SIGINT, _quit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number, frame) -> NoReturn:
    """Raise KeyboardInterrupt; another Ctrl-C while the command cleans up ends the process."""
    signal.signal(signal.SIGINT, _quit)
    raise KeyboardInterrupt


def _quit(number, frame) -> NoReturn:
    os.write(2, b"alphacl: interrupted\n")
    os._exit(INTERRUPTED)


def _unraisable(problem) -> None:
    """End the process after a Ctrl-C that Python cannot report, such as one in a destructor."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        _quit(signal.SIGINT, None)
    sys.__unraisablehook__(problem)


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and its arguments."""
    import argparse

    from alphacl_fast import __version__
    from alphacl_fast.cli import Parser
    from alphacl_fast.suggestions import did_you_mean

    parser = Parser(
        prog="alphacl",
        usage="alphacl COMMAND [ARGUMENTS]",
        description="Contrastive learning with pair-weighted losses.",
        epilog="commands (COMMAND --help lists the flags):\n"
        + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"alphacl {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if given.command not in COMMANDS:
        fail(
            f"command must be one of {', '.join(COMMANDS)}, got {given.command!r}"
            f"{did_you_mean(given.command, COMMANDS)}"
        )
    return given.command, given.arguments


if __name__ == "__main__":
    sys.exit(main())
