"""Fused contrastive losses of the α-CL family (arXiv:2201.12680): exact, in O(N·D) memory.

Importing the package registers its operators. In the processes of ``alphacl`` a name is imported
when it is first used: torch takes seconds, which help and error messages do not need.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from . import functional, objectives, theory, zoo
    from .explicit_negatives import loss_against
    from .loss import FusedAlphaCLLoss
    from .matryoshka import MatryoshkaLoss
    from .metrics import BatchMetrics, alignment, batch_metrics, uniformity
    from .micro_batch import micro_batched
    from .objectives import MinPlayer, PairLoss, PairWeight
    from .ops import backends
    from .pair_weights import AlphaSummary, alpha, alpha_summary
    from .siglip import SigLipLoss, siglip_loss
    from .supcon import SupConLoss, supcon_loss
    from .verify import verify_distributed

#: Public name → the module that defines it, or its own name for a module.
_HOMES = {
    "AlphaSummary": "pair_weights",
    "BatchMetrics": "metrics",
    "FusedAlphaCLLoss": "loss",
    "MatryoshkaLoss": "matryoshka",
    "MinPlayer": "objectives",
    "PairLoss": "objectives",
    "PairWeight": "objectives",
    "SigLipLoss": "siglip",
    "SupConLoss": "supcon",
    "alignment": "metrics",
    "alpha": "pair_weights",
    "alpha_summary": "pair_weights",
    "backends": "ops",
    "batch_metrics": "metrics",
    "functional": "functional",
    "loss_against": "explicit_negatives",
    "micro_batched": "micro_batch",
    "objectives": "objectives",
    "siglip_loss": "siglip",
    "supcon_loss": "supcon",
    "theory": "theory",
    "uniformity": "metrics",
    "verify_distributed": "verify",
    "zoo": "zoo",
}

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
    "micro_batched",
    "objectives",
    "siglip_loss",
    "supcon_loss",
    "theory",
    "uniformity",
    "verify_distributed",
    "zoo",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOMES[name]}", __name__)
    value = module if _HOMES[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is ``alphacl``, or ``python -m`` with a module of this package."""
    starting = sys.argv[:1] == ["-m"]  # Python looks for the module that it is to run
    ours = any(argument.startswith("alphacl_fast") for argument in sys.orig_argv)
    return "alphacl_cli" in sys.modules or (starting and ours)


if not _is_command():
    for _name in _HOMES:
        __getattr__(_name)
