"""Random faults in training runs: `python tests/faults.py --faults 200`.

A run is killed, or stopped by a scheduler, or loses its power, at a random stage of a random write:
a file is open, half written, whole, synced, linked, renamed. Then one of its files may be cut, lose
a bit, or vanish. The run must go on and end with the weights and the log of a run that nothing
happened to, or say in one sentence what is damaged.

The processes are forked from this one, which has imported everything.
"""

import argparse
import builtins
import contextlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from alphacl_fast.train import Config, RunError, checkpoint, data, is_run, loop, storage, train

SETTINGS = {
    "dataset": "digits",
    "width": 4,
    "subset": 64,
    "batch_size": 32,
    "epochs": 2,
    "save_every": 1,
    "log_every": 1,
    "eval_every": 0,
    "workers": 0,
    "threads": 1,
}
KINDS = ("kill", "power", "term")
#: What may happen to a file while no process runs, and how often besides nothing.
DAMAGES = ("none", "none", "cut", "flip", "vanish")
CLOCKS = ("images_per_s", "step_ms", "loss_ms")


class Trap:
    """Counts the stages of all writes of this process and acts at one of them.

    Args:
        stage: the stage, from 1; 0 for none.
        kind: what happens there, out of ``KINDS``.
        synced: shared memory for the number of stages and the synced bytes of metrics.jsonl.
    """

    def __init__(self, stage: int, kind: str, synced: mmap.mmap):
        self.stage, self.kind, self.synced, self.count = stage, kind, synced, 0

    def __enter__(self):
        self.real = {name: getattr(os, name) for name in ("fsync", "replace", "link")}
        for name, function in self.real.items():
            setattr(os, name, self.wrapped(name, function))
        storage.open = checkpoint.open = self.open
        return self

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(os, name, function)
        del storage.open, checkpoint.open

    def passed(self) -> None:
        self.count += 1
        if self.count == self.stage and self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)  # as Slurm and torchrun do, both of which
            os.kill(os.getpid(), signal.SIGTERM)  # signal the process
        elif self.count == self.stage:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(self, name, function):
        def act(*arguments):
            result = function(*arguments)
            if (
                name == "fsync"
                and os.path.basename(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                == checkpoint.METRICS
            ):
                self.synced[:8] = struct.pack("q", os.fstat(arguments[0]).st_size)
            self.passed()
            return result

        return act

    def open(self, *arguments):
        """Open a file that is written in halves."""
        file = builtins.open(*arguments)  # noqa: SIM115 - the caller closes it
        if arguments[1] not in ("xb", "ab"):
            return file
        self.passed()
        write = file.write

        def halves(data):
            write(data[: len(data) // 2])
            file.flush()
            self.passed()
            write(data[len(data) // 2 :])
            file.flush()
            self.passed()

        return _Halves(file, halves)


class _Halves:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def in_process(out: Path, stage: int, kind: str) -> tuple[int, dict, int]:
    """Start or resume the run in ``out`` in a process of its own, with a trap.

    Returns:
        The process's wait status; its "error", "output" and number of "stages", as far as it came
        to say so; and the bytes of metrics.jsonl that survive a loss of power.
    """
    log, synced = out / checkpoint.METRICS, mmap.mmap(-1, 8)
    # A checkpoint knows these lines, or they do not matter.
    synced[:8] = struct.pack("q", log.stat().st_size if log.exists() else 0)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(writer, json.dumps(run(out, Trap(stage, kind, synced))).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return status, json.loads(said or b"{}"), struct.unpack("q", synced[:8])[0]


def run(out: Path, trap: Trap) -> dict:
    # The plots' contents take long and do not matter here.
    loop.picture = lambda encoder, data, path: storage.write(path, b"a picture")
    loop.report.curves = lambda metrics, path, title: storage.write(path, b"curves")
    output, found = io.StringIO(), {}
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output), trap:
        try:
            outcome = train(Config.create(**SETTINGS), out, resume=is_run(out))
            found["signal"] = outcome.signal
        except RunError as error:
            found["error"] = str(error)
    return {**found, "output": output.getvalue(), "stages": trap.count}


def end(out: Path) -> tuple[dict, list[dict]]:
    """What must be equal at the end: tensors by name, and the log without measured times."""
    state = torch.load(out / checkpoint.CHECKPOINT, weights_only=True)
    moments = state["optimizer"]["state"]
    tensors = dict(state["model"]) | {
        f"{number} {name}": value for number, of in moments.items() for name, value in of.items()
    }
    lines = checkpoint.read_metrics(out / checkpoint.METRICS)
    return tensors, [{k: x for k, x in line.items() if k not in CLOCKS} for line in lines]


class Faults:
    """Runs with faults, each held against one run without any, in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        data.load_digits = _once(data.load_digits)
        status, said, _ = in_process(folder / "reference", 0, "kill")
        assert status == 0, said
        assert "error" not in said, said
        self.stages, self.tensors_and_lines = said["stages"], end(folder / "reference")

    def check(self, seed: int) -> str:
        """Let the faults of ``seed`` happen to a run; raise AssertionError or say what happened."""
        draw, out = random.Random(seed), self.folder / str(seed)
        story, damaged = [], set()
        for _ in range(draw.choice((1, 1, 2))):
            kind, stage = draw.choice(KINDS), draw.randint(1, self.stages)
            status, said, synced = in_process(out, stage, kind)
            story.append(f"{kind} at stage {stage}")
            if "error" in said:
                break
            if status == signal.SIGKILL and kind == "power":
                self.lose_power(out, synced)
            elif status != signal.SIGKILL:
                assert status == 0, (story, said)
            damaged |= self.damage(out, draw, story)
        status, said, _ = in_process(out, 0, "kill")
        assert status == 0, (story, said)
        if "error" in said:
            assert damaged, (story, said)
            assert any(name in said["error"] for name in damaged), (story, said)
            assert "\n" not in said["error"]
            assert self.nothing_good(out), (story, said)
            return f"{'; '.join(story)}: refused: {said['error']}"
        (tensors, lines), (expected, expected_lines) = end(out), self.tensors_and_lines
        assert tensors.keys() == expected.keys()
        different = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
        assert not different, (story, said, different)
        if checkpoint.METRICS not in damaged:
            assert lines == expected_lines, (story, said)
        left = {path.name for path in out.iterdir() if path.name.endswith(".tmp")}
        assert not left, (story, left)
        shutil.rmtree(out)
        return f"{'; '.join(story)}: went on"

    @staticmethod
    def lose_power(out: Path, synced: int) -> None:
        """Take back what was never synced: the end of the log, and files not yet renamed."""
        log = out / checkpoint.METRICS
        if log.exists() and log.stat().st_size > synced:
            os.truncate(log, synced)
        for temporary in out.glob(".*.tmp"):
            os.truncate(temporary, 0)

    @staticmethod
    def damage(out: Path, draw: random.Random, story: list[str]) -> set[str]:
        """Damage a random file of the run; the set of its name, or none."""
        kind = draw.choice(DAMAGES)
        files = [*storage.versions(out / checkpoint.CHECKPOINT), out / checkpoint.CONFIG,
                 out / checkpoint.METRICS, out / storage.LOCK]  # fmt: skip
        file = draw.choice(files)
        if kind == "none" or not file.exists() or not file.stat().st_size:
            return set()
        content = bytearray(file.read_bytes())
        place = draw.randrange(len(content))
        if kind == "cut":
            os.truncate(file, place)
        elif kind == "flip":
            content[place] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
        else:
            file.unlink()
        story.append(f"{kind} of {file.name}")
        return {file.name}

    @staticmethod
    def nothing_good(out: Path) -> bool:
        """Whether no checkpoint is good, so that a refusal is right."""
        for file in storage.versions(out / checkpoint.CHECKPOINT):
            with contextlib.suppress(storage.Damaged):
                storage.read_sealed(file)
                return False
        return True


def _once(function):
    value = function()
    return lambda: value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        faults, failed = Faults(Path(folder)), 0
        for seed in range(given.seed, given.seed + given.faults):
            try:
                print(f"{seed}: {faults.check(seed)}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{seed}: FAILED {error}", flush=True)
    print(f"{given.faults} faults at {faults.stages} stages, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
