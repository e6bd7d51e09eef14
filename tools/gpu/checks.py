"""The table of cases in which the loss and its gradients are compared with float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from alphacl_fast.accuracy import ARITHMETIC, CUSTOM, MEMBERS, MODES, REPRESENTATIVES, Case
from alphacl_fast.functional import SIMILARITIES

DIMS = (64, 96, 128, 200, 256, 512, 1024, 4096)


def grid(**axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def cases(
    chosen: list[str], dims: tuple[int, ...] = DIMS, pairs: tuple[int, int] = (1000, 1537)
) -> Iterator[Case]:
    """Yield distinct cases: the most important first, then the whole table in random order."""
    picks = random.Random(0)
    compiled = [name for name in chosen if name != "blocked"] or chosen
    every = [*MEMBERS, *((name, {}) for name in CUSTOM)]
    both, reductions, either = ("bfloat16", "float32"), ("mean", "none"), (False, True)
    axes = {"mode": MODES, "similarity": SIMILARITIES}
    table = list(
        grid(member=every, dtype=ARITHMETIC, **axes, reduction=reductions, learn_tau=either)
    )
    picks.shuffle(table)
    careful = {"reduction": "none", "runs": 2, "learn_tau": True}
    seen: set[Case] = set()
    for fields in itertools.chain(
        (
            {**fields, **more}
            for fields in grid(backend=chosen, dtype=ARITHMETIC)
            for more in ({"reduction": "mean", "runs": 1}, careful)
        ),
        grid(dtype=both, backend=compiled, member=every),
        grid(dtype=["bfloat16"], member=REPRESENTATIVES, **axes, backend=compiled),
        grid(dtype=["float32"], member=REPRESENTATIVES, **axes, backend=chosen),
        grid(dtype=(*both, "tf32", "float16"), dim=dims, backend=compiled, member=MEMBERS[:3:2]),
        grid(tau=(0.05, 0.01), dtype=both, backend=compiled, learn_tau=either),
        (
            {**fields, "dim": picks.choice(dims), "backend": name}
            for k, fields in enumerate(table)
            for name in (chosen if k % 10 == 0 else compiled)
        ),
    ):  # fmt: skip
        member, options = fields.pop("member", MEMBERS[0])
        negatives, symmetric = fields.pop("mode", MODES[0])
        drawn = {
            "reduction": picks.choice(reductions), "runs": picks.choice((1, 2)),
            "dim": 128 if 128 in dims else dims[0],
        }  # fmt: skip
        case = Case(
            objective=member, options=tuple(options.items()), negatives=negatives,
            symmetric=symmetric, pairs=0, **drawn | fields,
        )  # fmt: skip
        if case not in seen and case.sensible():
            seen.add(case)
            yield replace(case, pairs=picks.randint(*pairs))
