"""The table of planted faults can be planted, and its runner tells a fault that is found from one
that is not."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mutants"
ROOT = FOLDER.parents[1]


def load(name):
    """A module of the folder, under its own name: processes that the runner starts look it up by
    that."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield load("run")


def test_every_fault_can_be_planted(runner):
    mutants = load("table").MUTANTS
    assert mutants
    assert len({(m.file, m.name) for m in mutants}) == len(mutants)
    texts = {m.file: (ROOT / m.file).read_text() for m in mutants}
    stale = [
        f"{m.file}: {m.name}" for m in mutants if m.planted(texts[m.file]) in (None, texts[m.file])
    ]
    assert not stale, "\n".join(stale)


def test_every_test_of_the_table_is_there(runner):
    absent = set()
    for mutant in load("table").MUTANTS:
        file, *parts = mutant.test.split("[")[0].split("::")
        source = (ROOT / file).read_text()
        absent |= {
            mutant.test
            for name in parts
            if not re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE)
        }
    assert not absent


FORMULA = "def double(x):\n    return 2 * x  # twice\n"
TESTS = """
import time
from formula import double
def test_double(): assert double(3) == 6
def test_waits(): time.sleep(60 * (double(1) - 2))
def test_fails_anyway(): assert double(3) == 7
"""
CASES = {
    "killed": ("2 * x", "3 * x", "test_double"),
    "SURVIVED": ("# twice", "# two times", "test_double"),
    "stale": ("4 * x", "5 * x", "test_double"),
    "cannot be tried: tests/test_formula.py::test_fails_anyway does not pass": (
        "2 * x",
        "3 * x",
        "test_fails_anyway",
    ),
    "cannot be tried: tests/test_formula.py::test_absent does not pass": (
        "2 * x",
        "3 * x",
        "test_absent",
    ),
    "cannot be tried: ": ("return", "retrun", "test_double"),
}


def test_what_the_runner_says(runner, tmp_path, monkeypatch):
    """A checkout of one function: one outcome of each kind."""
    source = tmp_path / "source"
    (source / "tests").mkdir(parents=True)
    (source / "formula.py").write_text(FORMULA)
    (source / "tests" / "test_formula.py").write_text(TESTS)
    mutants = [
        runner.Mutant(expected, "formula.py", old, new, f"tests/test_formula.py::{test}")
        for expected, (old, new, test) in CASES.items()
    ]
    monkeypatch.setattr(runner, "PRELOADED", ["pytest"])  # the formula needs nothing else
    outcomes = runner.run(mutants, 2, source, say=lambda line: None)
    for mutant, outcome in outcomes.items():
        assert outcome.startswith(mutant.name), (mutant.name, outcome)
    assert sum(map(runner.good, outcomes.values())) == 1
    assert re.search(r"^all +6 +1$", runner.report(outcomes), re.MULTILINE)
    assert (source / "formula.py").read_text() == FORMULA

    monkeypatch.setattr(runner, "LIMIT", 2)
    checkout = runner.Checkout(source, tmp_path / "copy", tmp_path / "store")
    endless = runner.Mutant(
        "endless", "formula.py", "2 * x", "3 * x", "tests/test_formula.py::test_waits"
    )
    assert runner.outcome(checkout, endless) == "timed out after 2 s"
    assert runner.outcome(checkout, endless._replace(timeout_kills=True)) == "killed"
    assert (checkout.root / "formula.py").read_text() == FORMULA


def test_a_fault_in_a_formula_is_found_and_another_comment_is_not(runner):
    member = "infonce(epsilon=1.0,temperature_scaled=False)"
    test = f"tests/test_backends.py::test_equals_reference[{member}-two_view-True-cosine]"
    file, line = (
        "alphacl_fast/objectives.py",
        "torch.logaddexp(ell, torch.zeros_like(ell) + _log(self.epsilon))",
    )
    comment = "# torch's softplus turns linear at 20, an error of 2e-9"
    fault = runner.Mutant("ε is ignored", file, line, "ell", test)
    same = runner.Mutant("another comment", file, comment, "# (softplus: 2e-9)", test)
    assert runner.run([fault, same], 1, say=lambda line: None) == {
        fault: "killed",
        same: "SURVIVED",
    }
