"""Runs the tests of other packages from their checkouts, with their classes and with ours.

    python tests/peers/with_ours.py DIR [--only NAME]

DIR holds checkouts under the names in `suites`; those that are missing are left out. The exit
status is 1 if a test passes with the package's class and fails with ours, and `suites` does not say
why.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import replacing
from suites import SUITES, Suite

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main(arguments: list[str] | None = None, suites: tuple[Suite, ...] = SUITES) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the checkouts are")
    parser.add_argument("--only", help="the name of one checkout")
    options = parser.parse_args(arguments)
    chosen = [s for s in suites if options.only in (None, s.name)]
    there = [s for s in chosen if (options.folder / s.name).is_dir()]
    for suite in chosen:
        if suite not in there:
            print(f"{suite.name}: no folder {options.folder / suite.name}, left out")
            print(f"    git clone {suite.repository} and check out {suite.commit}")
    if not there:
        return 2
    failed = 0
    for suite in there:
        failed += compare(suite, (options.folder / suite.name).resolve())
    return int(failed > 0)


def compare(suite: Suite, checkout: Path) -> int:
    """Prints what passes with either; gives the number of failures that nobody explains."""
    commit = commit_of(checkout)
    if commit != suite.commit:
        print(f"{suite.name}: the checkout is at {commit}, the results are of {suite.commit}")
    theirs, ours = (
        {
            key: outcome
            for variant in suite.variants
            for key, outcome in outcomes(suite, checkout, variant, replaced).items()
        }
        for replaced in ({}, suite.replaced)
    )
    passed = [sum(x == "passed" for x in results.values()) for results in (theirs, ours)]
    count = sum(x != "skipped" for x in theirs.values())
    print(f"{suite.name}: of {count} tests, theirs pass {passed[0]}, ours {passed[1]}")
    lost = [key for key, x in theirs.items() if x == "passed" and ours.get(key) != "passed"]
    unknown = 0
    for key in lost:
        why = [why for name, why in suite.differences.items() if fnmatch.fnmatch(key, name)]
        unknown += not why
        print(f"    {key}: {why[0] if why else 'NOT EXPECTED'}")
    if not passed[0]:
        print("    no test passes with the package's own classes: what do they need?")
    return unknown + (not passed[0])


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() or "no commit"


def outcomes(
    suite: Suite, checkout: Path, variant: dict[str, str], replaced: dict[str, str]
) -> dict[str, str]:
    """Test → "passed", "failed" or "skipped"."""
    paths = [checkout / suite.source, ROOT, HERE, *os.environ.get("PYTHONPATH", "").split(":")]
    environment = {
        **os.environ, **variant, replacing.REPLACED: json.dumps(replaced),
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            *(sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "replacing", f"--junitxml={report}", *suite.tests),
        ]
        run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"{suite.name}: pytest made no report:\n{run.stdout}{run.stderr}")
        return dict(read(report, "".join(f"[{x}]" for x in variant.values())))


def read(report: Path, suffix: str):
    """(test, outcome) of every test of a report."""
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        yield f"{case.get('classname')}::{case.get('name')}{suffix}", outcome


if __name__ == "__main__":
    sys.exit(main())
