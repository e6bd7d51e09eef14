"""Backends: each a module with `row_sums`, `pair_grad` and `unsupported` (docs/design.md); they never import each other."""
