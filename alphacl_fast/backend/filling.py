"""How many programs share the schedule of a row block (split-K), so that a GPU is filled.

A launch has a program for each row block and each split of its schedule of column tiles. The device
runs ``slots`` programs at a time, in waves, and a wave takes as long as its longest program. Both
GPU backends and the prediction (tools/roofline.py) ask `splits_of`.
"""

from __future__ import annotations

import functools

#: Fewer splits need less memory for partial sums and less time to add them, so that a fill within
#: this share of the best is good enough.
ENOUGH = 0.98


def fill(blocks: int, tiles: int, splits: int, slots: int) -> float:
    """The share of the slots' time in which they have a tile, if all tiles take equally long."""
    waves, longest = -(-blocks * splits // slots), -(-tiles // splits)
    return blocks * tiles / (slots * waves * longest)


@functools.lru_cache(maxsize=4096)
def splits_of(blocks: int, tiles: int, slots: int, most: int) -> int:
    """The fewest splits, ``most`` at most, that fill a device nearly as well as the best number.

    Args:
        blocks: row blocks of the launch.
        tiles: column tiles in the schedule of each.
        slots: programs that the device runs at a time.
        most: the most splits whose partial sums the caller has memory for.
    """
    fills = [fill(blocks, tiles, splits, slots) for splits in range(1, min(tiles, most) + 1)]
    enough = ENOUGH * max(fills, default=0)
    return next((k for k, found in enumerate(fills, 1) if found >= enough), 1)
