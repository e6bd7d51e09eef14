"""The rows of the paper's comparison: objectives and their options."""

from typing import NamedTuple


class Row(NamedTuple):
    """A row of the table: an objective and its options."""

    objective: str
    option: dict


ROWS = {
    # The quadratic loss: every negative pair has the same weight.
    "uniform": Row("uniform", {}),
    # InfoNCE as in SimCLR (ε = 1).
    "infonce": Row("infonce", {}),
    # r_H, the entropy regulariser: α is a softmax.
    "alpha_entropy": Row("alpha_entropy", {}),
    # r_s, solved exactly (the authors' code is off by one here).
    "alpha_square": Row("alpha_square", {}),
    # r_γ as the authors' code computes it.
    "alpha_inverse": Row("alpha_inverse", {}),
    # "backprop α(θ)", read as alpha_entropy without the stop-gradient.
    "backprop": Row("alpha_entropy", {"detach_alpha": False}),
    # α-CL-direct, p = 4; rows of α sum to 1.
    "alpha_direct": Row("alpha_direct", {"exponent": 4}),
    # The same without normalisation, as in the author's ResNet-50 log.
    "alpha_direct_raw": Row("alpha_direct", {"exponent": 4, "normalized": False}),
    # r_γ solved exactly: practically uniform at temperature 0.5.
    "alpha_gamma": Row("alpha_gamma", {}),
}
#: Default rows; the others nearly repeat ``alpha_direct`` and ``uniform``.
DEFAULT_ROWS = tuple(name for name in ROWS if name not in ("alpha_direct_raw", "alpha_gamma"))
# Fields that differ between the runs of a table, or make no sense for most rows.
OF_A_ROW = ("recipe", "objective", "option", "seed", "learn_temperature")
