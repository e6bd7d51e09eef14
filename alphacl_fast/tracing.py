"""Marks on functions for torch.compile, made without torch._dynamo.

`torch.compiler.disable` and `torch.compiler.assume_constant_result` import torch._dynamo where they
decorate a function, and that takes several times as long as the rest of this package. Only who
compiles needs it.
"""

from collections.abc import Callable
from typing import TypeVar

from torch._compile import _disable_dynamo  # how PyTorch marks its own optimizers

F = TypeVar("F", bound=Callable)


def breaks_the_graph(function: F) -> F:
    """As `torch.compiler.disable`; the first call imports torch._dynamo."""
    return _disable_dynamo(function)


def constant_in_a_graph(function: F) -> F:
    """As `torch.compiler.assume_constant_result`."""
    function._dynamo_marked_constant = True
    return function
