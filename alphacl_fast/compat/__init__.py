"""The losses of other packages under their own names and signatures: change one import, keep everything else::

    from alphacl_fast.compat.lightly import NTXentLoss                  # lightly.loss
    from alphacl_fast.compat.open_clip import ClipLoss                  # open_clip
    from alphacl_fast.compat.pytorch_metric_learning import SupConLoss  # pytorch_metric_learning.losses
    from alphacl_fast.compat.sentence_transformers import MultipleNegativesRankingLoss  # sentence_transformers.losses

None of them needs the package whose place it takes. An argument that is not served raises and says so. Values and gradients
are held against the packages themselves in tests/test_compat.py.
"""
