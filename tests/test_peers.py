"""`make peers` compares a package's own tests with its class and with ours, on a checkout."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import with_ours
from suites import SUITES, Suite

PACKAGE = """
class Loss:
    def __call__(self, x):
        return 2 * x
"""
TESTS = """
from package import Loss

def test_value():
    assert Loss()(3) == 6

def test_type():
    assert type(Loss()(3)) is int

def test_name():
    assert Loss.__module__ == "package"
"""
OURS = """
class Loss:
    def __call__(self, x):
        return 2.0 * x
"""


@pytest.fixture
def checkouts(tmp_path):
    folder = tmp_path / "package"
    (folder / "tests").mkdir(parents=True)
    (folder / "package.py").write_text(PACKAGE)
    (folder / "ours.py").write_text(OURS)
    (folder / "tests" / "test_loss.py").write_text(TESTS)
    return tmp_path


def suite(**differences):
    names = {"package:Loss": "ours:Loss"}
    tests = ("tests/test_loss.py",)
    return Suite("package", "https://example.org", "0", tests, names, differences=differences)


def test_what_only_theirs_passes_is_said(checkouts, capsys, monkeypatch):
    """Our class is in the place of theirs; a difference that nobody explains fails the run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert with_ours.main([str(checkouts)], (suite(**{"*::test_type": "a float"}),)) == 1
    out = capsys.readouterr().out
    assert "package: of 3 tests, theirs pass 3, ours 1" in out
    assert "tests.test_loss::test_type: a float" in out
    assert "tests.test_loss::test_name: NOT EXPECTED" in out


def test_a_difference_with_a_reason_is_accepted(checkouts, capsys, monkeypatch):
    def outcomes(suite, checkout, variant, replaced):
        return {"a": "passed", "b": "failed" if replaced else "passed", "c": "skipped"}

    monkeypatch.setattr(with_ours, "outcomes", outcomes)
    assert with_ours.main([str(checkouts)], (suite(b="a float"),)) == 0
    assert "of 2 tests, theirs pass 2, ours 1\n    b: a float" in capsys.readouterr().out


def test_a_missing_checkout_is_named(tmp_path, capsys):
    assert with_ours.main([str(tmp_path)]) == 2
    out = capsys.readouterr().out
    for known in SUITES:
        assert f"git clone {known.repository} and check out {known.commit}" in out


def test_the_classes_of_the_suites_are_there():
    """What a suite replaces exists among the adapters."""
    for known in SUITES:
        for name in known.replaced.values():
            module, attribute = name.split(":")
            assert (Path(with_ours.ROOT) / f"{module.replace('.', '/')}.py").exists()
            assert attribute.isidentifier()
