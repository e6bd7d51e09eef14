"""A lean SimCLR-style training loop around :class:`alphacl_fast.FusedAlphaCLLoss`::

    from alphacl_fast.train import Config, evaluate, train

    train(Config.create(dataset="digits", objective="alpha_direct"), "runs/digits")
    evaluate("runs/digits")

``torchrun --nproc-per-node=N -m alphacl_fast.train …`` trains with N processes that share every
batch.

Modules import one way: config, rows, evidence_table; storage, process_context, data, augment,
digit_augmentation, device_augmentation, models, weights, sync_batch_norm, gradient,
gradient_average, device, schedules, optimizers, callbacks, checkpoint; report, evidence_report;
recipe; evaluation; moco, supervised, image_text; recipes; inspection; loop; reproduce, speedrun,
evidence.

As in `alphacl_fast`, a name is imported when it is first used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .callbacks import Callback
    from .checkpoint import is_run, saved_config
    from .config import Config, RunError
    from .evaluation import evaluate
    from .inspection import inspect
    from .loop import Outcome, train

#: Public name → the module that defines it.
_HOMES = {
    "Callback": "callbacks",
    "Config": "config",
    "Outcome": "loop",
    "RunError": "config",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "is_run": "checkpoint",
    "saved_config": "checkpoint",
    "train": "loop",
}
#: Module → its package in the registry.
_PACKAGES = {
    "numpy": "numpy",
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "PIL": "pillow",
}

__all__ = [
    "Callback",
    "Config",
    "Outcome",
    "RunError",
    "evaluate",
    "inspect",
    "is_run",
    "saved_config",
    "train",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"alphacl_fast.train needs more packages: pip install {' '.join(missing)}"
        )
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
