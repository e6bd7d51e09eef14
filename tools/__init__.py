"""Builds the compiled backends, reads their machine code, measures on GPUs: what a checkout needs
and a wheel does not.

Each is a command, ``python -m tools.NAME`` at the top of a checkout. `build_cpu` and `build_cuda`
import the standard library alone, and setup.py loads them by path, because a build has neither
torch nor this folder on its path.
"""
