"""What a run leaves on disk: config.json, checkpoint.pt (replaced as a whole) and metrics.jsonl (appended to)."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import subprocess
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

import alphacl_fast

from .config import Config, RunError

CONFIG, CHECKPOINT, METRICS = "config.json", "checkpoint.pt", "metrics.jsonl"


def begin(out: Path, config: Config, device: torch.device) -> None:
    """Make the folder ``out`` and write its config.json. Raises RunError if that is not possible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": dataclasses.asdict(config), "environment": environment(device)}, indent=2)
        (out / CONFIG).write_text(text + "\n")
    except OSError as error:
        raise RunError(f"cannot write to the run folder {out}: {error.strerror}") from error


def environment(device: torch.device) -> dict:
    """Versions, device and commit, as saved with a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"alphacl_fast": alphacl_fast.__version__, "commit": _commit(), "torch": torch.__version__,
            "torchvision": _version("torchvision"), "scikit-learn": _version("scikit-learn"),
            "numpy": np.__version__, "python": platform.python_version(), "device": str(device), "device_name": name,
            "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def save(out: Path, state: dict) -> None:
    """Replace ``out``'s checkpoint by ``state`` and the states of all random generators; a crash leaves the old one."""
    path = out / CHECKPOINT
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({**state, "rng": _rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = " ".join(str(error).split())
        raise RunError(f"cannot write {path}: {reason}; the checkpoint before it stands") from error


def read(out: Path, config: Config) -> dict | None:
    """The state in ``out``'s checkpoint, None if there is no checkpoint yet.

    Raises RunError if the file is damaged or was written with other settings than ``config``, naming them.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["config"]
    except Exception as error:  # unpickling a damaged file can raise almost anything
        raise RunError(f"cannot read {path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    differing = Config.from_dict(saved, path).differences(dataclasses.asdict(config))
    if differing:
        raise RunError(f"{path} is the checkpoint of another config: {'; '.join(differing)}")
    return state


def open_run(run: Path, changes: dict) -> tuple[Config, dict]:
    """Config, with ``changes`` of what leaves the weights alone, and state of a run that has begun; RunError if it has not."""
    saved = Config.read(run / CONFIG)
    state = read(run, saved)
    if state is None:
        raise RunError(f"{run} has no checkpoint yet; alphacl train --resume {run} goes on with it")
    config = dataclasses.replace(saved, **changes)
    config.check()
    return config, state


def restore_rng(state: dict) -> None:
    """Set all random generators as they were when ``state`` was saved."""
    rng = state["rng"]
    random.setstate(rng["python"])
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])


class Metrics:
    """metrics.jsonl of the run in ``out``: one JSON object per line. Raises RunError if it cannot write."""

    def __init__(self, out: Path):
        self.path = out / METRICS

    def cut(self, length: int) -> None:
        """Drop what a killed run wrote after the checkpoint it goes on from, which says how long the file was."""
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < length:
            raise RunError(f"{self.path} is shorter than the checkpoint says ({found} of {length} bytes)")
        with self._open() as file:
            file.truncate(length)

    def write(self, **row) -> int:
        """Append one line; the length of the file afterwards."""
        with self._open() as file:
            file.write(json.dumps(row).encode() + b"\n")
            return file.tell()

    @contextmanager
    def _open(self):
        try:
            with open(self.path, "ab") as file:
                yield file
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error


def _rng_state() -> dict:
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of the source tree the package runs from, with '+' if files differ; None if it is installed."""
    root = Path(alphacl_fast.__file__).resolve().parent.parent

    def git(*arguments):
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
