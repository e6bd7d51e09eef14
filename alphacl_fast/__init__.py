"""Fused contrastive losses of the α-CL family (arXiv:2201.12680): exact, in O(N·D) memory."""

from . import functional, objectives, theory, zoo
from ._version import __version__
from .explicit_negatives import loss_against
from .loss import FusedAlphaCLLoss
from .matryoshka import MatryoshkaLoss
from .metrics import BatchMetrics, alignment, batch_metrics, uniformity
from .objectives import MinPlayer, PairLoss, PairWeight
from .ops import backends
from .pair_weights import AlphaSummary, alpha, alpha_summary
from .siglip import SigLipLoss, siglip_loss
from .supcon import SupConLoss, supcon_loss
from .verify import verify_distributed

__all__ = [
    "AlphaSummary",
    "BatchMetrics",
    "FusedAlphaCLLoss",
    "MatryoshkaLoss",
    "MinPlayer",
    "PairLoss",
    "PairWeight",
    "SigLipLoss",
    "SupConLoss",
    "__version__",
    "alignment",
    "alpha",
    "alpha_summary",
    "backends",
    "batch_metrics",
    "functional",
    "loss_against",
    "objectives",
    "siglip_loss",
    "supcon_loss",
    "theory",
    "uniformity",
    "verify_distributed",
    "zoo",
]
