"""Bank conflicts of loads from shared memory, and of stores to it.

Shared memory has 32 banks of 4 bytes. A load or a store takes a wavefront for every 128 bytes of a
warp. It takes more where several words of a wavefront are in one bank; lanes that read the same
word share it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

BANKS, WORD = 32, 4


def wavefronts(addresses: np.ndarray, size: int) -> int:
    """How many a load or a store of ``size`` bytes takes, of the lanes with these addresses."""
    lanes = min(32, BANKS * WORD // size)  # that a wavefront serves
    return sum(_of_words(addresses[k : k + lanes], size) for k in range(0, len(addresses), lanes))


def _of_words(addresses: np.ndarray, size: int) -> int:
    words = {int(a + k) // WORD for a in addresses for k in range(0, size, WORD)}
    return max(np.bincount([word % BANKS for word in words]))


class Loads:
    """What loads and stores of whole warps have taken, for each kernel and instruction.

    Attributes:
        found: by kernel and by the instruction's place and text: wavefronts, and how few are
            possible.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[int]]] = defaultdict(dict)

    def counting(self, load: Callable) -> Callable:
        """`Shared.load`, which also counts."""

        def counted(shared, address: np.ndarray, each: int, count: int) -> np.ndarray:
            self._count(shared.m, address, each * count)
            return load(shared, address, each, count)

        return counted

    def counting_stores(self, store: Callable) -> Callable:
        """`Shared.store`, which also counts."""

        def counted(shared, address: np.ndarray, values: np.ndarray) -> None:
            self._count(shared.m, address, values.itemsize * values.shape[1])
            store(shared, address, values)

        return counted

    def _count(self, m, address: np.ndarray, size: int) -> None:
        if len(address) % 32:
            return
        text = f"{m.at} {m.kernel.instructions[m.at].text}"
        row = self.found[m.kernel.name].setdefault(text, [0, 0])
        for warp in np.asarray(address, np.int64).reshape(-1, 32)[:4]:
            row[0] += wavefronts(warp, size)
            row[1] += max(1, 32 * size // (BANKS * WORD))
