"""Every code block of the documents runs; every shell command in them exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from alphacl_fast import cli, zoo

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
        elif words[0] == "python" and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), line
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (ROOT / words[3]).exists(), line
        else:
            assert words[0] in ("git", "cd", "pip", "tar", "mkdir"), line


LOSSES = (ROOT / "docs/losses.md").read_text()


def rows_of_losses():
    """(name, call, file of the test) of every row of the table of losses."""
    lines = [line for line in LOSSES.splitlines() if line.startswith("|") and ".py` |" in line]
    for line in lines:
        call, file = re.findall(r"`([^`]+)` \| `(test_\w+\.py)` \|$", line)[0]
        yield pytest.param(call, file, id=line.split("|")[1].split(",")[0].strip())


@pytest.mark.parametrize(("call", "file"), [*rows_of_losses()])
def test_calls_of_the_page_of_losses(call, file):
    """They run as they are written, and a public name that a row calls has the test it names."""
    setting = {}
    exec(
        compile(re.search(r"```python\n(.*?)```", LOSSES, re.DOTALL)[1], "losses", "exec"), setting
    )
    loss = eval(call, setting)
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    assert setting["z1"].grad.isfinite().all()
    name = re.match(r"(?:zoo\.)?(\w+)", call)[1]
    assert name in (ROOT / "tests" / file).read_text()


def test_page_of_losses_is_complete():
    calls = " ".join(row.values[0] for row in rows_of_losses())
    for name in zoo.__all__:
        assert f"zoo.{name}(" in calls
    assert len([*rows_of_losses()]) >= 25


def test_guarantees_name_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 50
    for file, name in named:
        assert re.search(rf"^\s*def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (
            f"{file}::{name}"
        )
