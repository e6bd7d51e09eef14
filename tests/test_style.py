"""Rules for the source that no linter has."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_POSITIONAL = 10


def test_no_function_takes_many_positional_parameters():
    """Facts travel by name; kernels are excepted, since Triton passes what they read one by one."""
    files = [
        *(
            file
            for top in ("alphacl_fast", "benchmarks", "tools")
            for file in (ROOT / top).rglob("*.py")
        ),
        *ROOT.glob("*.py"),
    ]
    assert len(files) > 50
    functions = (
        (file, node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    )
    long = {
        f"{file.relative_to(ROOT)}:{node.lineno}": count
        for file, node in functions
        if (count := len(node.args.posonlyargs) + len(node.args.args)) > MOST_POSITIONAL
    }
    assert not long
