"""Fused contrastive losses of the α-CL family (arXiv:2201.12680): exact, in O(N·D) memory."""

import pathlib as _pathlib

from . import functional, objectives
from .loss import FusedAlphaCLLoss
from .objectives import MinPlayer, PairLoss, PairWeight
from .ops import backends

__version__ = "0.1.0"
__all__ = ["FusedAlphaCLLoss", "MinPlayer", "PairLoss", "PairWeight", "backends", "functional", "objectives"]

# `kernels/` stands at the top of the source tree and is installed as alphacl_fast.kernels. In a source checkout or an
# editable install the folder is not beside this file, so the package's search path is extended by the root.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))
