"""Backends: each a module with `row_sums`, `pair_grad` and `unsupported` (docs/design.md).

They never import each other.
"""
