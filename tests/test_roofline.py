"""The counts of tools/roofline.py against a walk over every tile, and what must hold of any
prediction.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tools import roofline
from tools.roofline import DEVICES, DIMS, OVERLAP, Tile

H200 = DEVICES["H200"]
LEVELS = (1, OVERLAP, 0)


def walked(n, tile, both):
    """(row block, column tile, ring distance) of every tile, as a sweep visits them."""
    rows, cols = math.ceil(n / tile.rows), math.ceil(n / tile.cols)
    for i in range(rows):
        if not both:
            yield from ((i, j, 1) for j in range(cols))
            continue
        for distance in range(rows // 2 + 1):
            # half way round an even ring only half of the blocks are met
            if 2 * distance != rows or i < rows // 2:
                yield i, (i + distance) % rows, distance


@pytest.mark.parametrize("n", [1, 16, 17, 31, 64, 80, 97, 128])
@pytest.mark.parametrize("both", [False, True])
def test_counts_by_enumeration(n, both):
    dim, tile = 32, Tile(16, 16) if both else Tile(16, 8)
    tiles = list(walked(n, tile, both))
    met = {pair for i, j, _ in tiles for pair in ((i, j), (j, i) if both else (i, j))}
    # every block meets every other,
    assert len(met) == math.ceil(n / tile.rows) * math.ceil(n / tile.cols)
    assert len(tiles) == len(set(tiles)) == roofline.tile_count(n, tile, both)  # once
    pairs = sum(tile.rows * tile.cols for _ in tiles)
    for gradient in (False,) if both else (False, True):
        work = roofline.sweep(n, dim, tile, gradient, both, H200)
        assert work.exp == pairs
        assert work.flop == (2 if gradient else 1) * 2 * pairs * dim
        assert work.l2 == sum(2 * tile.cols * dim for _ in tiles)
    if both:
        assert work.shuffle == len(tiles) * 96 * 32 * 4


def test_rows_that_do_not_stay_are_read_again():
    kept, read = (
        roofline.sweep(1024, dim, Tile(128, 128), False, False, H200) for dim in (512, 1024)
    )
    assert kept.l2 == 64 * 128 * 512 * 2
    assert read.l2 == 64 * 256 * 1024 * 2


def test_weights_in_memory_do_the_same_work():
    n, dim = 4096, 512
    whole = roofline.sweep(n, dim, Tile(128, 128), True, False, H200)
    parts = [
        roofline.sweep(n, dim, Tile(128, 128), True, False, H200, product=False),
        roofline.vendor_product(n, dim),
    ]
    assert sum(part.flop for part in parts) == whole.flop
    assert sum(part.hbm for part in parts) > 4 * n * n


@pytest.mark.parametrize(
    ("blocks", "sms"), list(itertools.product((1, 3, 8, 128, 132, 133, 512), (1, 8, 132)))
)
def test_programs_fill_the_device(blocks, sms):
    device, tile = replace(H200, sms=sms), Tile(128, 128)
    for both in (False, True):
        count, fill = roofline.parts(128 * blocks, tile, both, device)
        assert 1 <= count <= blocks
        assert 0 < fill <= 1
        # only where there is too little work
        assert fill > 0.6 or blocks * (blocks // 2 + 1) < 8 * sms


@pytest.mark.parametrize("dim", DIMS)
def test_predictions_are_monotone(dim):
    sizes = [128 * 2**k for k in range(3, 14)]
    for overlap in LEVELS:
        times = [roofline.step(n, dim, H200, overlap).time for n in sizes]
        assert times == sorted(times)
        wider = [roofline.step(n, 2 * dim, H200, overlap).time for n in sizes]
        assert all(a < b for a, b in zip(times, wider, strict=True))
    for n in sizes:
        steps = [roofline.step(n, dim, H200, overlap) for overlap in LEVELS]
        assert steps[0].time <= steps[1].time <= steps[2].time
        assert 0 < steps[2].fraction <= steps[0].fraction <= 1
        for name in ("clock", "gemm", "hbm", "l2"):
            faster = replace(H200, **{name: 2 * getattr(H200, name)})
            assert all(
                roofline.step(n, dim, faster, o).time <= s.time
                for o, s in zip(LEVELS, steps, strict=True)
            )


def test_page_is_current(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "roofline.md"
    assert roofline.renewed(page.read_text(), H200) == page.read_text()
    copy = tmp_path / "roofline.md"
    copy.write_text(page.read_text())
    roofline.main(["--device", "H100", "--set", "l2=4e12", "--write", str(copy)])
    assert copy.read_text() != page.read_text()
    assert "H100 (predictions)" in copy.read_text()
    with pytest.raises(ValueError, match="1 marks are expected, found 0"):
        roofline.renewed("nothing", H200)


def test_command_line(capsys):
    roofline.main([])
    assert capsys.readouterr().out.strip() == roofline.tables(H200).strip()
    with pytest.raises(SystemExit):
        roofline.main(["--set", "speed=1"])
    assert "--set must name one of sms, clock, gemm" in capsys.readouterr().err
