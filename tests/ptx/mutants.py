"""Plants defects in the PTX of kernels; a case must find each one.

    python tests/ptx/mutants.py [--short]

prints a line for each, with what found it: a hazard, a fault or an error of the numbers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # the imports below read it
    os.environ.pop("TRITON_INTERPRET", None)
for _folder in (Path(__file__).parents[2], Path(__file__).parents[1]):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import torch  # noqa: E402
from ptx import calls, cases, run  # noqa: E402
from ptx.runner import Runner  # noqa: E402

Change = Callable[[str], str | None]


@dataclass(frozen=True)
class Mutant:
    name: str
    case: cases.Case
    kernel: str  # in the kernel's name
    change: Change  # of the kernel's text; None where there is nothing to change
    short: bool = False


def sub(pattern: str, replacement: str, number: int = 0) -> Change:
    """Replaces one match of a pattern, counted from 0."""

    def change(text: str) -> str | None:
        found = list(re.finditer(pattern, text))
        if number >= len(found):
            return None
        match = found[number]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return change


def each(pattern: str, replacement: str) -> Change:
    """Replaces every match of a pattern."""
    return lambda text: re.sub(pattern, replacement, text)


def removed(instruction: str, number: int = 0) -> Change:
    return sub(rf"\n\s*(?:@%p\d+ )?{instruction}[^;]*;", "\n", number)


def expected_bytes(text: str) -> str | None:
    """The stages' barrier expects half of the bytes."""
    found = re.findall(r"expect_tx\.shared::cta\.b64 _, \[%r\d+\], (%r\d+);", text)
    return sub(rf"(mov\.\w+\s+{found[-1]}, )(\d+);", r"\g<1>8192;")(text) if found else None


def one_tile_less(text: str) -> str | None:
    """The longest loop ends one round early."""
    lines, labels, loops = text.splitlines(), {}, []
    for k, line in enumerate(lines):
        if label := re.match(r"(\$L\w+):", line):
            labels[label[1]] = k
        branch = re.search(r"@(%p\d+) bra\s+(\$L\w+)", line)
        if branch and branch[2] in labels:
            loops.append((k - labels[branch[2]], k, branch[1]))
    if not loops:
        return None
    _, end, predicate = max(loops)
    test = rf"setp\.(ne|lt|gt|ge|eq)\.(s32|s64) \t?{predicate}, (%\w+), (%?\w+);"
    for k in range(end, 0, -1):
        if found := re.search(test, lines[k]):
            how, kind, left, right = found.groups()
            width = kind[1:]
            lines[k] = (
                f"{{ .reg .b{width} m; add.{kind} m, {left}, 1; "
                f"setp.{how}.{kind} {predicate}, m, {right}; }}"
            )
            return "\n".join(lines)
    return None


def half_a_warp(text: str) -> str | None:
    """A shuffle by sixteen lanes."""
    guard = "{ .reg .pred q; .reg .b32 l; mov.u32 l, %laneid; setp.lt.u32 q, l, 16; @q "
    return sub(r"(shfl\.sync\.bfly[^;]*;)", guard + r"\1 }")(text)


def behind_a_branch(text: str) -> str | None:
    """A shuffle that half of the lanes jump over."""
    guard = "{ .reg .pred q; .reg .b32 l; mov.u32 l, %laneid; setp.lt.u32 q, l, 16; @q bra over; "
    return sub(r"(shfl\.sync\.bfly[^;]*;)", guard + r"\1\nover:\n}")(text)


# --- the table ------------------------------------------------------------------------------------

_HOPPER = cases.Case("cuda", "90a", 75, 64, cases.BF16)
_RING = replace(_HOPPER, pairs=330, multiprocessors=2)  # more tiles than stages
_HALF = replace(_HOPPER, dtype=cases.FP16)
_FAR = cases.far_apart(_HALF, False)
_TURNED = replace(_HOPPER, dtype=cases.FP32, precision="tf32")  # columns that are transposed
_ONE_WAY = cases.in_one_direction(_TURNED)
_AMPERE = replace(_HOPPER, arch="80", symmetric=False)
_CHUNKS = replace(_AMPERE, dim=264)
_IEEE = replace(_AMPERE, dtype=cases.FP32, precision="ieee")
_TF32 = replace(_AMPERE, pairs=4, dim=32, dtype=cases.FP32, precision="tf32",
                call=calls.rectangle, sides=(3, 3))  # fmt: skip
_ONLINE = replace(_IEEE, tau=8.0, setting={"similarity": "dot"})
_TRITON = cases.Case("triton", "90", 75, 64, cases.BF16)
_TRITON80 = replace(_TRITON, arch="80")
_GRAD, _SUMS = "hopper8PairGradILi64ELb1", "hopper7RowSumsILi64ELb1"
_FAST_GRAD, _FAST_SUMS = "FastPairGradINS1_4HalfILi64", "FastRowSumsINS1_4HalfILi64"
_DESCRIPTOR = 4611686293305294848  # 128-byte swizzle, groups of eight rows 1024 bytes apart
_CLOSER = str(_DESCRIPTOR - (32 << 32))
_PACK = sub(r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%\w+), (%\w+)", r"\1, \3, \2")
_SHUFFLED = r"(shfl\.sync\.bfly\.b32\s+[^,]*, %\w+, )[^,]*,"
_SHUFFLE = sub(_SHUFFLED, r"\g<1>4,")

MUTANTS = [
    # hopper.h
    Mutant("stride offset of S's operand halved", _HOPPER, _GRAD,
           sub(str(_DESCRIPTOR), _CLOSER), True),
    Mutant("step along K of a descriptor halved", _HOPPER, _SUMS,
           sub(rf"{_DESCRIPTOR + 2}", str(_DESCRIPTOR + 1))),
    Mutant("W·F takes F untransposed", _HOPPER, _GRAD,
           sub(r"(wgmma\.mma_async[^;]*\}, \{%r[^;]*), 1, 1, 1;", r"\1, 1, 1, 0;"), True),
    Mutant("bf16 pairs packed the other way", _HOPPER, _GRAD, _PACK),
    Mutant("f16 pairs packed the other way", _HALF, _GRAD,
           sub(r"(cvt\.rn\.f16x2\.f32\s+%r\d+), (%\w+), (%\w+)", r"\1, \3, \2")),
    Mutant("no lane is asked for the range of its weights", _FAR, _GRAD,
           sub(r"(vote\.sync\.any\.pred\s+%p\d+), %p\d+,", r"\1, 0,")),
    Mutant("the wait for float16 W·F leaves it under way", _HALF, _GRAD,
           sub(r"wait_group\.sync\.aligned 0", "wait_group.sync.aligned 4", 1)),
    Mutant("the first product adds to what was there", _HOPPER, _SUMS,
           sub(r"setp\.ne\.b32(\s+add[^;]*);", r"setp.eq.b32\1;")),
    Mutant("no wait for the first S", _HOPPER, _SUMS, removed(r"wgmma\.wait_group"), True),
    Mutant("the wait for the next S leaves it under way", _HOPPER, _SUMS,
           sub(r"wait_group\.sync\.aligned 0", "wait_group.sync.aligned 1", 1)),
    Mutant("the wait for W·F leaves it under way", _RING, _GRAD,
           sub(r"wait_group\.sync\.aligned 1", "wait_group.sync.aligned 7")),
    Mutant("no wgmma.fence before S", _HOPPER, _SUMS, removed(r"wgmma\.fence", 2)),
    Mutant("no wgmma.fence before W·F", _HOPPER, _GRAD, removed(r"wgmma\.fence", 2)),
    Mutant("a group of products is not committed", _HOPPER, _GRAD, removed(r"wgmma\.commit_group")),
    Mutant("nobody waits for the rows", _HOPPER, _GRAD, sub(r"@!done bra waiting;", "")),
    Mutant("nobody waits for a full stage", _HOPPER, _SUMS, sub(r"@!done bra waiting;", "", 3)),
    Mutant("the producer does not wait for an empty stage", _RING, _GRAD,
           sub(r"@!done bra waiting;", "", 4)),
    Mutant("half of the bytes are expected", _HOPPER, _GRAD, expected_bytes, True),
    Mutant("a stage is never released", _RING, _GRAD,
           removed(r"mbarrier\.arrive\.shared::cta", 1)),
    Mutant("initialised barriers are not published", _HOPPER, _SUMS,
           sub(r"fence\.mbarrier_init[^;]*;\s*fence\.proxy\.async[^;]*;", "")),
    Mutant("no barrier after the initialisation", _HOPPER, _GRAD, removed(r"bar\.sync"), True),
    Mutant("a tensor copy takes row for column", _HOPPER, _GRAD,
           sub(r"\{(%r\d+), (%r\d+)\}\], \[", r"{\2, \1}], [", 2)),
    Mutant("the last tile is left out (hopper.h)", _HOPPER, _GRAD, one_tile_less),
    Mutant("no barrier before a tile's column sums (hopper.h)",
           replace(_HOPPER, setting={"learn_tau": False}), "hopper7RowSumsILi64ELb1ELb0ELb1",
           each(r"bar\.sync[ \t]+%r[^;]*;", "")),
    Mutant("rows are not rounded to TF32 (hopper.h)", _ONE_WAY, "RoundRows",
           each(r"cvt\.rna\.tf32\.f32", "mov.b32"), True),
    Mutant("weights are not rounded to TF32 (hopper.h)", _ONE_WAY, _GRAD,
           each(r"cvt\.rna\.tf32\.f32", "mov.b32")),
    Mutant("columns are transposed in another order", _ONE_WAY, _GRAD,
           each(r"(st\.shared\.v4\.\w+\s+\[%r\d+\], )\{(%\w+), (%\w+),", r"\1{\3, \2,"), True),
    Mutant("stride offset of transposed columns halved", _ONE_WAY, _GRAD,
           sub(str(_DESCRIPTOR), _CLOSER, 3)),
    Mutant("no proxy fence after a tile has been transposed", _TURNED, _GRAD,
           removed(r"fence\.proxy\.async")),
    Mutant("nobody waits for a transposed tile", _TURNED, _GRAD,
           sub(r"@!done bra waiting;", "", 4)),
    Mutant("a tile is copied over rows that are being read",
           replace(_TURNED, pairs=330, multiprocessors=2), _GRAD,
           sub(r"@!done bra waiting;", "", 5)),
    # mma.sync
    Mutant("no wait for cp.async", _AMPERE, _FAST_GRAD, removed(r"cp\.async\.wait_group"), True),
    Mutant("cp.async is not committed", _AMPERE, _FAST_GRAD,
           sub(r"cp\.async\.commit_group;", "", 1)),
    Mutant("cp.async of half of the bytes", _AMPERE, _FAST_SUMS,
           sub(r"(cp\.async\.cg[^;]*), 16, %r\d+;", r"\1, 16, 8;")),
    Mutant("no barrier between stages", _AMPERE, _FAST_GRAD, removed(r"bar\.sync")),
    Mutant("a sum over the wrong lanes", _AMPERE, _FAST_SUMS, _SHUFFLE),
    Mutant("a shuffle by half of a warp", _AMPERE, _FAST_SUMS, half_a_warp, True),
    Mutant("a shuffle behind a branch", _AMPERE, _FAST_SUMS, behind_a_branch),
    Mutant("ldmatrix of F untransposed", _AMPERE, _FAST_GRAD, sub(r"(x4)\.trans", r"\1")),
    Mutant("ldmatrix of S's operand transposed", _AMPERE, _FAST_GRAD,
           sub(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)(\.shared)", r"\1.trans\2")),
    Mutant("bf16 pairs packed the other way (mma.sync)", _AMPERE, _FAST_GRAD, _PACK),
    Mutant("the operand's halves exchanged", _AMPERE, _FAST_GRAD,
           sub(r"(mma\.sync[^{]*\{[^}]*\},\s*\{[^}]*\},\s*)\{(%\w+),\s*(%\w+)\}", r"\1{\3, \2}")),
    Mutant("the last tile is left out (mma.sync)", _AMPERE, _FAST_SUMS, one_tile_less, True),
    Mutant("no barrier before a tile's column sums", replace(_AMPERE, symmetric=True),
           "FastRowSumsINS1_4HalfILi64ELb1EEELb0ELb1", removed(r"bar\.sync", 1)),
    Mutant("neighbouring weights for cuBLAS exchanged", _CHUNKS, "FastPairGrad", _PACK),
    Mutant("the last chunk is left out", _CHUNKS, "FastPairGrad", one_tile_less),
    Mutant("operands are not rounded to TF32", _TF32, "FastRowSumsINS1_4Tf32ILi64",
           each(r"cvt\.rna\.tf32\.f32", "mov.b32")),
    # general kernels, and those of rows
    Mutant("weights are read before other lanes have written them", _IEEE,
           "PairGradINS1_4SimtIfLi64", removed(r"bar\.warp\.sync")),
    Mutant("no wait for cp.async (general)", _IEEE, "RowSumsINS1_4SimtIfLi64",
           removed(r"cp\.async\.wait_group")),
    Mutant("the largest similarity over the wrong lanes", _ONLINE, "RowSumsINS1_4SimtIfLi64",
           each(_SHUFFLED, r"\g<1>4,")),
    Mutant("a row's norm behind a branch", replace(_IEEE, dim=16, nan_row=3), "UnitRows",
           behind_a_branch),
    # Triton
    Mutant("Triton: rows are not rounded to TF32", replace(_TF32, backend="triton"), "rounded_rows",
           each(r"cvt\.rna\.tf32\.f32", "mov.b32")),
    Mutant("Triton: the last tile is left out", _TRITON80, "pair_grad", one_tile_less),
    Mutant("Triton: no barrier", _TRITON, "pair_grad", removed(r"bar\.sync", 3)),
    Mutant("Triton: no proxy fence", _TRITON, "unit_rows|pair_grad",
           removed(r"fence\.proxy\.async")),
    Mutant("Triton: no wait for wgmma", _TRITON, "row_sums", removed(r"wgmma\.wait_group")),
    Mutant("Triton: no wgmma.fence", _TRITON, "pair_grad", removed(r"wgmma\.fence", 1)),
    Mutant("Triton: stride offset halved", _TRITON, "row_sums",
           sub(rf"\b{_DESCRIPTOR}\b", _CLOSER)),
    Mutant("Triton: bf16 pairs packed the other way", _TRITON, "pair_grad", _PACK),
    Mutant("Triton: a shuffle by half of a warp", _TRITON, "row_sums", half_a_warp),
    Mutant("Triton: a shuffle behind a branch", _TRITON80, "row_sums", behind_a_branch),
    Mutant("Triton: bf16 pairs packed the other way (mma.sync)", _TRITON80, "pair_grad", _PACK),
    Mutant("Triton: no wait for cp.async", _TRITON80, "pair_grad",
           removed(r"cp\.async\.wait_group")),
    Mutant("Triton: ldmatrix untransposed", _TRITON80, "pair_grad", sub(r"(x4)\.trans", r"\1")),
    Mutant("Triton: cp.async of half of the bytes", _TRITON80, "row_sums",
           sub(r"(cp\.async\.cg[^;]*), 0x10, %r\d+;", r"\1, 0x10, 8;")),
]  # fmt: skip


def entry(ptx: str, name: str) -> tuple[int, int]:
    """Where a kernel's text is in a file."""
    begin = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", ptx).start()
    end = ptx.find(".entry", begin + 6)
    return begin, end if end >= 0 else len(ptx)


class Planter:
    """The runner's `rewrite` for a mutant; ``planted`` says whether there was a place for it."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant, self.planted = mutant, False

    def __call__(self, name: str, ptx: str) -> str:
        if not re.search(self.mutant.kernel, name):
            return ptx
        begin, end = entry(ptx, name)
        changed = self.mutant.change(ptx[begin:end])
        if changed is None or changed == ptx[begin:end]:
            return ptx
        self.planted = True
        return ptx[:begin] + changed + ptx[end:]


def attempt(mutant: Mutant, runner: Runner) -> str | None:
    """What found a mutant, None where nothing did; in the context of its launches.

    Raises:
        LookupError: the kernel's text has no place for it.
        ValueError: the interpreter does not understand the changed text.
    """
    runner.rewrite = planter = Planter(mutant)
    result = cases.run(mutant.case, runner)
    runner.rewrite = lambda name, ptx: ptx
    if not planter.planted:
        raise LookupError(f"{mutant.name}: nothing to change in {mutant.kernel}")
    if result.ok:
        return None
    if result.problem and "Fault: " not in result.problem:
        raise ValueError(f"{mutant.name}: cannot be tried: {result.problem}")
    found = result.problem or next(iter(result.hazards), "") or f"errors {result.errors}"
    return " ".join(found.split())[-160:]


def attempts(names: list[str], short: bool):
    """Every mutant of the lists with what found it."""
    for name in names:
        runner = Runner()
        with run.launches(name, runner):
            for mutant in MUTANTS:
                if f"{mutant.case.backend}-{mutant.case.arch}" == name and (
                    mutant.short or not short
                ):
                    yield mutant, attempt(mutant, runner)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lists", nargs="*", default=run.LISTS)
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    missed = total = 0
    for mutant, found in attempts(given.lists, given.short):
        total += 1
        missed += found is None
        print(f"{'found ' if found else 'MISSED'} {mutant.name}: {found}", flush=True)
    print(f"{total - missed} of {total} planted defects were found")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
