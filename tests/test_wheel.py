"""`make wheel`, without what takes minutes: that a wheel is judged by what it holds."""

import zipfile

import pytest

from tools import build_wheel


@pytest.mark.parametrize(
    ("names", "right"),
    [
        (("_cpu.abi3.so", "_cuda.abi3.so"), True),
        (("_cpu.abi3.so",), False),
        (("_cpu.abi3.so", "_cuda_not_built.txt"), False),
        (("_cpu.abi3.so", "_cuda.abi3.so", "../alphacl_fast.libs/libstdc++-1234.so.6"), False),
    ],
)
def test_what_a_wheel_must_hold(names, right, tmp_path, monkeypatch):
    monkeypatch.setattr(build_wheel, "python", lambda *arguments, **environment: "shown")
    file = tmp_path / "alphacl_fast-0-cp310-abi3-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for name in ("__init__.py", *names):
            wheel.writestr(f"alphacl_fast/{name}", "")
    if right:
        build_wheel.check(file)
    else:
        with pytest.raises(RuntimeError, match=r"must hold _cpu.abi3.so, _cuda.abi3.so, holds \["):
            build_wheel.check(file)


def test_the_trial_runs_here(monkeypatch):
    """The lines that a clean environment runs, in this one."""
    monkeypatch.setenv("ALPHACL_CUDA_EMULATED", "")
    exec(compile(build_wheel.TRIAL, "trial", "exec"), {})


def test_a_failing_wheel_is_an_error_in_words(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build_wheel, "TRIAL", "raise SystemExit('the CPU backend does not serve')")
    monkeypatch.setattr(build_wheel.venv, "create", lambda folder, with_pip: None)

    class Run:
        returncode, stdout, stderr = 1, "", "the CPU backend does not serve"

    monkeypatch.setattr(build_wheel.subprocess, "run", lambda *arguments, **options: Run)
    assert build_wheel.main(["--try", str(tmp_path / "x.whl"), "--torch", "torch==1"]) == 1
    assert "x.whl with torch==1:\nthe CPU backend does not serve" in capsys.readouterr().err
