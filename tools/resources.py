"""What the compiler makes of a kernel, without a GPU: registers, spills, shared memory, instructions, occupancy.

ptxas serialises the warp-group products of many tile shapes ("wgmma.mma_async instructions are serialized") without an
error and often without a spill, so that every product is waited for; this is where such a shape shows before it is timed.
Kernels must be compiled functions: the interpreter (TRITON_INTERPRET=1) leaves nothing to look at.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_PTX_MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor (SM) has, and what a block may take of it; bytes and 32-bit registers."""

    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    tensor_memory_columns: int = 0


_KB = 1024
_LIMITS = {
    80: Limits(163 * _KB, 164 * _KB, 2048, 32),
    86: Limits(99 * _KB, 100 * _KB, 1536, 16),
    89: Limits(99 * _KB, 100 * _KB, 1536, 24),
    90: Limits(227 * _KB, 228 * _KB, 2048, 32),
    100: Limits(227 * _KB, 228 * _KB, 2048, 32, tensor_memory_columns=512),
}


def limits(capability: int) -> Limits:
    """Limits of a compute capability (80, 86, 89, 90, 100); ValueError for another."""
    if capability not in _LIMITS:
        raise ValueError(f"capability must be one of {sorted(_LIMITS)}, got {capability!r}")
    return _LIMITS[capability]


@dataclass(frozen=True)
class Resources:
    """A compiled kernel.

    Attributes:
        registers: per thread, as ptxas allots them (a warp-specialised kernel redistributes them when it runs).
        spill_bytes: stores and loads of spilled registers, per thread; stack: bytes of local memory per thread.
        shared: bytes per block, dynamic and static; tensor_memory: columns (Blackwell).
        threads: per block, all warps of a warp-specialised kernel included.
        serialized: ptxas made every warp-group product wait for the one before.
        instructions: number of machine instructions by name without modifiers (HGMMA, FFMA, MUFU, …) and in "total".
        opcodes: the same by full name (LDG.E.128, MUFU.EX2, …), for `count`.
        ptx_mma: number of matrix instructions in the PTX, by kind; absent kinds are left out.
        warnings: what ptxas had to say; ptx, sass: the texts.
    """

    name: str
    capability: int
    registers: int
    spill_bytes: int
    stack: int
    shared: int
    threads: int
    serialized: bool
    instructions: dict[str, int]
    opcodes: dict[str, int]
    ptx_mma: dict[str, int]
    tensor_memory: int = 0
    warnings: tuple[str, ...] = ()
    ptx: str = field(default="", repr=False)
    sass: str = field(default="", repr=False)

    def count(self, pattern: str) -> int:
        r"""Number of instructions whose full name contains a regular expression, as in ``count(r"^LDG\..*128")``."""
        return sum(number for opcode, number in self.opcodes.items() if re.search(pattern, opcode))


def compile_for(
    fn: JITFunction,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    attrs: Mapping[tuple[int, ...], list[list[Any]]] | None = None,
    divisible: Collection[str] = (),
) -> Resources:
    """Compiles a `triton.jit` function ahead of time for a compute capability.

    Args:
        signature: type of every run-time argument by name ("*bf16", "i32", "fp32", "tensordesc<…>"), or a (named) tuple of
            types, None for what is None in a launch; constexprs may be listed as "constexpr" or left out.
        constexprs: values by name; a value may itself be a jitted function.
        attrs: as `triton.compiler.ASTSource` takes them. By default every pointer is divisible by 16, as a fresh allocation
            is, and so are the arguments named in ``divisible``, as a launch finds out of an integer's value.

    Raises:
        TypeError: not a compiled function. ValueError: an argument is missing or unknown, or ptxas refuses the kernel.
        Compiler errors of Triton come through.
    """
    if not isinstance(fn, JITFunction):
        raise TypeError(f"fn must be a jitted function, got {type(fn).__name__} (is TRITON_INTERPRET set?)")
    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(given) != set(fn.arg_names):
        raise ValueError(f"arguments of {fn.__name__} must be {sorted(fn.arg_names)}, got {sorted(given)}")
    if not set(divisible) <= set(fn.arg_names):
        raise ValueError(f"divisible must name arguments of {fn.__name__} ({sorted(fn.arg_names)}), got {sorted(divisible)}")
    types = dict(leaf for i, name in enumerate(fn.arg_names) for leaf in _leaves(given[name], (i,)))
    constants = {(fn.arg_names.index(name),): value for name, value in constexprs.items()}
    constants |= {path: None for path, kind in types.items() if kind is None}
    if attrs is None:
        named = {(fn.arg_names.index(name),) for name in divisible}
        aligned = [path for path, kind in types.items() if path in named or (kind or "").startswith("*")]
        attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    ordered = {name: _with_constants(given[name]) for name in fn.arg_names}
    source = ASTSource(fn, ordered, constants, dict(attrs))
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
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


def _with_constants(kind: Any) -> Any:
    """A type with "constexpr" in the place of None."""
    if not isinstance(kind, tuple):
        return "constexpr" if kind is None else kind
    members = [_with_constants(member) for member in kind]
    return type(kind)(*members) if hasattr(kind, "_fields") else tuple(members)


def inspect_ptx(ptx: str, capability: int, *, shared: int, threads: int, tensor_memory: int = 0) -> Resources:
    """Assembles PTX as Triton does and reads the result; ``shared`` is the dynamic shared memory of a launch in bytes.

    Raises ValueError with ptxas' words if it refuses the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        target = f"--gpu-name={sm_arch_from_capability(capability)}"
        assembled = subprocess.run(
            [get_ptxas(capability).path, "-v", target, str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        if assembled.returncode:
            raise ValueError(f"ptxas {target} failed: {assembled.stderr.strip()}")
        log = assembled.stderr + assembled.stdout
        disassembler = knobs.nvidia.nvdisasm.path
        sass = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    opcodes = Counter(_OPCODE.findall(sass))
    instructions: Counter[str] = Counter()
    for opcode, number in opcodes.items():
        instructions[opcode.split(".")[0]] += number
    warnings = tuple(line for line in log.splitlines() if "warning" in line or "Potential Performance" in line)
    return Resources(
        name=re.search(r"\.entry\s+([\w$]+)", ptx)[1],
        capability=capability,
        registers=_number(log, r"Used (\d+) registers"),
        spill_bytes=_number(log, r"(\d+) bytes spill stores") + _number(log, r"(\d+) bytes spill loads"),
        stack=_number(log, r"(\d+) bytes stack frame"),
        shared=shared + _number(log, r"(\d+) bytes smem"),
        threads=threads,
        serialized="serialized" in log,
        instructions={"total": opcodes.total(), **dict(instructions.most_common())},
        opcodes=dict(opcodes.most_common()),
        ptx_mma={kind: ptx.count(kind) for kind in _PTX_MMA if kind in ptx},
        tensor_memory=tensor_memory,
        warnings=warnings,
        ptx=ptx,
        sass=sass,
    )


def _number(log: str, pattern: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0


def occupancy(resources: Resources, capability: int | None = None) -> int:
    """Blocks that fit on one SM at a time; 0 if a single one does not."""
    sm = limits(resources.capability if capability is None else capability)
    warps = -(-resources.threads // 32)
    registers = -(-max(resources.registers, 1) * 32 // 256) * 256 * warps  # allotted to a warp in units of 256
    shared = resources.shared + 1024  # each block has 1 KB of the system's
    if resources.shared > sm.shared_per_block or resources.registers > sm.registers_per_thread:
        return 0
    fit = [sm.blocks_per_sm, sm.threads_per_sm // (32 * warps), sm.registers_per_sm // registers, sm.shared_per_sm // shared]
    if resources.tensor_memory:
        fit.append(sm.tensor_memory_columns // resources.tensor_memory)
    return min(fit)
