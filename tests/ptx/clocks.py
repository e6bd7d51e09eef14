"""Vector clocks: what a warp knows to have happened before.

``of[w, v]`` is the latest moment of the block's warp v that warp w has learnt of through barriers;
a warp's own moment moves on whenever it tells others. A tensor copy is one event, numbered within
its block, which a warp has ``seen`` when it has waited for the barrier that counts its bytes.
"""

from __future__ import annotations

import numpy as np


class Clocks:
    """Of the warps of all blocks, one block's after another's."""

    def __init__(self, blocks: int, block_warps: int) -> None:
        self.blocks, self.block_warps = blocks, block_warps
        self.of = np.zeros((blocks * block_warps, block_warps), np.int64)
        self.reset()

    def reset(self) -> None:
        """Begins anew, after all moments that there have been: everyone knows of those."""
        self.of[:] = self.of.max() + np.tile(np.eye(self.block_warps, dtype=int), (self.blocks, 1))
        warps = len(self.of)
        self.syncs = np.zeros(warps, np.int64)  # barriers that order a warp's own lanes
        self.seen = np.zeros((warps, 16), bool)
        self.copies = [0] * self.blocks

    def now(self, warps: np.ndarray) -> np.ndarray:
        """Each warp's own moment."""
        return self.of[warps, warps % self.block_warps]

    def new_copy(self, block: int) -> int:
        """The number of one more tensor copy."""
        self.copies[block] += 1
        if self.copies[block] > self.seen.shape[1]:
            self.seen = np.concatenate([self.seen, np.zeros_like(self.seen)], axis=1)
        return self.copies[block] - 1

    def join(self, arrived: np.ndarray) -> None:
        """A barrier: in each block the warps that have ``arrived`` learn what all of them know."""
        by_block = self.blocks, self.block_warps, -1
        for known in (self.of, self.seen):
            split = known.reshape(by_block)
            there = arrived.reshape(by_block)
            together = (split * there).max(1, keepdims=True)
            np.copyto(split, together, where=there)
        warps = np.flatnonzero(arrived)
        self.of[warps, warps % self.block_warps] += 1
        self.syncs[warps] += 1

    def told(self, warp: int) -> tuple[np.ndarray, np.ndarray]:
        """What a warp knows, for a message to others; its own moment moves on."""
        known = self.of[warp].copy(), self.seen[warp].copy()
        self.of[warp, warp % self.block_warps] += 1
        return known

    def learn(self, warp: int, known: np.ndarray, copies: np.ndarray) -> None:
        """The other end of `told`; ``copies`` are numbers of tensor copies."""
        self.of[warp] = np.maximum(self.of[warp], known)
        self.seen[warp, copies] = True
