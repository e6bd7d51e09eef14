"""Users' pair functions as machine code for the CPU kernels.

`graph` traces a function and its derivative, `cpp_printer` prints them as C++, and the compiler of
this machine makes a small library of them, for the instruction set of the kernels. The kernels call
it with vectors of pairs (``ValuesFunction`` of csrc/cpu/sweep.h). All numbers of a formula are
arguments of the code, so that a new value of a constant compiles nothing.

Libraries are kept in a folder that no other user can write to. A file's name holds a digest of what
it was made from and one of its content: processes that compile the same function at once write the
same file, and a damaged file is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import objectives
from .._version import __version__
from ..cpp_printer import pair_function
from ..graph import UnsupportedFunction


class Recipe(NamedTuple):
    """What the kernels' library says that users' functions are compiled with."""

    flags: tuple[str, ...]  #: of every library
    sets: tuple[tuple[str, tuple[str, ...]], ...]  #: instruction sets and their flags
    source: str  #: the vectors and functions that printed code uses

    @classmethod
    def of(cls, text: str) -> Recipe:
        """From JSON (tools/build_cpu.py)."""
        read = json.loads(text)
        sets = tuple((name, tuple(flags)) for name, flags in read["sets"].items())
        return cls(tuple(read["flags"]), sets, read["source"])


class Function(NamedTuple):
    """What the kernels call, and its first argument."""

    address: int
    constants: ctypes.Array[ctypes.c_double]


def problem(kind: str, recipe: Recipe, sets: tuple[str, ...]) -> str | None:
    """Why a user's pair kind cannot be compiled, or None; it compiles it.

    Args:
        kind: the key of a user's function (`objectives.kind`).
        recipe: of the kernels' library.
        sets: the instruction sets that may be used, the lowest first.
    """
    params = (1.0,) * len(objectives.kind(kind).parameters)
    try:
        compiled(kind, params, torch.float32, recipe, sets)
    except UnsupportedFunction as error:
        return str(error)
    return None


def compiled(
    kind: str,
    params: tuple[float, ...],
    dtype: torch.dtype,
    recipe: Recipe,
    sets: tuple[str, ...],
) -> Function:
    """A user's pair kind for kernels that accumulate in ``dtype``, float32 or float64.

    Repeated calls are cheap. Each looks at what the function reads or, where that cannot be told,
    runs the function on a few numbers, and prints it anew if its values have changed.

    Raises:
        UnsupportedFunction: it cannot be compiled; the message says why.
    """
    if not asked_for():
        raise UnsupportedFunction("ALPHACL_CPU_COMPILE=0 leaves users' functions uncompiled")
    formula = _formula(objectives.custom(kind), params)
    library = _library(formula.source, recipe, sets)
    return Function(library[dtype], formula.constants[dtype])


def status(recipe: Recipe, sets: tuple[str, ...]) -> str:
    """What compiles users' functions on this machine and where they are kept, or why nothing does,
    for people.
    """
    if not asked_for():
        return "not compiled: ALPHACL_CPU_COMPILE=0"
    try:
        command, version = _compiler()
    except UnsupportedFunction as error:
        return f"not compiled: {error}"
    name, _ = _instruction_set(recipe, sets)
    try:
        where = f"kept in {_folder()}"
    except OSError as error:
        where = f"not kept, because {error}"
    return f"compiled by {shlex.join(command)} ({version}) for {name}, {where}"


def asked_for() -> bool:
    """Whether users' functions are to be compiled: unless ALPHACL_CPU_COMPILE is 0."""
    given = os.environ.get("ALPHACL_CPU_COMPILE", "1")
    if given not in ("0", "1"):
        raise ValueError(f"ALPHACL_CPU_COMPILE must be 0 or 1, got {given!r}")
    return given == "1"


# --- formulas -------------------------------------------------------------------------------------


class _Formula(NamedTuple):
    source: str
    constants: dict[torch.dtype, ctypes.Array[ctypes.c_double]]


def _printed(function: Any, params: tuple[float, ...]) -> _Formula:
    bound = function.kind.bind(params)
    with _disable_current_modes():  # an exported graph records its own operations, not these
        both = [
            pair_function(function.name, lambda x: (bound.f(x, None), bound.df(x, None)), dtype)
            for dtype in (torch.float32, torch.float64)
        ]
    (narrow, of_narrow), (wide, of_wide) = both
    return _Formula(
        f"{narrow}\n{wide}\n",
        {torch.float32: _array(of_narrow), torch.float64: _array(of_wide)},
    )


_formula = objectives.Compiled(_printed)


def _array(numbers: list[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * max(1, len(numbers)))(*numbers)


# --- libraries ------------------------------------------------------------------------------------


class _Library(dict[torch.dtype, int]):
    """The address of the function for every dtype; the library stays loaded."""

    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        for dtype, name in ((torch.float32, "float"), (torch.float64, "double")):
            function = getattr(self.library, f"alphacl_{name}")
            self[dtype] = ctypes.cast(function, ctypes.c_void_p).value


#: Source and instruction sets → the library, or why there is none.
_libraries: dict[Any, _Library | str] = {}
#: Threads that ask for a function at once compile it once.
_lock = threading.Lock()


def _after_fork() -> None:
    """A fork may have copied the lock of a thread that the child does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _library(source: str, recipe: Recipe, sets: tuple[str, ...]) -> _Library:
    key = source, recipe, sets
    found = _libraries.get(key)
    if found is None:
        with _lock:
            found = _libraries.get(key)
            if found is None:
                try:
                    found = _made(source, recipe, sets)
                except UnsupportedFunction as error:
                    found = str(error)
                _libraries[key] = found
    if isinstance(found, str):
        raise UnsupportedFunction(found)
    return found


def _instruction_set(recipe: Recipe, sets: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The highest of the sets that may be used, with its flags.

    Some sets differ from the one before in matrix products alone, and have no flags of their own.
    """
    return [(name, flags) for name, flags in recipe.sets if name in sets][-1]


def _made(source: str, recipe: Recipe, sets: tuple[str, ...]) -> _Library:
    """The library of a formula, from the folder or from the compiler."""
    compiler, version = _compiler()
    _, flags = _instruction_set(recipe, sets)
    command = [*compiler, *recipe.flags, *flags, "-shared"]
    text = f"{recipe.source}\n{source}"
    made_from = "\0".join([__version__, version, *command, text])
    name = hashlib.sha256(made_from.encode()).hexdigest()[:32]
    try:
        folder = _folder()
    except OSError:
        folder = None
    if folder is not None and (kept := _kept(folder, name)):
        return kept
    return _compile(command, text, lambda file: _keep(file, folder, name))


def _kept(folder: Path, name: str) -> _Library | None:
    """A library from the folder, None if it has none or a damaged one, which is removed."""
    for file in folder.glob(f"{name}-*.so"):
        try:
            if file.stem.endswith(f"-{_digest(file)}"):
                return _Library(file)
            file.unlink()
        except (OSError, AttributeError):  # another process may have removed it
            continue
    return None


def _keep(file: Path, folder: Path | None, name: str) -> Path:
    """Moves a library to the folder, if that can be written; returns where it is."""
    if folder is None:
        return file
    target = folder / f"{name}-{_digest(file)}.so"
    partial = folder / f".{secrets.token_hex(8)}"
    try:
        shutil.copyfile(file, partial)
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)
        return file
    return target


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def _compile(command: list[str], text: str, keep: Callable[[Path], Path]) -> _Library:
    """Compiles a library and loads it from where ``keep`` has put it."""
    try:
        with tempfile.TemporaryDirectory(prefix="alphacl") as temporary:
            source, output = Path(temporary, "function.cpp"), Path(temporary, "function.so")
            source.write_text(text, encoding="utf-8")
            run([*command, "-o", str(output), str(source)])
            try:
                return _Library(keep(output))
            except OSError:  # nothing may be executed in the folder of caches
                return _Library(output)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
    except (OSError, AttributeError) as error:
        reason = str(error)
    raise UnsupportedFunction(f"the C++ compiler has not compiled it: {reason}")


def run(command: list[str]) -> str:
    """The output of the compiler."""
    done = subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.stdout


def _compiler() -> tuple[list[str], str]:
    """The compiler's command, as for building the package, and its version.

    Raises UnsupportedFunction if there is none.
    """
    return _found(os.environ.get("CXX") or "c++", os.environ.get("PATH"))


@functools.lru_cache(maxsize=16)
def _found(command: str, path: str | None) -> tuple[list[str], str]:
    words = shlex.split(command)
    if shutil.which(words[0], path=path) is None:
        raise UnsupportedFunction(
            f"found no C++ compiler to compile it ({words[0]}; CXX names another)"
        )
    try:
        return words, run([*words, "--version"]).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UnsupportedFunction(f"{command} --version has failed: {error}") from error


def _folder() -> Path:
    """The folder of the libraries, made if it is missing.

    It is ``functions`` in ALPHACL_CACHE, or in alphacl_fast in the user's folder of caches.

    Raises:
        OSError: it cannot be made, or another user could put code into it.
    """
    given = os.environ.get("ALPHACL_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    parent = Path(given) if given else Path(caches).expanduser() / "alphacl_fast"
    folder = parent.expanduser().absolute() / "functions"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if hasattr(os, "getuid") and about.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if hasattr(os, "getuid") and about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by other users")
    return folder
