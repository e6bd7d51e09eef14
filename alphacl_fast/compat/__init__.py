"""Drop-in replacements for other packages' losses: change one import, keep everything else::

    from alphacl_fast.compat.lightly import NTXentLoss  # lightly.loss
    from alphacl_fast.compat.open_clip import ClipLoss  # open_clip
    # pytorch_metric_learning.losses
    from alphacl_fast.compat.pytorch_metric_learning import SupConLoss
    # sentence_transformers.losses
    from alphacl_fast.compat.sentence_transformers import MultipleNegativesRankingLoss

The original packages need not be installed. Unsupported arguments raise an error that names them.
tests/test_compat.py compares values and gradients with the original packages.
"""
