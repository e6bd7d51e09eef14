"""Drop-in replacements for the in-batch losses of ``sentence_transformers.losses``.

The module path of release 6 is ``sentence_transformers.sentence_transformer.losses``.
The other losses of `_EMBEDDING` embed with the package's own code, so the package is imported when
one of these names is used, and no earlier.
"""

from typing import Any

from .ranking import MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss

__all__ = ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"]

#: What needs the package.
_EMBEDDING = (
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
)


def __getattr__(name: str) -> Any:
    if name not in _EMBEDDING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import embedding
    except ImportError as error:
        raise ImportError(
            f"{name} needs sentence-transformers 6 or newer, with which it embeds"
        ) from error
    return getattr(embedding, name)
