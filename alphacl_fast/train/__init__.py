"""A lean SimCLR-style training loop around :class:`alphacl_fast.FusedAlphaCLLoss`::

    from alphacl_fast.train import Config, evaluate, train

    train(Config.create(dataset="digits", objective="alpha_direct"), "runs/digits")
    evaluate("runs/digits")

``torchrun --nproc-per-node=N -m alphacl_fast.train …`` trains with N processes that share every
batch.

Modules import one way: config, rows; storage, process_context, data, augment, device_augmentation,
models, gradient, device, checkpoint; report; evaluate; inspection; loop; reproduce.
"""

from importlib.util import find_spec

_EXTRA = {
    "numpy": "numpy",
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "PIL": "pillow",
}
_missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
if _missing:
    raise ImportError(f"alphacl_fast.train needs more packages: pip install {' '.join(_missing)}")

from .checkpoint import is_run, saved_config  # noqa: E402
from .config import Config, RunError  # noqa: E402
from .evaluate import evaluate  # noqa: E402
from .inspection import inspect  # noqa: E402
from .loop import Outcome, train  # noqa: E402

__all__ = [
    "Config",
    "Outcome",
    "RunError",
    "evaluate",
    "inspect",
    "is_run",
    "saved_config",
    "train",
]
