"""Measure what the training loop costs per image, beside another checkout.

    python -m benchmarks.loop --old CHECKOUT --out benchmarks/results/loop.jsonl

Runs `alphacl train` with ResNet-18 of width 16 on random images of 32×32 pixels, in processes of
their own that take turns. A figure is user + system seconds, loader processes included:
the difference between a long and a short run over the difference of their images, so that imports,
compilation and plots cancel. The other checkout, compiled too, trains with its loader workers, and
takes turns with every setting of this one.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIXED = (
    "--dataset=fake", "--encoder=resnet18", "--width=16", "--batch-size=128", "--eval-every=0",
    "--warmup-epochs=0", "--threads=1", "--image-size=32",
)  # fmt: skip
#: Name → flags; every name is measured in float32 and bfloat16.
SETTINGS = {
    "loader workers": (),
    "views on the device": ("--augment=device",),
    "views on the device, compiled": ("--augment=device", "--compile"),
}


def cpu_seconds(checkout: Path, flags: tuple[str, ...], epochs: int) -> float:
    """Run the command of a checkout; return its CPU seconds. Raises RuntimeError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alphacl_fast.cli", "train", *FIXED, *flags]
        command += [f"--epochs={epochs}", f"--out={folder}/run"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def per_image(checkout: Path, flags: tuple[str, ...], epochs: int, images: int) -> float:
    """CPU seconds per training image, without what a run costs once."""
    flags = (*flags, f"--subset={images}")
    long, short = (cpu_seconds(checkout, flags, count) for count in (epochs + 1, 1))
    return (long - short) / (epochs * (images - images % 128))


def row(setting: str, amp: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a setting beside the other checkout's loader workers, in turns; medians."""
    runs = {"new": (ROOT, SETTINGS[setting])}
    if given.old:
        runs["old"] = (given.old.resolve(), SETTINGS["loader workers"])
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats):
        for name, (checkout, flags) in runs.items():
            flags = (*flags, f"--amp={amp}")
            found[name].append(per_image(checkout, flags, given.epochs, given.images))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "benchmark": "loop", "contestant": setting, "amp": amp, "encoder": "resnet18 of width 16",
        "image_size": 32, "batch_size": 128, "repeats": given.repeats,
        "cpu_ms_per_image": 1000 * medians["new"],
        "old_over_new": medians["old"] / medians["new"] if "old" in medians else None,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", type=Path, help="another checkout, compiled")
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are measured")
    parser.add_argument("--images", type=int, default=512, help="training images of an epoch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    given = parser.parse_args(arguments)
    import torch

    from alphacl_fast.benchmarks.loss import provenance
    from alphacl_fast.journal import append

    for setting in given.settings:
        for amp in ("none", "bf16"):
            found = {**row(setting, amp, given), **provenance(torch.device("cpu"))}
            ratio = found["old_over_new"]
            text = f", {ratio:.2f} x the old checkout's speed" if ratio else ""
            print(
                f"{setting}, {amp}: {found['cpu_ms_per_image']:.2f} ms per image{text}", flush=True
            )
            if given.out:
                append(given.out, found)


if __name__ == "__main__":
    main()
