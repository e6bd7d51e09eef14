"""Read what the compiler made of a kernel, without a GPU: registers, spills, shared memory, …

ptxas serialises the warp-group products of many tile shapes ("wgmma.mma_async instructions are
serialized") without an error and often without a spill. Every product is then waited for. This
module shows such a shape before it is timed. Kernels must be compiled functions: the interpreter
(TRITON_INTERPRET=1) leaves nothing to look at.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils._pytree import tree_map

_PTX_MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
_OPCODE = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE
)
_KB = 1024


class Limits(NamedTuple):
    """Bytes of shared memory that a block may have, and what fits on a multiprocessor (SM)."""

    shared_per_block: int
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32


_LIMITS = {
    80: Limits(163 * _KB),
    86: Limits(99 * _KB, 1536, 16),
    89: Limits(99 * _KB, 1536, 24),
    90: Limits(227 * _KB),
    100: Limits(227 * _KB),
    120: Limits(99 * _KB, 1536, 24),
}


def limits(capability: int) -> Limits:
    """Limits of a compute capability (80, 86, 89, 90, 100, 120); ValueError for another."""
    if capability not in _LIMITS:
        raise ValueError(f"capability must be one of {sorted(_LIMITS)}, got {capability!r}")
    return _LIMITS[capability]


@dataclass(frozen=True)
class Resources:
    """A compiled kernel.

    Attributes:
        name: name of its entry.
        capability: compute capability that it was compiled for.
        shared: bytes per block, dynamic and static.
        threads: threads per block, all warps of a warp-specialised kernel included.
        registers: registers per thread, as ptxas allots them (a warp-specialised kernel
            redistributes them when it runs).
        spill_bytes: bytes of stores and loads of spilled registers, per thread.
        stack: bytes of local memory per thread.
        serialized: whether ptxas made every warp-group product wait for the one before.
        opcodes: number of machine instructions by full name (LDG.E.128, MUFU.EX2, …).
        ptx_mma: number of matrix instructions in the PTX, by kind; absent kinds are left out.
        tensor_memory: columns (Blackwell).
        warnings: warnings of ptxas.
        ptx: the program.
    """

    name: str
    capability: int
    shared: int
    threads: int
    registers: int
    spill_bytes: int = 0
    stack: int = 0
    serialized: bool = False
    opcodes: dict[str, int] = field(default_factory=dict)
    ptx_mma: dict[str, int] = field(default_factory=dict)
    tensor_memory: int = 0
    warnings: tuple[str, ...] = ()
    ptx: str = field(default="", repr=False)

    @property
    def instructions(self) -> Counter[str]:
        """Number of machine instructions by name without modifiers (HGMMA, FFMA, MUFU, …)."""
        counts: Counter[str] = Counter()
        for opcode, number in self.opcodes.items():
            counts[opcode.split(".")[0]] += number
        return counts

    def count(self, pattern: str) -> int:
        r"""Count the instructions whose full name contains a pattern such as r"^LDG\..*128"."""
        return sum(number for opcode, number in self.opcodes.items() if re.search(pattern, opcode))


def compile_for(
    fn: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    capability: int,
    *,
    attrs: Mapping[tuple[int, ...], list[list[Any]]] | None = None,
    divisible: Collection[str] = (),
    **options: Any,
) -> Resources:
    """Compiles a `triton.jit` function ahead of time for a compute capability.

    Args:
        fn: the function.
        signature: type of every run-time argument by name ("*bf16", "i32", "fp32",
            "tensordesc<…>"), or a (named) tuple of types, None for what is None in a launch.
        constexprs: values by name; a value may itself be a jitted function.
        capability: the compute capability.
        attrs: as `triton.compiler.ASTSource` takes them. By default every pointer is divisible by
            16, as a fresh allocation is.
        divisible: names of arguments that are also divisible by 16, as a launch finds out of an
            integer's value.
        options: options of the launch (num_warps, num_stages, maxnreg).

    Raises:
        TypeError: not a compiled function.
        ValueError: an argument is missing or unknown, or ptxas refuses the kernel.
        Exception: compiler errors of Triton come through.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(fn, JITFunction):
        raise TypeError(
            f"fn must be a jitted function, got {type(fn).__name__} (is TRITON_INTERPRET set?)"
        )
    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(given) != set(fn.arg_names):
        raise ValueError(
            f"arguments of {fn.__name__} must be {sorted(fn.arg_names)}, got {sorted(given)}"
        )
    at = {name: (i,) for i, name in enumerate(fn.arg_names)}
    if not set(divisible) <= at.keys():
        known = f"arguments of {fn.__name__} ({sorted(at)})"
        raise ValueError(f"divisible must name {known}, got {sorted(divisible)}")
    types = dict(leaf for name, path in at.items() for leaf in _leaves(given[name], path))
    constants = {at[name]: value for name, value in constexprs.items()}
    constants |= {path: None for path, kind in types.items() if kind is None}
    if attrs is None:
        named = {at[name] for name in divisible}
        aligned = [path for path, kind in types.items() if path in named or "*" in (kind or "")]
        attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    ordered = {
        name: tree_map(lambda kind: kind or "constexpr", given[name]) for name in fn.arg_names
    }
    source = ASTSource(fn, ordered, constants, dict(attrs))
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return inspect_ptx(
        kernel.asm["ptx"],
        capability,
        shared=kernel.metadata.shared,
        threads=32 * kernel.metadata.num_warps,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
    )


def _leaves(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str | None]]:
    """Every type of an argument with its path, which begins with the argument's number."""
    if isinstance(kind, tuple):
        for i, member in enumerate(kind):
            yield from _leaves(member, (*path, i))
    else:
        yield path, kind


def inspect_ptx(
    ptx: str, capability: int, *, shared: int, threads: int, tensor_memory: int = 0
) -> Resources:
    """Assembles PTX as Triton does and reads the result.

    ``shared`` is the dynamic shared memory of a launch in bytes.

    Raises ValueError with ptxas' words if it refuses the program.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        target = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", target, str(source), "-o", str(cubin)]
        assembled = subprocess.run(command, capture_output=True, text=True)
        if assembled.returncode:
            raise ValueError(f"ptxas {target} failed: {assembled.stderr.strip()}")
        log = assembled.stderr + assembled.stdout
        # opcodes need no analysis of the data flow
        command = [knobs.nvidia.nvdisasm.path, "-ndf", "-c", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said = ptxas_log(log)
    return Resources(
        name=re.search(r"\.entry\s+([\w$]+)", ptx)[1],
        capability=capability,
        shared=shared + said.pop("static"),
        threads=threads,
        **said,
        serialized="serialized" in log,
        opcodes=dict(Counter(_OPCODE.findall(sass)).most_common()),
        ptx_mma={kind: ptx.count(kind) for kind in _PTX_MMA if kind in ptx},
        tensor_memory=tensor_memory,
        warnings=tuple(re.findall(r".*(?:warning|Potential Performance).*", log)),
        ptx=ptx,
    )


def ptxas_log(log: str) -> dict[str, int]:
    """What ptxas says of one kernel, in numbers; "static" is its shared memory."""
    return {
        name: sum(map(int, re.findall(pattern, log)))
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spill_bytes", r"(\d+) bytes spill (?:stores|loads)"),
            ("static", r"(\d+) bytes smem"),
        )
    }


def occupancy(resources: Resources) -> int:
    """Blocks that fit on one SM at a time; 0 if a single one does not."""
    sm = limits(resources.capability)
    if resources.shared > sm.shared_per_block or resources.registers > 255:
        return 0
    warps = -(-resources.threads // 32)
    # Registers are allotted to a warp in units of 256, of 65,536.
    registers = -(-max(resources.registers, 1) * 32 // 256) * warps
    # An SM has 1 KB more than a block may have, and each block has 1 KB of the system's.
    shared = (sm.shared_per_block + _KB) // (resources.shared + _KB)
    columns = 512 // (resources.tensor_memory or 1)
    return min(
        sm.blocks_per_sm, sm.threads_per_sm // (32 * warps), 256 // registers, shared, columns
    )


def described(found: Resources, matrix: str, required: bool) -> dict[str, Any]:
    """A kernel's line of the tables that `report` prints.

    Args:
        found: the kernel.
        matrix: regular expression of its matrix instructions.
        required: whether there must be any.
    """
    fit, products = occupancy(found), found.count(matrix)
    checks = {
        f"spills {found.spill_bytes} bytes": found.spill_bytes,
        f"a stack frame of {found.stack} bytes": found.stack,
        "serialised wgmma": found.serialized,
        f"does not fit with {found.shared} bytes of shared memory": not fit,
        f"no {matrix} instruction": required and not products,
    }
    return {
        "registers": found.registers, "shared": found.shared, "blocks per SM": fit,
        "matrix": products, "MUFU": found.count("^MUFU"), "instructions": found.count(""),
        "problems": [problem for problem, met in checks.items() if met],
    }  # fmt: skip


def report(rows: list[dict[str, Any]], failed: Collection[str] = ()) -> int:
    """Print a line for each kernel, then what is wrong; returns the exit status."""
    failed = list(failed)
    for row in rows:
        problems = row.pop("problems")
        line = ", ".join(f"{name} {value}" for name, value in row.items())
        print(line)
        failed += [f"{line}: {', '.join(problems)}"] if problems else []
    print(f"{len(rows)} kernels compiled, {len(failed)} with problems", *failed, sep="\n")
    return int(bool(failed))
