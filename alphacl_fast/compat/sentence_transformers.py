"""Drop-in replacements for the in-batch losses of ``sentence_transformers.losses``.

The module path of release 6 is ``sentence_transformers.sentence_transformer.losses``.
`CachedMultipleNegativesRankingLoss` and `GISTEmbedLoss` embed with the package's own code, so the
package is imported when one of these two names is used, and no earlier.
"""

from typing import Any

from .ranking import MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss

__all__ = ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"]


def __getattr__(name: str) -> Any:
    if name not in ("CachedMultipleNegativesRankingLoss", "GISTEmbedLoss"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import embedding
    except ImportError as error:
        raise ImportError(
            f"{name} needs sentence-transformers 6 or newer, with which it embeds"
        ) from error
    return getattr(embedding, name)
