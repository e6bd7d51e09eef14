"""Every code block of the documents runs; every shell command in them exists; figures in the README come from rows."""

import json
import re
import shlex
from pathlib import Path

import pytest

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
def test_python_block(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {})


@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_block(code):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[:3] == ["python", "-m", "benchmarks.loss"]:
            from benchmarks import loss

            with pytest.raises(SystemExit) as stopped:
                loss.main([*words[3:], "--help"])
            assert stopped.value.code == 0, line
        else:
            assert words[0] in ("alphacl", "git", "cd", "pip", "tar", "mkdir"), line


def test_readme_figures_come_from_rows():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/cpu.jsonl").read_text().splitlines()]
    table = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert table
    for n, dim, dtype, fraction, speedup in table:
        row = next(
            r for r in rows
            if (r["contestant"], r["threads"], r["negatives"]) == ("cpu", 2, "two_view")
            and (r["n"], r["dim"], r["dtype"]) == (int(n.replace(",", "")), int(dim), dtype)
        )  # fmt: skip
        assert f"{row['fraction_of_gemm_rate']:.2f}" == fraction
        assert f"{row['speedup_over_eager']:.1f}" == speedup


def test_guarantees_name_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 50
    for file, name in named:
        assert re.search(rf"^\s*def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"
