"""The packages' own tests of the losses that `alphacl_fast.compat` replaces, and what differs.

None of their files is here: `with_ours` takes checkouts of these repositories.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """Tests of one repository.

    Attributes:
        name: the folder of the checkout.
        repository: where it comes from.
        commit: the one whose results stand in docs/compat.md.
        tests: arguments of pytest, relative to the checkout.
        replaced: "module:class" of the package → "module:class" in `alphacl_fast.compat`.
        source: the folder of the checkout that holds the package.
        variants: environments, in each of which all tests run.
        differences: pattern of a test's name → why ours fails where theirs passes.
    """

    name: str
    repository: str
    commit: str
    tests: tuple[str, ...]
    replaced: dict[str, str]
    source: str = "."
    variants: tuple[dict[str, str], ...] = ({},)
    differences: dict[str, str] = field(default_factory=dict)


def _same_names(module: str, ours: str, *names: str) -> dict[str, str]:
    return {f"{module}:{name}": f"alphacl_fast.compat.{ours}:{name}" for name in names}


SUITES = (
    Suite(
        "lightly",
        "https://github.com/lightly-ai/lightly",
        "e8d317fc5a87f4387a85a35e689869039ec249ee",
        tuple(f"tests/loss/test_{name}_loss.py" for name in ("ntx_ent", "dcl", "macl")),
        _same_names(
            "lightly.loss", "lightly", "NTXentLoss", "DCLLoss", "DCLWLoss", "MACLLoss"
        ),
    ),
    Suite(
        "open_clip",
        "https://github.com/mlfoundations/open_clip",
        "89fb801f1e6087880e951fc8354b8a2077b79c6d",
        tuple(
            f"tests/test_{name}.py"
            for name in (
                "loss", "siglip_chunked_loss", "task_base_unit", "task_specific_unit",
                "task_compile", "factory_task",
            )
        ),
        _same_names("open_clip.loss", "open_clip", "ClipLoss", "SigLipLoss"),
        source="src",
    ),
    Suite(
        "pytorch-metric-learning",
        "https://github.com/KevinMusgrave/pytorch-metric-learning",
        "216a792c22b0154d3d3bf008a7317edc7d677e71",
        tuple(
            f"tests/losses/test_{name}_loss.py"
            for name in (
                "ntxent", "circle", "tuplet_margin", "multi_similarity", "self_supervised",
            )
        ),
        _same_names(
            "pytorch_metric_learning.losses",
            "pytorch_metric_learning",
            *("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "CircleLoss", "TupletMarginLoss"),
        ),
        source="src",
        variants=tuple(
            {"TEST_DEVICE": "cpu", "TEST_DTYPES": dtype}
            for dtype in ("float16", "float32", "float64")
        ),
        differences={
            "*::test_circle_loss[[]cpu][[]float16]": (
                "it expects the roundings of float16 arithmetic; ours computes in float32"
            ),
        },
    ),
    Suite(
        "sentence-transformers",
        "https://github.com/huggingface/sentence-transformers",
        "cad211983f36ce458e9b3360f3e11b29fc54cbd8",
        tuple(
            f"tests/sentence_transformer/losses/test_{name}.py"
            for name in (
                "adaptive_layer", "cached_gist_embed", "cached_mnsrl", "cmnrl", "gist_embed",
                "gradcache", "matryoshka", "merged_forward",
            )
        ),
        _same_names(
            "sentence_transformers.sentence_transformer.losses",
            "sentence_transformers",
            *("MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"),
            *("CachedMultipleNegativesRankingLoss", "GISTEmbedLoss", "CachedGISTEmbedLoss"),
            "CachedMultipleNegativesSymmetricRankingLoss",
        ),
        variants=({"ALPHACL_PEERS_TINY_MODEL": "1"},),
    ),
)  # fmt: skip
