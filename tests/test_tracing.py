"""Marks for torch.compile, and that nothing else imports a compiler."""

import subprocess
import sys
import textwrap

import pytest
import torch

from alphacl_fast.tracing import breaks_the_graph, constant_in_a_graph


def test_steps_without_a_compiler():
    """What torch.compile needs takes longer to import than all of the package."""
    code = """
        import sys

        import torch

        of_torch = set(sys.modules)
        import alphacl_fast
        from alphacl_fast.functional import alpha_cl_loss

        z1, z2 = torch.randn(2, 8, 16, requires_grad=True)
        alphacl_fast.FusedAlphaCLLoss("alpha_direct")(z1, z2).backward()
        alphacl_fast.supcon_loss(z1, torch.arange(8) % 4).backward()
        alphacl_fast.loss_against(z1, torch.randn(5, 16), torch.randn(8)).backward()
        alphacl_fast.siglip_loss(z1, z2).backward()
        for backend in ("auto", "blocked", "reference"):
            alpha_cl_loss(z1, z2, backend=backend).backward()
        heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
        print(sorted(heavy & set(sys.modules) - of_torch))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_a_function_that_breaks_the_graph(fresh_dynamo):
    traced = []

    @breaks_the_graph
    def on_the_host(x):
        traced.append(torch.compiler.is_compiling())
        return x + x.sum().item()

    def around(x):
        return on_the_host(x * 2) * 3

    x = torch.ones(4)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(around, backend="eager", fullgraph=True)(x)
    assert torch.compile(around, backend="eager")(x).equal(around(x))
    assert traced == [False, False]


def test_a_function_that_is_constant_in_a_graph(fresh_dynamo):
    calls = []

    @constant_in_a_graph
    def of_the_machine():
        calls.append(None)
        return len(str(vars(sys)))

    def around(x):
        return x * of_the_machine()

    x = torch.ones(4)
    compiled = torch.compile(around, backend="eager", fullgraph=True)
    assert compiled(x).shape == compiled(x + 1).shape == (4,)
    assert len(calls) == 1
