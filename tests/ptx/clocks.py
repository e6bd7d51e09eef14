"""Vector clocks: what a warp knows to have happened before.

``of[w, v]`` is the latest moment of warp v that warp w has learnt of through barriers; a warp's own
moment moves on whenever it tells others. A tensor copy is one event, which a warp has ``seen`` when
it has waited for the barrier that counts its bytes.
"""

from __future__ import annotations

import numpy as np


class Clocks:
    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.reset()

    def reset(self) -> None:
        self.of = np.eye(self.warps, dtype=np.int64)
        self.syncs = np.zeros(self.warps, np.int64)  # barriers that order a warp's own lanes
        self.seen = np.zeros((self.warps, 16), bool)
        self.copies = 0

    def now(self, warps: np.ndarray) -> np.ndarray:
        """Each warp's own moment."""
        return self.of[warps, warps]

    def new_copy(self) -> int:
        """The number of one more tensor copy."""
        self.copies += 1
        if self.copies > self.seen.shape[1]:
            self.seen = np.concatenate([self.seen, np.zeros_like(self.seen)], axis=1)
        return self.copies - 1

    def join(self, warps: np.ndarray) -> None:
        """A barrier: each of these warps learns what all of them know."""
        self.of[warps] = self.of[warps].max(0)
        self.seen[warps] = self.seen[warps].any(0)
        self.of[warps, warps] += 1
        self.syncs[warps] += 1

    def told(self, warp: int) -> tuple[np.ndarray, np.ndarray]:
        """What a warp knows, for a message to others; its own moment moves on."""
        known = self.of[warp].copy(), self.seen[warp].copy()
        self.of[warp, warp] += 1
        return known

    def learn(self, warp: int, known: np.ndarray, copies: np.ndarray) -> None:
        """The other end of `told`; ``copies`` are numbers of tensor copies."""
        self.of[warp] = np.maximum(self.of[warp], known)
        self.seen[warp, copies] = True
