"""The min player made visible: the pair weights α of a batch, as a matrix or as statistics in
O(N·(D + k)).

α_ij = ∂L_i/∂Δ_ij with a designed α held fixed (arXiv:2201.12680, Theorem 1 and the pair-weighted
family): for φ/ψ losses φ′(ξ_i)·ψ′(Δ_ij), for the others the α of their definition. The row scalars
come from the loss's own sweeps; every α_ij is then pointwise in t_ij, so one more pass over tiles
of anchors × candidates visits each α_ij and stores none.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import functional
from .autograd import Features, Problem, Sweeps
from .backend import reference
from .backend.blocked import deal, excluded_diagonals, tile_size
from .bundles import accumulation_dtype
from .call import Layout, without_autocast
from .metrics import alignment, uniformity
from .objectives import ClosedForm, Objective
from .objectives import kind as lookup

MAX_ELEMENTS = 2**28
#: The settings of a call that α depends on, and the choice of a backend.
SETTINGS = {
    "similarity": "cosine", "negatives": "two_view", "symmetric": True, "backend": "auto",
    "precision": None, "max_gap": None,
}  # fmt: skip
Result = TypeVar("Result")


class Tile(NamedTuple):
    """α of the anchors [start, stop) against the rows [first, last) of the stacked views.

    The tensors are (stop − start, last − first).
    """

    start: int
    stop: int
    first: int
    last: int
    distance: Tensor  #: d²
    alpha: Tensor  #: 0 at excluded pairs
    excluded: list[int]  #: diagonals of the pairs that are not negatives

    @property
    def n_excluded(self) -> int:
        return sum(self.alpha.diagonal(diagonal).numel() for diagonal in self.excluded)


class Importances:
    """The solved pair weights of one batch: a few numbers per anchor, from which any α_ij follows.

    Arguments: see `alphacl_fast.functional.alpha_cl_loss`; z1, z2 (N, D) are detached.

    Attributes:
        anchors: 2N for two_view and symmetric cross_view (both towers, [z1; z2]); else N.
        candidates: columns of α: 2N for two_view, else N.
        n_neg: |Neg(i)|, also of negatives that max_gap leaves out (their α is 0).
        rows: (2N, D) rows whose similarities count: unit rows for cosine, centred rows for
            euclidean, otherwise unchanged rows.
        positive: (anchors,) t⁺_i.

    Raises:
        TypeError, ValueError: see `alpha_cl_loss`.
    """

    def __init__(
        self,
        z1: Tensor,
        z2: Tensor,
        objective: str | Objective = "infonce",
        *,
        temperature: float | Tensor = 0.5,
        **options: Any,
    ) -> None:
        settings = {name: options.pop(name) for name in [*options] if name in SETTINGS}
        call = functional.make_call(objective, options, reduction="sum", **SETTINGS | settings)
        if call.max_gap is not None and call.backend == "reference":
            raise ValueError(f"backend must not be 'reference' with max_gap={call.max_gap:g}")
        if isinstance(temperature, Tensor):
            temperature = temperature.detach()
        z1, z2 = functional.of_one_dtype(z1, z2)
        functional.check_embeddings(z1, z2, call.objective.fewest_pairs)
        tau, call, _ = functional.bind(z1, z2, temperature, call)
        self.call = call
        self.layout = Layout.of(call, z1.shape[0])
        self.anchors, self.n_neg = self.layout.anchors, self.layout.n_neg
        self.candidates = self.layout.rows - self.layout.split
        with torch.no_grad(), without_autocast(z1.device):
            self.tau = tau.to(accumulation_dtype(z1.dtype))
            if call.backend == "reference":
                z1, z2 = z1.detach().to(self.tau.dtype), z2.detach().to(self.tau.dtype)
                features, pos = Features.of_views(z1, z2, replace(call, backend="blocked"))
                self._dense = reference.importances(
                    z1,
                    z2,
                    self.tau,
                    call.objective,
                    call.similarity,
                    call.negatives,
                    call.symmetric,
                )
            else:
                features, pos = Features.of_views(z1.detach(), z2.detach(), call)
                self._solved = (
                    None if isinstance(call.objective, ClosedForm) else self._solve(features, pos)
                )
            self.features, self.rows, self.positive = features, features.wide(), pos[: self.anchors]

    def _solve(self, features: Features, pos: Tensor) -> list[Tensor | None]:
        """The row weight (for L_i itself), shift and argument_offset, as columns."""
        solved = Problem(features, pos, self.tau, self.call).solve(learn_tau=False)
        weight = solved.row_weight * self.call.divisor(pos.shape[0] // 2)
        columns = (weight, solved.shift, solved.argument_offset)
        return [None if x is None else x.unsqueeze(1) for x in columns]

    def distances(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """(stop − start, last − first) d² of rows of the stacked views."""
        t = self.rows[start:stop] @ self.rows[first:last].t()
        bias = self.features.rows.bias
        if bias is not None:
            t += bias[start:stop, None]
            t += bias[None, first:last]
        return self.call.c - t

    def walk(self, work: Callable[[Iterator[Tile]], Result]) -> list[Result]:
        """``work`` on all tiles, in one call or dealt out to threads by blocks of anchors.

        Results come in a fixed order.
        """
        if self.call.backend == "reference":
            return [work(self._of_the_oracle())]
        blocks = list(self.blocks(tile_size(self.layout.rows, self.rows.device)))
        return deal(
            len(blocks),
            self.rows.device,
            lambda worker, workers: work(
                tile for block in blocks[worker::workers] for tile in self._tiles_of(*block)
            ),
        )

    def _tiles_of(self, start: int, stop: int, low: int, high: int) -> Iterator[Tile]:
        side = tile_size(self.layout.rows, self.rows.device)
        for first in range(low, high, side):
            last = min(first + side, high)
            distance = self.distances(start, stop, first, last)
            excluded = excluded_diagonals(
                start, stop, first, last, self.layout.split, self.layout.partner
            )
            t, anchors = self.call.c - distance, slice(start, stop)
            alpha = self._alpha(t, anchors)
            if self.call.max_gap is not None:
                largest = self.positive[anchors, None] + self.call.most_gap(t.dtype)
                alpha.masked_fill_(t > largest, 0.0)
            for diagonal in excluded:
                alpha.diagonal(diagonal).zero_()
            yield Tile(start, stop, first, last, distance, alpha, excluded)

    def blocks(self, side: int) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop) of a block of anchors and (first, last) of its candidates, in the
        stacked views.
        """
        split, rows = self.layout.split, self.layout.rows
        for start in range(0, self.anchors, side):
            stop = min(start + side, self.anchors)
            if not split:
                yield start, stop, 0, rows
            else:  # a block may end in the first tower and begin in the second
                if start < split:
                    yield start, min(stop, split), split, rows
                if stop > split:
                    yield max(start, split), stop, 0, split

    def _alpha(self, t: Tensor, anchors: slice) -> Tensor:
        objective = self.call.objective
        if isinstance(objective, ClosedForm):
            return torch.full_like(t, objective.weight(self.n_neg) / self.n_neg)
        log, tau = lookup(objective.kind).log, objective.kind_tau(self.tau)
        kind = lookup(objective.kind).bind(objective.params(self.call.c))
        weight, shift, offset = (None if x is None else x[anchors] for x in self._solved)
        if log:
            return (kind.f(t, tau) - shift).exp() * weight
        x = t if shift is None else t - shift
        x = x if offset is None else x + offset
        return (kind.df if objective.derivative else kind.f)(x, tau) * weight

    def _of_the_oracle(self) -> Iterator[Tile]:
        t, alpha = self._dense
        for start, stop, first, last in self.blocks(self.anchors):
            excluded = excluded_diagonals(
                start, stop, first, last, self.layout.split, self.layout.partner
            )
            there = torch.ones(stop - start, last - first, dtype=torch.bool, device=t.device)
            for diagonal in excluded:
                there.diagonal(diagonal).zero_()
            tile = t.new_zeros(2, *there.shape)
            tile[0][there], tile[1][there] = t[start:stop].flatten(), alpha[start:stop].flatten()
            yield Tile(start, stop, first, last, self.call.c - tile[0], tile[1], excluded)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(anchors, candidates) α; 0 for a pair that is not a negative."""
        out = self.rows.new_empty(self.anchors, self.candidates)

        def fill(tiles: Iterator[Tile]) -> None:
            for tile in tiles:
                low = self.layout.split if tile.first >= self.layout.split else 0
                out[tile.start : tile.stop, tile.first - low : tile.last - low] = tile.alpha

        self.walk(fill)
        return out

    @torch.no_grad()
    def both_ways(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(A + Aᵀ)·x for x (N, d), with the row and column sums (N,) of A, in x's dtype.

        It serves one_view only.
        """
        self.check_one_view()

        def multiply(tiles: Iterator[Tile]) -> tuple[Tensor, Tensor, Tensor]:
            y, row_sums, col_sums = torch.zeros_like(x), x.new_zeros(len(x)), x.new_zeros(len(x))
            for tile in tiles:
                i, j, a = (
                    slice(tile.start, tile.stop),
                    slice(tile.first, tile.last),
                    tile.alpha.to(x.dtype),
                )
                y[i] += a @ x[j]
                y[j] += a.t() @ x[i]
                row_sums[i] += a.sum(1)
                col_sums[j] += a.sum(0)
            return y, row_sums, col_sums

        total, *others = self.walk(multiply)
        for other in others:
            for mine, theirs in zip(total, other, strict=True):
                mine += theirs
        return total

    @torch.no_grad()
    def both_ways_on_own_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `both_ways` for the first N of `rows`, by one gradient sweep.

        Returns the product, the row sums, and the row and column sums together.
        """
        self.check_one_view()
        n, closed = self.anchors, isinstance(self.call.objective, ClosedForm)
        if closed or self.call.backend == "reference":
            y, row_sums, col_sums = self.both_ways(self.rows[:n])
            return y, row_sums, row_sums + col_sums
        rows = self.features.rows
        if rows.bias is None:  # with a bias, a sweep returns the sums of the weights too
            rows = rows._replace(bias=self.rows.new_zeros(2 * n))
        sweeps = Sweeps(rows, self.positive.repeat(2), self.tau, self.call)
        solution = sweeps.solve(self.call.objective, learn_tau=False)
        y, both, _ = sweeps.grad(replace(solution, baseline=None), (), (0, n))
        return y, solution.mass, both

    def check_one_view(self) -> None:
        """Raises ValueError unless negatives="one_view", the setting of the max player's theory."""
        if self.call.negatives != "one_view":
            raise ValueError(
                f"alpha must be of negatives='one_view' here, got {self.call.negatives!r}"
            )


def alpha(
    z1: Tensor,
    z2: Tensor,
    objective: str | Objective = "infonce",
    *,
    max_elements: int = MAX_ELEMENTS,
    **settings: Any,
) -> Tensor:
    """The pair weights α of a batch as a matrix, without a gradient.

    Args:
        z1: (N, D) embeddings of the first view (see `alphacl_fast.functional.alpha_cl_loss`).
        z2: (N, D) embeddings of the second view.
        objective: a name or an `Objective`.
        max_elements: the most elements that the matrix may have; `alpha_summary` needs no matrix.
        **settings: the other arguments of `alpha_cl_loss`, except reduction, process_group and ids.

    Returns:
        (anchors, candidates), float32 (float64 for float64 input), 0 where a pair is not a
        negative: (2N, 2N) for two_view, (N, N) for one_view and cross_view, (2N, N) for symmetric
        cross_view (z1 against z2, then z2 against z1). Where α is designed, L_i = Σ_j α_ij·Δ_ij;
        for φ/ψ losses ∂L_i/∂Δ_ij = α_ij.

    Raises:
        TypeError, ValueError: see `alpha_cl_loss`; also for a matrix larger than ``max_elements``.

    Source: arXiv:2201.12680, Theorem 1 (α = φ′ψ′) and the pair-weighted family.
    """
    if isinstance(z1, Tensor) and z1.dim() == 2:
        rows = z1.shape[0] * (2 if settings.get("negatives", "two_view") == "two_view" else 1)
        if rows * rows > max_elements:
            raise ValueError(
                f"alpha must have at most max_elements={max_elements:,} numbers, got {rows:,} × "
                f"{rows:,}; "
                "alpha_summary needs no such matrix"
            )
    return Importances(z1, z2, objective, **settings).dense()


@dataclass(frozen=True)
class AlphaSummary:
    """Statistics of α in a batch, made by `alpha_summary`.

    Tensors have one entry per anchor unless noted.
    """

    objective: str
    n_neg: int
    row_sum: Tensor  #: (anchors,) Σ_j α_ij; below, p_ij = α_ij / Σ_j α_ij
    entropy: Tensor  #: (anchors,) −Σ p log p, nats; log |Neg| for a uniform α
    effective_negatives: (
        Tensor  #: (anchors,) 1/Σp²; |Neg| for a uniform α, 0 for a row without weight
    )
    hardest: Tensor  #: (anchors, k) int64, rows of [z1; z2], nearest negatives first
    hardest_distance: Tensor  #: (anchors, k) d²
    hardest_alpha: Tensor  #: (anchors, k)
    edges: Tensor  #: (bins + 1,) of d²
    pairs: Tensor  #: (bins,) int64, negatives by d²; end bins hold outliers, the last one NaN too
    mass: Tensor  #: (bins,) Σ α of the pairs in the bin
    positive_similarity: float  #: mean t⁺
    alignment: float  #: mean ‖x − x⁺‖² of unit rows (Wang and Isola 2020)
    uniformity: (
        float  #: log mean exp(−2‖x − y‖²) over pairs of a view, mean of the two views (ibid.)
    )

    def scalars(self) -> dict[str, float]:
        """Means over the anchors, as logged during training."""
        of_anchors = {
            "alpha_sum": self.row_sum,
            "alpha_entropy": self.entropy,
            "effective_negatives": self.effective_negatives,
            "hardest_alpha": self.hardest_alpha[:, 0],
            "hardest_distance": self.hardest_distance[:, 0],
        }
        of_batch = ("positive_similarity", "alignment", "uniformity")
        means = {name: x.mean().item() for name, x in of_anchors.items()}
        return means | {name: getattr(self, name) for name in of_batch}

    def __str__(self) -> str:
        values = self.scalars()
        width = max(map(len, values))
        lines = [
            f"{self.objective}, {len(self.row_sum):,} anchors with {self.n_neg:,} negatives each; "
            "means over the anchors"
        ]
        return "\n".join(
            [*lines, *(f"  {name:{width}}  {value:.6g}" for name, value in values.items())]
        )


@torch.no_grad()
def alpha_summary(
    z1: Tensor,
    z2: Tensor,
    objective: str | Objective = "infonce",
    *,
    k: int = 8,
    bins: int = 40,
    distance_range: tuple[float, float] | None = None,
    **settings: Any,
) -> AlphaSummary:
    """Statistics of α in O(N·(D + k)) memory.

    They are entropy, effective number of negatives, hardest negatives, and α by distance.

    Args:
        z1: (N, D) embeddings of the first view (see `alphacl_fast.functional.alpha_cl_loss`).
        z2: (N, D) embeddings of the second view.
        objective: a name or an `Objective`.
        k: nearest negatives to keep per anchor, at least 1; fewer are kept where there are fewer.
        bins: bins of the histogram of d².
        distance_range: range of the histogram. None: (0, 2) for cosine, and otherwise the range of
            the batch's distances, which costs one more pass.
        **settings: the other arguments of `alpha_cl_loss`, except reduction, process_group and ids.

    Raises:
        TypeError, ValueError: see `alpha_cl_loss`; also for a bad k, bins or distance_range.

    Source: arXiv:2201.12680; alignment and uniformity: Wang and Isola, arXiv:2005.10242.
    """
    for name, value in (("k", k), ("bins", bins)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if (
        distance_range is not None
        and not -math.inf < distance_range[0] < distance_range[1] < math.inf
    ):
        raise ValueError(
            f"distance_range must be two finite numbers in order, got {distance_range!r}"
        )
    solved = Importances(z1, z2, objective, **settings)
    low, high = distance_range or _range(solved)
    rows, k = solved.rows, min(k, solved.n_neg)
    total, square, with_log = rows.new_zeros(3, solved.anchors)
    nearest = rows.new_full((solved.anchors, k), math.inf)
    of_nearest = torch.zeros_like(nearest)
    which = torch.zeros_like(nearest, dtype=torch.int64)

    def collect(tiles: Iterator[Tile]) -> tuple[Tensor, Tensor]:
        pairs = torch.zeros(bins, dtype=torch.int64, device=rows.device)
        mass = torch.zeros(bins, dtype=torch.float64, device=rows.device)
        for tile in tiles:
            i, a, d = slice(tile.start, tile.stop), tile.alpha, tile.distance
            total[i] += a.sum(1)
            square[i] += a.square().sum(1)
            with_log[i] += torch.xlogy(a, a).sum(1)
            for diagonal in tile.excluded:
                d.diagonal(diagonal).fill_(math.inf)
            best, at = d.topk(min(k, d.shape[1]), dim=1, largest=False)
            best, order = torch.cat([nearest[i], best], 1).sort(dim=1, stable=True)
            order = order[:, :k]
            nearest[i] = best[:, :k]
            of_nearest[i] = torch.cat([of_nearest[i], a.gather(1, at)], 1).gather(1, order)
            which[i] = torch.cat([which[i], at + tile.first], 1).gather(1, order)
            place = ((d - low) * (bins / (high - low))).nan_to_num_(nan=bins - 1)
            place = place.clamp_(0, bins - 1).long().flatten()
            pairs += torch.bincount(place, minlength=bins)
            pairs[-1] -= tile.n_excluded  # excluded pairs have an infinite distance here
            mass.scatter_add_(0, place, a.flatten().double())
        return pairs, mass

    pairs, mass = (torch.stack(parts).sum(0) for parts in zip(*solved.walk(collect), strict=True))
    weight = torch.where(total > 0, total, 1.0)
    return AlphaSummary(
        objective=str(solved.call.objective),
        n_neg=solved.n_neg,
        row_sum=total,
        entropy=torch.where(total > 0, weight.log() - with_log / weight, 0.0),
        effective_negatives=torch.where(
            total > 0, total.square() / torch.where(square > 0, square, 1.0), 0.0
        ),
        hardest=which,
        hardest_distance=nearest,
        hardest_alpha=of_nearest,
        edges=torch.linspace(low, high, bins + 1, dtype=torch.float64, device="cpu"),
        pairs=pairs,
        mass=mass,
        positive_similarity=solved.positive.mean().item(),
        alignment=alignment(z1, z2).item(),
        uniformity=uniformity(z1, z2).item(),
    )


def _range(solved: Importances) -> tuple[float, float]:
    if solved.call.similarity == "cosine":
        return 0.0, 2.0

    def extremes(tiles: Iterator[Tile]) -> tuple[float, float]:
        low, high = math.inf, -math.inf
        for tile in tiles:
            for diagonal in tile.excluded:
                tile.distance.diagonal(diagonal).fill_(math.nan)
            there = tile.distance[~tile.distance.isnan()]
            if there.numel():
                low, high = min(low, there.min().item()), max(high, there.max().item())
        return low, high

    lows, highs = zip(*solved.walk(extremes), strict=True)
    low, high = min(lows), max(highs)
    if not -math.inf < low <= high < math.inf:
        raise ValueError("distance_range must be given: distances of this batch are not finite")
    return low, high if high > low else low + 1.0
