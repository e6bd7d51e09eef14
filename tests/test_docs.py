"""Every code block of the documents runs; every shell command in them exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from alphacl_fast import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(match.group(1), id=f"{file.name}-{k}")
        for file in DOCUMENTS
        for k, match in enumerate(pattern.finditer(file.read_text()))
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {})
    if "trained encoder" in code:  # what it prints is an accuracy
        assert float(capsys.readouterr().out.split()[-1]) > 0.9


@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_block(code):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[0] == "alphacl" or (
            words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "tools."))
        ):
            command = cli.main if words[0] == "alphacl" else importlib.import_module(words[2]).main
            with pytest.raises(SystemExit) as stopped:  # it exists, and has these flags
                command([*(words[1:] if words[0] == "alphacl" else words[3:]), "--help"])
            assert stopped.value.code == 0, line
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (ROOT / words[3]).exists(), line
        else:
            assert words[0] in ("git", "cd", "pip", "tar", "mkdir"), line


def test_guarantees_name_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 50
    for file, name in named:
        assert re.search(rf"^\s*def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (
            f"{file}::{name}"
        )
