"""``alphacl tune``: which tiles are timed and kept, and what a candidate that crashes costs."""

import argparse
import errno
import json
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from pools import patient_pool

from alphacl_fast import flags, journal, ops, tune
from alphacl_fast.kernels import config
from alphacl_fast.kernels.config import Tile
from tools.gpu import calls

one_worker = pytest.mark.xdist_group("children")  # which share a server
#: How the package chooses a tile, which the tests' own fixture replaces.
TILE = getattr(ops.SWEEP_BACKENDS.get("triton"), "tile", None)
SLOW, FAST = Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 8, 2)


def row_of(tile, took, status="ok", **place):
    """A candidate's row as it is read from a file."""
    candidate = replace(tune.Candidate("pair_grad", "bf16", 64, 1024, tile), **place)
    row = {"benchmark": "tune", **asdict(candidate), "status": status, "median_ms": took}
    return json.loads(json.dumps(row))


def tiles_in(file):
    return {(e["dim"], e["rows"]): e["tile"] for e in json.loads(file.read_text())}


def test_the_table_is_saved_at_every_win(tmp_path, monkeypatch):
    book = journal.Journal(tmp_path / "rows", print)
    table = tune.Table(tmp_path / "new" / "tuned.json", book.attempt)
    assert table.follow(row_of(SLOW, 2.0))
    assert tiles_in(table.file) == {(64, 1024): asdict(SLOW)}
    assert table.follow(row_of(FAST, 1.0))
    assert not table.follow(row_of(SLOW, 3.0))
    assert not table.follow(row_of(SLOW, 0.5, "left out"))
    assert tiles_in(table.file) == {(64, 1024): asdict(FAST)}
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(Path, "write_text", full)
    table.follow(row_of(SLOW, 0.1))
    monkeypatch.undo()
    assert tiles_in(table.file) == {(64, 1024): asdict(FAST)}
    assert book.lost == ["tuned.json could not be written: No space left on device"]


def test_what_a_table_held_of_other_sizes_stays(tmp_path):
    file = tmp_path / "tuned.json"
    for dim, tile in ((64, SLOW), (128, FAST)):
        tune.Table(file, lambda what, write: write()).follow(row_of(tile, 1.0, dim=dim))
    assert tiles_in(file) == {(64, 1024): asdict(SLOW), (128, 1024): asdict(FAST)}
    table = tune.Table(file, lambda what, write: write())
    assert table.follow(row_of(FAST, 9.0))  # the times of an earlier run are not known
    assert tiles_in(file) == {(64, 1024): asdict(FAST), (128, 1024): asdict(FAST)}


@pytest.mark.parametrize("text", ["{", "[1]", '[{"sweep": "row_sums"}]', "7"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json must be a table of tiles or absent, got "):
        tune.Table(file, lambda what, write: write())
    assert file.read_text() == text


def test_candidates_begin_with_the_gradient_of_the_headline_size():
    listed = tune.candidates(calls.TUNED, (9, 0))
    assert listed[0].place == ("pair_grad", "bf16", 128, 65536)
    assert listed[0].tile == config.default("pair_grad", "bf16", 128, (9, 0))
    assert len(set(listed)) == len(listed)
    assert {c.place[1:] for c in listed} == {*calls.TUNED}


@pytest.mark.skipif(
    "triton" not in ops.SWEEP_BACKENDS
    or ops.SWEEP_BACKENDS["triton"].unsupported(torch.device("cpu"), torch.bfloat16, None, "exp")
    is not None,
    reason="needs Triton's interpreter",
)
def test_tiles_that_are_left_out(monkeypatch):
    """One does not run, and one gives other numbers."""
    import triton.testing

    # the tests' own tiles give way to the package's
    monkeypatch.setattr(ops.SWEEP_BACKENDS["triton"], "tile", TILE)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **options: run() is None or 1.5)
    candidate = tune.Candidate("pair_grad", "bf16", 16, 64, Tile(32, 32, 16, 4, 2))
    (row,) = tune.time_tile(candidate, "cpu")
    assert (row["status"], row["median_ms"]) == ("ok", 1.5)
    (row,) = tune.time_tile(replace(candidate, tile=Tile(0, 32, 16, 4, 2)), "cpu")
    assert row["status"] == "left out"
    step = tune.step
    monkeypatch.setattr(tune, "step", lambda candidate, here: lambda: 1.1 * step(candidate, here)())
    (row,) = tune.time_tile(candidate, "cpu")
    assert (row["status"], row["error"]) == ("left out", "off by 1.0e-01")


ACTORS = """
import os, time
from dataclasses import asdict
from pathlib import Path
def act(candidate, device):
    if candidate.tile.rows == 1:
        os.abort()
    if candidate.tile.rows == 2:
        Path(__file__).with_name("hangs").touch()
        time.sleep(3600)
    yield {"benchmark": "tune", **asdict(candidate), "status": "ok",
           "median_ms": 1 / candidate.tile.rows}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on a stand-in for a GPU, with these rows of tiles as its candidates."""
    (tmp_path / "actors_of_the_tune_test.py").write_text(ACTORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(config, "device_name", lambda device: "a_gpu")
    monkeypatch.setattr(tune, "Pool", patient_pool(tmp_path / "hangs"))
    search = tune.search

    def run(tiles, out=tmp_path / "tuned.json"):
        items = [tune.Candidate("pair_grad", "bf16", 64, 1024, Tile(k, 8, 8, 4, 2)) for k in tiles]
        monkeypatch.setattr(tune, "candidates", lambda sizes, capability: items)
        monkeypatch.setattr(
            tune,
            "search",
            lambda items, device, *rest: search(items, "cpu", *rest, "actors_of_the_tune_test:act"),
        )
        parser = argparse.ArgumentParser()
        flags.add_tune_flags(parser)
        return tune.run(parser.parse_args(["--out", str(out)]), pytest.fail)

    return run


@one_worker
def test_a_candidate_that_crashes_or_hangs_costs_its_own_row(command, tmp_path, capsys):
    assert command([16, 1, 2, 32]) == 0
    told = capsys.readouterr().out.splitlines()
    here = "bf16 D=64 n=1024 pair_grad: "
    assert told == [
        f"{here}0.062 ms with 16×8×8×4×2×2",
        f"{here}1×8×8×4×2×2 is left out: the process was killed by SIGABRT",
        f"{here}2×8×8×4×2×2 is left out: no row within 60 s",
        f"{here}0.031 ms with 32×8×8×4×2×2",
        f"1 new entries of 1 in {tmp_path / 'tuned.json'}",
    ]
    assert tiles_in(tmp_path / "tuned.json") == {(64, 1024): asdict(Tile(32, 8, 8, 4, 2))}


@one_worker
def test_a_run_without_a_result_fails(command, tmp_path, capsys):
    assert command([1]) == 1
    assert f"0 new entries of 0 in {tmp_path / 'tuned.json'}" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(pytest.fail.Exception, match=r"cannot write to .*: File exists"):
        command([16], tmp_path / "file" / "tuned.json")
