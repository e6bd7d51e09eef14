"""A run's files: config.json, checkpoint.pt (replaced atomically), metrics.jsonl (appended)."""

import dataclasses
import json
import os
import platform
import random
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sklearn
import torch
import torchvision

import alphacl_fast

from .config import Config, RunError

CONFIG, CHECKPOINT, METRICS = "config.json", "checkpoint.pt", "metrics.jsonl"


@contextmanager
def writing(where: str | Path):
    """Turn an OSError inside into a RunError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {where}: {error.strerror}") from error


def begin(out: Path, config: Config, device: torch.device) -> None:
    """Create the run folder ``out`` and its config.json.

    Raises:
        RunError: the folder cannot be written.
    """
    with writing(f"the run folder {out}"):
        out.mkdir(parents=True, exist_ok=True)
        saved = {"config": dataclasses.asdict(config), "environment": environment(device)}
        (out / CONFIG).write_text(json.dumps(saved, indent=2) + "\n")


def environment(device: torch.device) -> dict:
    """Collect versions, device and commit, to be saved with a run."""
    gpu = device.type == "cuda"
    return {
        "alphacl_fast": alphacl_fast.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def save(out: Path, state: dict) -> None:
    """Write ``state`` and all random generators' states; a crash leaves the previous checkpoint.

    Raises:
        RunError: the file cannot be written; the previous checkpoint stands.
    """
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
    """Read the checkpoint in ``out``.

    Returns:
        The saved state; None if the run has no checkpoint yet.

    Raises:
        RunError: the file is damaged, or its settings differ from ``config``; the message names
            them.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["config"]
    except Exception as error:  # unpickling a damaged file can raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"cannot read {path}: {type(error).__name__}: {reason}") from error
    if differing := Config.from_dict(saved, path).differences(dataclasses.asdict(config)):
        raise RunError(f"{path} is the checkpoint of another config: {'; '.join(differing)}")
    return state


def open_run(run: Path, changes: dict) -> tuple[Config, dict]:
    """Open a run that has a checkpoint.

    Args:
        run: run folder.
        changes: fields to override; they must not affect the weights.

    Returns:
        Config and saved state.

    Raises:
        RunError: there is no usable run or no checkpoint yet.
    """
    saved = Config.read(run / CONFIG)
    state = read(run, saved)
    if state is None:
        raise RunError(f"{run} has no checkpoint yet; alphacl train --resume {run} goes on with it")
    config = dataclasses.replace(saved, **changes)
    config.check()
    return config, state


def restore_rng(state: dict) -> None:
    """Restore all random generators to their saved states."""
    rng = state["rng"]
    random.setstate(rng["python"])
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])


class Metrics:
    """Write metrics.jsonl of the run in ``out``: one JSON object per line.

    Both methods raise RunError if the file cannot be written.
    """

    def __init__(self, out: Path):
        self.path, self.length = out / METRICS, 0

    def cut(self, length: int) -> None:
        """Truncate the file to its length at the checkpoint that a killed run resumes from."""
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < length:
            raise RunError(
                f"{self.path} is shorter than the checkpoint says ({found} of {length} bytes)"
            )
        with writing(self.path), open(self.path, "ab") as file:
            self.length = file.truncate(length)

    def write(self, **row) -> int:
        """Append one line; the new length of the file."""
        with writing(self.path), open(self.path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            self.length = file.tell()
        return self.length


def _rng_state() -> dict:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _commit() -> str | None:
    """Return the package's git commit, with '+' if files differ; None outside a checkout."""
    root = Path(alphacl_fast.__file__).resolve().parent.parent

    def git(*arguments):
        command = ["git", "-C", str(root), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None
