"""Fused contrastive losses of the α-CL family (arXiv:2201.12680): exact, in O(N·D) memory."""

import pathlib as _pathlib

from . import functional, objectives, theory
from ._version import __version__
from .explicit_negatives import loss_against, supcon_loss
from .loss import FusedAlphaCLLoss
from .objectives import MinPlayer, PairLoss, PairWeight
from .ops import backends
from .pair_weights import AlphaSummary, alpha, alpha_summary
from .verify import verify_distributed

__all__ = [
    "AlphaSummary",
    "FusedAlphaCLLoss",
    "MinPlayer",
    "PairLoss",
    "PairWeight",
    "__version__",
    "alpha",
    "alpha_summary",
    "backends",
    "functional",
    "loss_against",
    "objectives",
    "supcon_loss",
    "theory",
    "verify_distributed",
]

# `kernels/` stands at the top of the source tree and is installed as alphacl_fast.kernels. In a source checkout or an
# editable install the folder is not beside this file, so the package's search path is extended by the root.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))
