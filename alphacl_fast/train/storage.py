"""Files that survive a crash: a lock on a folder, one durable write, and digests.

A file is written under a temporary name, synced, and renamed, and the folder is synced: after a
kill or a power cut at any moment it holds either its old or its new contents. Every reader can tell
a damaged file from a good one by a digest (BLAKE2b) inside the file.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import secrets
import socket
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .config import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
DIGEST = "digest"
# A torch checkpoint is a zip archive. Its digest is the archive's comment, which zip readers skip.
_MARK, _END = b"blake2b ", b"PK\x05\x06"
_COMMENT, _END_BYTES = len(_MARK) + 64, 22
#: Descriptors of the locks that this process holds.
_held: set[int] = set()


class Damaged(RunError):
    """A file is missing, cut off, or differs from what was written."""


@functools.cache  # once per text, although several functions may read one damaged file
def warn(text: str) -> None:
    """Print a warning in one line on stderr."""
    print(f"alphacl: warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def writing(where: str | Path) -> Iterator[None]:
    """Turn an OSError inside into a RunError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {where}: {error.strerror or error}") from error


# Locks


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create ``folder`` if necessary and hold its lock inside.

    The system releases the lock when the process ends in whatever way.

    Raises:
        RunError: another process, or another thread of this one, holds the lock; or the folder
            cannot be written.
    """
    with writing(f"the run folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _take(descriptor, folder)
        with writing(f"the run folder {folder}"):
            for leftover in _temporaries(folder):  # of a process that was killed within a write
                leftover.unlink(missing_ok=True)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            if fcntl is not None:  # a process forked this instant may not have closed its copy yet
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            warn(
                f"the file system of {folder} has no locks ({error.strerror}): "
                "let no other process use this folder meanwhile"
            )
            return
        owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
        raise RunError(
            f"{folder} is in use by {owner}: wait until it ends, or choose another --out; "
            "nothing was changed"
        ) from None


def _leave_locks() -> None:
    """Close the locks that a forked process, such as a loader worker, has inherited.

    Otherwise a worker that outlives its killed parent by some seconds would keep the lock.
    """
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


def _temporaries(folder: Path) -> list[Path]:
    return [*folder.glob(".*.tmp")]


def is_empty(folder: Path) -> bool:
    """Whether ``folder`` holds nothing but a lock and the temporary files of a killed process."""
    return {*folder.iterdir()} <= {folder / LOCK, *_temporaries(folder)}


def check_writable(folder: Path) -> None:
    """Check that ``folder`` can be created or written, without creating it.

    Raises:
        RunError: it cannot.
    """
    with writing(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# Durable writes


def write(path: Path, *data: bytes | memoryview, keep: int = 1) -> None:
    """Replace a file by ``data`` durably.

    Args:
        path: the file.
        *data: the parts of its new contents.
        keep: versions of the file to keep, the new one included; see :func:`version`.

    Raises:
        OSError: the file cannot be written; it is as it was before.
    """
    temporary, before = _temporary(path), _temporary(path)
    try:
        with open(temporary, "xb") as file:
            for part in data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1 and path.exists():
            _rename_or_link(path, before, keep)
        os.replace(temporary, path)
        if before.exists():
            # Only now, so that at every moment two versions are on the disk.
            _make_room(path, keep)
            os.replace(before, version(path, 1))
        for old in versions(path)[keep:]:
            old.unlink(missing_ok=True)
        sync_folder(path.parent)
    finally:
        for leftover in (temporary, before):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def write_json(path: Path, values: dict, keep: int = 1) -> None:
    """Replace a file by a dict and its digest as JSON, durably, unless it holds just that.

    Raises as :func:`write`.
    """
    data = (json.dumps({**values, DIGEST: _digest(values)}, indent=2) + "\n").encode()
    if not path.exists() or path.read_bytes() != data:
        write(path, data, keep=keep)


def write_figure(path: Path, figure, **options) -> None:
    """Replace an image file by a matplotlib figure, durably; raises as :func:`write`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write(path, buffer.getvalue())


def version(path: Path, age: int) -> Path:
    """Return the name of the version before (age 1), the one before that (2), …, of a file."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path


def versions(path: Path) -> list[Path]:
    """List the versions of a file that exist, newest first."""
    ages = (
        int(age)
        for file in path.parent.glob(f"{path.stem}-*{path.suffix}")
        if (age := file.stem.removeprefix(f"{path.stem}-")).isdecimal()
    )
    return [file for age in (0, *sorted(ages)) if (file := version(path, age)).exists()]


def sync_folder(folder: Path) -> None:
    """Make the names of the files in ``folder`` survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _rename_or_link(path: Path, before: Path, keep: int) -> None:
    """Give ``path`` the second name ``before``, or its final older name without hard links."""
    try:
        os.link(path, before)
    except OSError:
        _make_room(path, keep)
        os.replace(path, version(path, 1))


def _make_room(path: Path, keep: int) -> None:
    """Rename each older version of ``path`` to the next older name."""
    for age in range(keep - 1, 1, -1):
        if version(path, age - 1).exists():
            os.replace(version(path, age - 1), version(path, age))


# Digests

#: Twice as fast as SHA-256 where the processor has no instructions for that.
hasher = functools.partial(hashlib.blake2b, digest_size=32)


def _digest(values: dict) -> str:
    return hasher(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict:
    """Read a dict that :func:`write_json` wrote, or a JSON file of an older version, undigested.

    Raises:
        Damaged: the file is missing or damaged.
        RunError: it cannot be read.
    """
    data = _read(path)
    try:
        values = json.loads(data)
        good = isinstance(values, dict)
    except ValueError:
        good = False
    if not good:
        raise Damaged(f"{path} is damaged: it is no JSON object")
    digest = values.pop(DIGEST, None)
    if digest is None and not _has_digest(values):
        return values  # of an older version
    if digest != _digest(values):
        raise Damaged(f"{path} is damaged or was edited: it differs from its digest")
    return values


def _has_digest(values: dict) -> bool:
    """Whether a value looks like a digest, whose key is then what was damaged."""
    return any(isinstance(value, str) and len(value) == 64 for value in values.values())


def sealed(archive: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    """Add a digest to a zip archive, as its comment; the parts of the new file."""
    body, length = archive[:-2], struct.pack("<H", _COMMENT)
    digest = hasher(body)
    digest.update(length)
    return body, length, _MARK, digest.hexdigest().encode()


def read_sealed(path: Path) -> bytes:
    """Read an archive that :func:`sealed` made, or one without a digest of an older version.

    Raises:
        Damaged: the file is missing or damaged.
        RunError: it cannot be read.
    """
    data = _read(path)
    body, comment = data[:-_COMMENT], data[-_COMMENT:]
    if body[-_END_BYTES:].startswith(_END) and comment.startswith(_MARK):
        good = comment == _MARK + hasher(body).hexdigest().encode()
    else:
        good = data[-_END_BYTES:].startswith(_END) and data.endswith(b"\0\0") and _holds(data)
    if not good:
        raise Damaged(f"{path} is damaged: it is cut off or differs from its digest")
    return data


def _holds(archive: bytes) -> bool:
    """Whether every member of a zip archive has its checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError):
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
