"""Drop-in replacements for other packages' losses: change one import, keep everything else::

    from alphacl_fast.compat.lightly import NTXentLoss  # lightly.loss
    from alphacl_fast.compat.open_clip import ClipLoss, SigLipLoss  # open_clip.loss
    # pytorch_metric_learning.losses
    from alphacl_fast.compat.pytorch_metric_learning import NTXentLoss, SupConLoss
    # sentence_transformers.losses
    from alphacl_fast.compat.sentence_transformers import MultipleNegativesRankingLoss
    from alphacl_fast.compat.supcontrast import SupConLoss  # HobbitLong/SupContrast
    from alphacl_fast.compat.info_nce import InfoNCE  # info_nce

docs/compat.md lists what is served. tests/test_contract.py compares signatures, attributes, values
and gradients with the original packages.
"""
