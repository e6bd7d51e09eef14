"""A run's files: config.json, checkpoint.pt and those before it, metrics.jsonl (appended)."""

import dataclasses
import io
import json
import os
import platform
import random
import subprocess
from pathlib import Path

import numpy as np
import sklearn
import torch
import torchvision

import alphacl_fast

from . import storage
from .config import Config, RunError

CONFIG, CHECKPOINT, METRICS = "config.json", "checkpoint.pt", "metrics.jsonl"
#: Names of the training images, one per line, of a data set that can change between two starts.
IMAGES = "images.txt"
_NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes


def is_run(out: Path) -> bool:
    """Whether ``out`` holds a run that can be resumed."""
    return (out / CONFIG).exists() or bool(storage.versions(out / CHECKPOINT))


def begin(out: Path, config: Config, device: torch.device) -> None:
    """Write the config.json of the run folder ``out``, whose lock the caller holds.

    Raises:
        RunError: the folder cannot be written.
    """
    saved = {"config": dataclasses.asdict(config), "environment": environment(device)}
    with storage.writing(out / CONFIG):
        storage.write_json(out / CONFIG, saved)


def digest_of(names: list[str] | None) -> str | None:
    """Return the digest of a list of images."""
    return None if names is None else storage.hasher("\n".join(names).encode(**_NAMES)).hexdigest()


def record_images(out: Path, names: list[str] | None) -> None:
    """Write the names of the training images, unless they are there or there are none."""
    if names is not None and digest_of(_recorded_images(out)) != digest_of(names):
        with storage.writing(out / IMAGES):
            storage.write(out / IMAGES, "\n".join(names).encode(**_NAMES))


def changed_images(out: Path, state: dict, count: int, names: list[str] | None) -> str | None:
    """Describe how the training images differ from a checkpoint's; None if they do not.

    Args:
        out: run folder.
        state: the checkpoint.
        count: number of images now.
        names: their names, if the data set has any.
    """
    before, digest = state["images"], digest_of(names)
    if before == count and state.get("images_digest", digest) == digest:
        return None
    text = f"{out} was started with {before} training images, the data set has {count}"
    recorded = _recorded_images(out)
    if names is None or recorded is None or digest_of(recorded) != state.get("images_digest"):
        return text
    for what, found in (
        ("missing", {*recorded} - {*names}),
        ("new", {*names} - {*recorded}),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            text += f"; {what}: {', '.join(sorted(found)[:3])}{more}"
    return text


def _recorded_images(out: Path) -> list[str] | None:
    try:
        return (out / IMAGES).read_bytes().decode(**_NAMES).split("\n")
    except (OSError, UnicodeDecodeError):
        return None


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


def save(out: Path, state: dict, keep: int = 1) -> None:
    """Write ``state`` and all random generators' states; a crash leaves the previous checkpoint.

    Args:
        out: run folder.
        state: what to save.
        keep: checkpoints to keep, the new one included.

    Raises:
        RunError: the file cannot be written; the previous checkpoint stands.
    """
    path, archive = out / CHECKPOINT, io.BytesIO()
    torch.save({**state, "rng": _rng_state()}, archive)
    try:
        storage.write(path, *storage.sealed(archive.getbuffer()), keep=keep)
    except OSError as error:
        before = "the checkpoint before it stands" if path.exists() else "there is no earlier one"
        raise RunError(f"cannot write {path}: {error.strerror or error}; {before}") from error


def read(out: Path) -> dict | None:
    """Read the newest good checkpoint in ``out``, with a warning if it is not the newest.

    Returns:
        The saved state, with its file name as "file"; None if the run has no checkpoint yet.

    Raises:
        RunError: every checkpoint is damaged.
    """
    newest, problems = out / CHECKPOINT, []
    files = storage.versions(newest)
    if files and files[0] != newest:
        problems.append(f"{newest} is missing")
    for path in files:
        try:
            state = _load(path)
        except storage.Damaged as error:
            problems.append(str(error))
            continue
        if problems:
            storage.warn(f"{'; '.join(problems)}; using {path.name}, of step {state['step']}")
        return {**state, "file": path.name}
    if not problems:
        return None
    raise RunError(
        f"{'; '.join(problems)}; {out} holds no other checkpoint: copy one there from a backup, or "
        "start again with another --out"
    )


def _load(path: Path) -> dict:
    archive = storage.read_sealed(path)
    try:
        state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
        Config.from_dict(state["config"], path)
        missing = {"model", "loss", "optimizer", "epoch", "step", "metrics", "rng"} - {*state}
    except RunError:
        raise
    except Exception as error:  # unpickling a file of another origin can raise almost anything
        raise storage.Damaged(
            f"{path} is no checkpoint of a run ({type(error).__name__})"
        ) from error
    if missing:
        raise storage.Damaged(f"{path} is no checkpoint of a run: it lacks {', '.join(missing)}")
    return state


def promote(out: Path, file: str) -> None:
    """Make an older checkpoint the newest, in place of a missing or damaged one."""
    if file != CHECKPOINT:
        with storage.writing(out):
            os.replace(out / file, out / CHECKPOINT)
            storage.sync_folder(out)


def saved_config(out: Path) -> Config:
    """Read the settings of the run in ``out``, from its checkpoint if config.json is damaged.

    Raises:
        RunError: ``out`` is not a run, or neither file is good.
    """
    if not is_run(out):
        raise RunError(f"{out} is not a run: it has no {CONFIG}")
    path = out / CONFIG
    try:
        return Config.from_dict(storage.read_json(path).get("config"), path)
    except storage.Damaged as error:
        state = read(out)
        if state is None:
            raise RunError(
                f"{error}; nothing has been trained in {out} yet: start again with another --out"
            ) from None
        storage.warn(f"{error}; using the settings in {state['file']}")
        return Config.from_dict(state["config"], out / state["file"])


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
    saved, state = saved_config(run), read(run)
    if state is None:
        raise RunError(f"{run} has no checkpoint yet; alphacl train --resume {run} goes on with it")
    differing = Config.from_dict(state["config"], run).differences(dataclasses.asdict(saved))
    # A longer run writes its epochs into config.json first and into the checkpoint with the next.
    if differing := [text for text in differing if not text.startswith("--epochs:")]:
        raise RunError(
            f"{run / state['file']} is the checkpoint of another config: {'; '.join(differing)}"
        )
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

    Attributes:
        length: bytes of the file.
        hash: digest of the file so far; a checkpoint stores both.

    The methods raise RunError if the file cannot be written.
    """

    def __init__(self, out: Path):
        self.path, self.length, self.hash = out / METRICS, 0, storage.hasher()

    def resume(self, state: dict | None) -> bool:
        """Bring the file back to the checkpoint ``state`` of a killed run (None: to its start).

        Returns:
            Whether the file was whole. Otherwise its good lines are kept, a "damaged" line marks
            the loss, and a new checkpoint should be written.
        """
        if self.is_whole(state):
            if self.path.exists():
                with storage.writing(self.path):
                    os.truncate(self.path, self.length)
            return True
        self._repair(state)
        return False

    def is_whole(self, state: dict | None) -> bool:
        """Whether the file begins with the lines that ``state`` knows; takes over their length."""
        self.length = state["metrics"] if state else 0
        known = self._read()[: self.length]
        self.hash = storage.hasher(known)
        digest = (state or {}).get("metrics_digest", self.hash.hexdigest())
        return len(known) == self.length and digest == self.hash.hexdigest()

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _repair(self, state: dict) -> None:
        """Keep the lines that can be read and are older than the checkpoint."""
        found = self._read()
        good = [row for row in _rows(found) if row.get("step", 0) <= state["step"]]
        good = [row for row in good if row["kind"] != "epoch" or row["epoch"] <= state["epoch"]]
        storage.warn(
            f"{self.path} is damaged: it had {state['metrics']} bytes at the checkpoint of step "
            f"{state['step']} and has {len(found)} now; its {len(good)} readable lines are kept, "
            "and the weights are not affected"
        )
        good.append({"kind": "damaged", "step": state["step"], "bytes": len(found)})
        data = b"".join(json.dumps(row).encode() + b"\n" for row in good)
        with storage.writing(self.path):
            storage.write(self.path, data)
        self.length, self.hash = len(data), storage.hasher(data)

    def write(self, **row) -> None:
        """Append one line."""
        line = json.dumps(row).encode() + b"\n"
        with storage.writing(self.path), open(self.path, "ab") as file:
            file.write(line)
        self.length += len(line)
        self.hash.update(line)

    def sync(self) -> None:
        """Wait until all lines are on the disk, as a checkpoint must that counts them."""
        if self.length:
            with storage.writing(self.path), open(self.path, "ab") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict]:
    """Read the lines of a metrics.jsonl; a damaged line is left out.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        return _rows(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error


def _rows(data: bytes) -> list[dict]:
    rows = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # also of bytes that are no text
            continue
        if isinstance(row, dict) and isinstance(row.get("step", 0), int) and "kind" in row:
            rows.append(row)
    return rows


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
