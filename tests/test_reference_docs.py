"""The reference pages build without a warning, and no public name is missing from them."""

import importlib
import inspect
import re
import zlib
from pathlib import Path

import pytest
from training_runs import Fork

import alphacl_fast

ROOT = Path(__file__).parent.parent
MODULES = [
    *("objectives", "pair_weights", "theory", "plan", "train", "zoo"),
    *(
        "compat.info_nce",
        "compat.lightly",
        "compat.open_clip",
        "compat.pytorch_metric_learning",
        "compat.sentence_transformers",
        "compat.supcontrast",
    ),
]


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """Every name that the pages of docs/ can be searched for."""
    out = tmp_path_factory.mktemp("docs")
    flags = ["-q", "-b", "html", "-W", "--keep-going", "-d", str(out / "cache")]

    def command():
        from sphinx.cmd import build

        return build.main([*flags, str(ROOT / "docs"), str(out / "html")])

    process = Fork(command)
    message = process.ended()
    assert process.poll() == 0, message
    inventory = (out / "html" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return set(re.findall(r"^(\S+) py:", zlib.decompress(inventory).decode(), re.MULTILINE))


def public(module):
    """Names of the functions and classes that a module defines, or of all that it offers in
    ``__all__``.
    """
    if hasattr(module, "__all__"):
        return set(module.__all__)
    own = {name for name, x in vars(module).items() if inspect.isroutine(x) or inspect.isclass(x)}
    return {
        name
        for name in own
        if not name.startswith("_") and vars(module)[name].__module__ == module.__name__
    }


def test_every_public_name_is_documented(documented):
    missing = {f"alphacl_fast.{name}" for name in alphacl_fast.__all__} - documented
    for name in MODULES:
        module = importlib.import_module(f"alphacl_fast.{name}")
        assert len(public(module)) > 0
        for member in public(module):
            if not {f"{module.__name__}.{member}", f"alphacl_fast.{member}"} & documented:
                missing.add(f"{module.__name__}.{member}")
    assert not missing
    assert "alphacl_fast.functional.alpha_cl_loss" in documented
    assert "alphacl_fast.train.Config.create" in documented
