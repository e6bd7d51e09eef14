"""The ``alphacl`` command: flags, exit codes, and one line on stderr for every problem."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alphacl_cli
import alphacl_fast
from alphacl_fast import checks, cli, flags, functional, objectives, ops
from alphacl_fast.benchmarks import baselines, bench, loss
from alphacl_fast.cli import main
from alphacl_fast.kernels import config

ROOT = Path(__file__).parent.parent

TINY = ["--width", "4", "--batch-size", "64", "--subset", "128", "--epochs", "2", "--workers", "0"]


def fails(capsys, *arguments):
    """The one line that ``alphacl arguments`` leaves on stderr, without its prefix."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("alphacl: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("alphacl: error: ").rstrip()


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_train_resume_eval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "--objective",
        "alpha_direct",
        "--option",
        "exponent=2",
        "--option",
        "normalized=false",
        *TINY,
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "epoch 2/2  loss " in out
    assert "runs/digits-alpha_direct-0 finished: 2 epochs" in out
    run = tmp_path / "runs" / "digits-alpha_direct-0"
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["option"] == {"exponent": 2, "normalized": False}
    assert (config["width"], config["encoder"], config["lr"]) == (4, "small", 0.003)
    before = contents(tmp_path)
    assert fails(capsys, *command).endswith("choose another --out; nothing was changed")
    for again in (["train", "--resume", str(run)], [*command, "--out", str(run), "--resume"]):
        assert main(again) == 0
        assert "was already finished: 2 epochs" in capsys.readouterr().out
    message = fails(capsys, "train", "--resume", str(run), "--temperature", "0.1", "--epochs", "9")
    assert "--temperature: 0.5 in the run, 0.1 given; --epochs: 2 in the run, 9 given" in message
    assert contents(tmp_path) == before
    assert main(["eval", str(run), "--few-label", "2", "--draws", "3"]) == 0
    out = capsys.readouterr().out
    assert "kNN, 2/class" in out
    assert [out.count(name) for name in ("raw pixels", "untrained encoder", "trained encoder")] == [
        1,
        1,
        2,
    ]
    result = json.loads((run / "eval.json").read_text())
    assert len(result["rows"]["raw pixels"]["probe_few"]["draws"]) == 3


@pytest.mark.usefixtures("quick_plots")
def test_resume_without_a_name_starts_where_nothing_is(tmp_path, capsys):
    command = ["train", "--out", str(tmp_path / "run"), "--resume", "--eval-every", "0", *TINY]
    assert main(command) == 0
    assert main(command) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["trane"], "command must be one of train, eval, "),
    (["train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["train", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["train", "--sheep", "3"], "unrecognized arguments: --sheep 3"),
    (["train", "--option", "exponent"], "argument --option: expected key=value, got 'exponent'"),
    (["train", "--objective", "alpha"], "argument --objective: invalid choice: 'alpha' (choose"),
    (["train", "--option", "exponents=3"], "--option: options of infonce must be one of "),
    (["train", "--temperature", "1e-30"], "--temperature must be between 1e-15 and 1e15"),
    (["train", "--learn-temperature", "--objective", "alpha_direct"],
     "--learn-temperature: temperature must not require grad with alpha_direct"),
    (["train", "--objective", "alpha_direct", "--option", "exponent=-1"],
     "--option: alpha_direct: exponent must be"),
    (["train", "--backend", "abacus"], "argument --backend: invalid choice: 'abacus' (choose"),
    (["train", "--batch-size", "64KB"], "argument --batch-size: expected a whole number such as"),
    (["reproduce", "table", "--rows", "infonse"], "--rows must be some of uniform, infonce, "),
    (["theory", "pca", "--out", "/dev/null/x"], "--out: cannot write to /dev/null/x: Not a dir"),
    (["inspect", "nowhere"], "nowhere is not a run: it has no config.json"),
    (["train", "--device", "abacus"], "--device abacus cannot be used: "),
    (["train", "--dataset", "cifar10", "--data-root", "nowhere"],
     "cannot open cifar10 in nowhere (--download fetches"),
    (["train", "--dataset", "imagefolder", "--data-root", "nowhere"],
     "--data-root nowhere must hold the folders"),
    (["train", "--subset", "5000"], "--subset must not exceed the 1297 training images, got 5000"),
    (["train", "--resume", "nowhere"], "nowhere is not a run: it has no config.json"),
    (["train", "--resume", "here", "--out", "there"],
     "--resume here and --out there name different folders"),
    (["eval"], "the following arguments are required: RUN"),
    (["eval", "nowhere"], "nowhere is not a run: it has no config.json"),
])  # fmt: skip
def test_problems_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, *arguments).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "near"), [
    (["trian"], "train"),
    (["train", "--objetive", "infonce"], "--objective"),
    (["train", "--objective", "alpha_dirct"], "alpha_direct"),
    (["train", "--encoder=resnet8"], "resnet18"),
    (["reproduce", "table", "--rows", "infonse"], "infonce"),
    (["reproduce", "tabel"], "table"),
    (["plan", "--batch", "1", "--dim", "1", "--gpus", "1", "--dtype", "bfloat"], "bfloat16"),
    (["theory", "relou"], "relu"),
    (["eval", "run", "--few-labels", "3"], "--few-label"),
])  # fmt: skip
def test_near_words_are_suggested(capsys, arguments, near):
    assert fails(capsys, *arguments).endswith(f"; did you mean {near!r}?")


@pytest.mark.parametrize(
    ("text", "count"),
    [("65536", 65536), ("64K", 65536), ("64k", 65536), ("1.5M", 3 << 19), ("1e3", 1000)],
)
def test_counts(text, count):
    assert cli._count(text) == count


@pytest.mark.parametrize("text", ["64KB", "", "K", "nan", "inf", "0.3", "1e999"])
def test_no_counts(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number such as 65536"):
        cli._count(text)


@pytest.mark.usefixtures("quick_plots")
def test_resume_without_any_name_takes_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--resume", "--eval-every", "0", *TINY]
    for answer in ("runs/digits-infonce-0 finished", "runs/digits-infonce-0 was already finished"):
        assert main(command) == 0
        assert answer in capsys.readouterr().out


def test_claims_of_theory_are_those_that_are_checked():
    assert tuple(checks.CHECKS) == cli.CLAIMS


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "is not an empty folder: choose another --out" in fails(
        capsys, "train", "--out", str(tmp_path)
    )
    assert "is not an empty folder: choose another --out" in fails(
        capsys, "train", "--out", str(tmp_path), "--resume"
    )
    assert contents(tmp_path) == {(tmp_path / "thesis.txt").relative_to(tmp_path): b"years of work"}


def test_help_lists_the_flags(capsys):
    for arguments, words in (
        (["--help"], ("train", "eval", "info")),
        (
            ["train", "--help"],
            (
                *("--objective", "--no-deterministic", "--resume", "--amp {none,bf16,fp16}"),
                *("otherwise 0.5)", "16 for small", "a tenth of the epochs", "alpha_direct"),
            ),
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert [word for word in words if word not in out] == []


@pytest.mark.parametrize(("arguments", "code", "answer"), [
    ([], 2, "usage: alphacl COMMAND"),
    (["--help"], 0, "usage: alphacl COMMAND"),
    (["--version"], 0, f"alphacl {alphacl_fast.__version__}"),
    (["reprodcue"], 2, "got 'reprodcue'; did you mean 'reproduce'?"),
    (["--epochs", "3"], 2, "alphacl: error: unrecognized arguments: --epochs"),
    *((command, 0, f"usage: alphacl {command[0]}") for command in (
        [name, "--help"] for name in alphacl_cli.COMMANDS
    )),
    (["train", "--sheep"], 2, "alphacl: error: unrecognized arguments: --sheep"),
    (["train", "--epochs", "many"], 2, "alphacl: error: argument --epochs: invalid int value"),
])  # fmt: skip
def test_without_torch(arguments, code, answer):
    """Help and misspelt flags are answered before torch, which takes seconds, is imported."""
    program = (
        "import sys, alphacl_cli\ntry:\n    sys.exit(alphacl_cli.main())\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert answer in (run.stderr if code else run.stdout)


def test_names_in_the_flags_are_the_library_s():
    assert {*flags.SWEEP_BACKENDS} == {*ops.SWEEP_BACKENDS}
    assert objectives.names() == flags.OBJECTIVES
    assert flags.NEGATIVES == functional.NEGATIVES
    assert flags.DTYPES == bench.DTYPES
    assert (*loss.MEASURES, "memory") == flags.MEASURES
    assert (*baselines.BASELINES,) == flags.BASELINES
    assert (*baselines.TASKS,) == flags.TASKS
    assert flags.TILE_MODES == config.MODES


def test_the_folder_of_theory_is_checked_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {})
    (tmp_path / "theory.json").mkdir()
    message = fails(capsys, "theory", "pca", "--out", str(tmp_path))
    assert message == f"--out: cannot write to {tmp_path}: theory.json is a folder"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = fails(capsys, "theory", "pca", "--out", str(tmp_path / "new"))
    assert message.endswith("No space left on device")


def test_the_entry_point_knows_every_command():
    assert [*alphacl_cli.COMMANDS] == [*cli.COMMANDS]


def test_tune_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fails(capsys, "tune") == "tune needs a CUDA device, got none"
    assert fails(capsys, "tune", "--modes", "bf16,int8").endswith("fp64, got int8")
    assert fails(capsys, "tune", "--dims", "many").startswith("argument --dims: invalid int list")


def test_info_lists_backends_with_reasons(monkeypatch, capsys):
    why = {"cpu": "beads\nmissing", "cuda": "no hands"}
    on = {"cpu": "one only", "cuda": None}
    monkeypatch.setattr(
        alphacl_fast,
        "backends",
        lambda device: {"reference": None, "abacus": why[device], "slide_rule": on[device]},
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert main(["info"]) == 0
    out = capsys.readouterr().out.replace("backend ", "backend-")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["torch"].startswith(torch.__version__.split("+")[0])
    assert lines["alphacl_fast"] == alphacl_fast.__version__
    assert lines["backend-reference"] == "usable on cpu and cuda"
    assert lines["backend-abacus"] == "not usable: cpu: beads missing; cuda: no hands"
    assert lines["backend-slide_rule"] == "usable on cuda"
    assert "alpha_direct" in lines["objectives"]


def test_info_needs_torch_alone():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'sklearn', 'matplotlib', 'tqdm', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "from alphacl_fast.cli import main\nsys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend reference" in done.stdout


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("alphacl_fast.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(alphacl_fast, "train", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("sklearn", "PIL") else find_spec(name),
    )
    message = fails(capsys, "train")
    assert message == "alphacl_fast.train needs more packages: pip install scikit-learn pillow"


def test_a_reader_that_has_gone():
    """It ends the command without a word, also where the interpreter flushes what is left."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "alphacl_fast.cli", "reproduce", "recipes"]
    try:
        run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")


#: Packages whose import takes long, a destructor, the command's own work, and the shutdown.
INTERRUPTED = """
import builtins, contextlib, os, signal, sys
moment, imported = sys.argv.pop(1), builtins.__import__

def interrupt(again=False):
    for _ in range(1 + again):
        os.kill(os.getpid(), signal.SIGINT)

def importing(name, *rest, **options):
    if name == moment and name not in sys.modules:
        if moment == "torch":
            with contextlib.suppress(BaseException):  # as the C code of some packages does
                interrupt()
        else:
            interrupt()
    return imported(name, *rest, **options)

class Dies:
    def __del__(self):
        interrupt()

builtins.__import__ = importing
import alphacl_cli

def work(arguments):
    if moment == "destructor":
        Dies()
    if moment in ("work", "twice"):
        try:
            interrupt()
        finally:
            if moment == "twice":
                interrupt()
    return 0

if moment in ("destructor", "work", "twice", "end"):
    from alphacl_fast import cli
    cli.COMMANDS["info"] = work
code = alphacl_cli.main()
if moment == "end":
    interrupt()
sys.exit(code)
"""


def interruptible(command, **options):
    """Run a command that does not inherit an ignored SIGINT, as background jobs of a shell do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("moment", ["argparse", "torch", "destructor", "work", "twice", "end"])
def test_ctrl_c_leaves_no_traceback(moment):
    command = [sys.executable, "-c", INTERRUPTED, moment, "info"]
    run = interruptible(command)
    expected = (0, "") if moment == "end" else (130, "alphacl: interrupted\n")
    assert (run.returncode, run.stderr) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("module", ["alphacl_fast.cli", "alphacl_fast.train"])
def test_ctrl_c_while_a_module_starts(tmp_path, module):
    """A module that is run by its name handles Ctrl-C before it imports torch."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-m", module, *(["train"] if module.endswith("cli") else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = interruptible(command, env=environment)
    assert (run.returncode, run.stderr) == (130, "alphacl: interrupted\n")
