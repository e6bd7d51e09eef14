"""The packages and the compiled backends; everything else is in pyproject.toml.

ALPHACL_CPU=0 leaves the CPU backend out and 1 makes its absence an error; by default it is built
where a compiler exists. ALPHACL_CUDA does the same, where nvcc exists.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

BACKENDS = ("cpu", "cuda")
#: Packages whose modules are in a folder at the top; each has a stub in the package.
AT_THE_TOP = {"alphacl_fast.kernels": "kernels", "alphacl_fast.benchmarks": "benchmarks"}


def description() -> str:
    """README.md with absolute links: a package index shows it without the other files."""
    (repository,) = re.findall(r'^Repository = "(.+?)"', _read("pyproject.toml"), re.MULTILINE)
    text = re.sub(
        r"!\[([^]]*)\]\((?!https?:)", rf"![\1]({repository}/raw/main/", _read("README.md")
    )
    return re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/main/", text)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def builder(backend: str) -> Any:
    """tools/build_BACKEND.py by path: pip's isolated build has not this folder on its path."""
    file = Path("tools") / f"build_{backend}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_backend(name: str, output: Path, folders: list[Path]) -> None:
    """Build a backend's library, or leave the reason in ``folders``; an error only on demand."""
    for folder in folders:
        (folder / f"_{name}_not_built.txt").unlink(missing_ok=True)
    kernels, switch = f"{name.upper()} kernels", f"ALPHACL_{name.upper()}"
    wanted = os.environ.get(switch, "auto")
    try:
        if wanted == "0":
            raise RuntimeError(f"left out ({switch}=0)")
        print(f"alphacl_fast: {kernels} by {builder(name).library(output)}", file=sys.stderr)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        text = (getattr(error, "stderr", None) or str(error)).strip() or type(error).__name__
        if wanted == "1":
            raise RuntimeError(f"the {kernels} could not be built: {text}") from error
        lines = text.splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        print(f"alphacl_fast: no compiled {kernels}: {reason}", file=sys.stderr)
        for folder in folders:
            (folder / output.name).unlink(missing_ok=True)
            (folder / f"_{name}_not_built.txt").write_text(reason + "\n")


class BuildPython(build_py):
    """Puts a stub beside the modules that it finds in a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        if package in AT_THE_TOP:
            found.append((package, "__init__", f"{package.replace('.', '/')}/__init__.py"))
        return found


class BuildBackends(build_ext):
    """One library per compiled backend."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)  # setuptools clears it while it builds
        super().run()

    def get_output_mapping(self) -> dict[str, str]:
        """The built files and their places in the source: libraries, or the reasons for none."""
        found = {}
        for pair in super().get_output_mapping().items():
            if not Path(pair[1]).exists():
                pair = (name.replace(".abi3.so", "_not_built.txt") for name in pair)
            found.update([pair])
        return found

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        folders = [output.parent, *([Path("alphacl_fast")] if self.in_source else [])]
        build_backend(ext.name.split("._")[1], output, folders)


class BuildCuda(Command):
    """The CUDA library beside the sources, without the rest of an installation."""

    description = "build the CUDA library in place, or for the host (--emulated)"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("emulated", None, "for the host; prints where it is")
    ]

    def initialize_options(self) -> None:
        self.emulated = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if self.emulated:
            print(builder("cuda").emulated())
        else:
            folder = Path("alphacl_fast")
            build_backend("cuda", folder / "_cuda.abi3.so", [folder])


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=[
        *("alphacl_fast", "alphacl_fast.backend", "alphacl_fast.compat", "alphacl_fast.train"),
        *AT_THE_TOP,
    ],
    py_modules=["alphacl_cli"],
    package_dir=AT_THE_TOP,
    package_data={
        "alphacl_fast": ["py.typed"],
        "alphacl_fast.kernels": ["README.md", "tuned/*.json"],
    },
    ext_modules=[
        Extension(f"alphacl_fast._{name}", sources=[], py_limited_api=True, optional=True)
        for name in BACKENDS
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildBackends, "build_cuda": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
