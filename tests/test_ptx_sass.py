"""The machine code of the kernels of hopper.h: registers of products under way are left alone, and
a tile costs what tools/roofline.py says.
"""

import pytest
from ptx import sass

from alphacl_fast.backend import cuda
from tools import cuda_resources, roofline


def cuobjdump():
    """The disassembler, or why there is none."""
    try:
        return cuda_resources.cuobjdump(), None
    except RuntimeError as error:  # no nvcc either
        return None, str(error)


def why_not():
    if not cuda.LIBRARY.exists():
        return "no compiled CUDA library (python setup.py build_cuda)"
    return cuobjdump()[1]


#: One process disassembles the kernels.
one_worker = pytest.mark.xdist_group("sass")


@pytest.fixture(scope="module")
def kernels():
    """The code of the kernels of hopper.h."""
    if reason := why_not():
        pytest.skip(str(reason))
    found = sass.functions(sass.of_library(cuda.LIBRARY, cuobjdump()[0], "hopper"))
    found = {name: code for name, code in found.items() if "hopper" in name}
    if not found:
        pytest.skip("the library is compiled for other architectures than sm_90a")
    return found


@one_worker
def test_products_under_way_are_left_alone(kernels):
    scanned = {name: sass.hazards(code) for name, code in kernels.items()}
    assert len(scanned) == 64
    assert all(count >= 12 for count, _ in scanned.values())
    assert not {name: found[:3] for name, (_, found) in scanned.items() if found}


#: The kernels of the predictions (D = 128, exponentials of numbers affine in t), and what one must
#: hold: sums alone, sums of both sides, gradient.
PREDICTED = [
    ("7RowSumsILi128ELb1ELb0ELb0E", False, False),
    ("7RowSumsILi128ELb1ELb0ELb1E", False, True),
    ("8PairGradILi128ELb1E", True, False),
]
#: In the names of their kernels, and the bytes of a feature.
ENGINES = {"hopper": ("E0E", 2), "hopper float16": ("E1E", 2), "hopper tf32": ("E2E", 4)}


@one_worker
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "gradient", "both"), PREDICTED)
def test_a_tile_costs_what_the_prediction_says(name, gradient, both, engine, kernels):
    """In products, instructions, shuffles and what products read from shared memory."""
    suffix, item = ENGINES[engine]
    named = f"{name}LNS_7Factors{suffix}"
    (code,) = (code for kernel, code in kernels.items() if named in kernel)
    cost = sass.cost_of_tiles(code)
    square, device = roofline.Tile(128, 128), roofline.DEVICES["H200"]
    work = roofline.sweep(1 << 14, 128, square, gradient, both, device, engine, item=item)
    arriving = item * 128 / square.rows  # a column tile's bytes for a pair
    transposing = 0.0
    if engine == "hopper tf32" and gradient:
        arriving *= 3  # and is read and written again
        # a round of a warp has 32 columns and as many features; a column is in 128 pairs
        transposing = sass.length_of_loop(code, "STS.128") * 128 / 32 / square.rows
    assert cost.flop == work.flop / work.exp
    assert cost.shared == work.shared / work.exp - arriving
    assert cost.instructions + transposing == pytest.approx(work.issue / work.exp, rel=0.02)
    # a few of a loop's shuffles are not of sums
    assert 0 <= cost.shuffles - work.shuffle / work.exp <= 2 / 128


def test_the_shortest_way_is_found():
    """Round the loop, past what a predicate skips, through what a branch without one enters."""
    lines = [
        "MOV R1, R2", *["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"] * 7,
        "HGMMA.64x64x16.F32.BF16 R24, R148, gdesc[UR4], R24, gsb0", "MUFU.EX2 R1, R2",
        "@P0 BRA 0x00d0", "FADD R1, R1, R1", "FADD R1, R1, R1", "MUFU.EX2 R3, R4",
        "BRA 0x0110", "@P1 BRA 0x0010", "EXIT", "SHFL.BFLY R1, R1", "BRA 0x00f0",
    ]  # fmt: skip
    code = "".join(f"        /*{16 * k:04x}*/    {x} ;\n" for k, x in enumerate(lines))
    products = 7 * 2 * 64 * 128 * 16 + 2 * 64 * 64 * 16
    shared = 7 * 2 * 16 * (64 + 128) + 2 * 16 * 64
    assert sass.cost_of_tiles(code) == (products / 256, 15 / 2, 1 / 2, shared / 256)


CODE = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R148, gdesc[UR4].tnspB, R24, gsb0 ;
        /*0020*/              @P0  {first} ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   {second} ;
"""


@pytest.mark.parametrize(
    ("instruction", "bad"),
    [
        ("FADD R3, R24, R5", True),  # reads an accumulator
        ("MOV R55, R2", True),  # writes one
        ("LDS.128 R21, [R2]", True),  # R21 to R24
        ("FADD R3, R56, R148", False),  # reads an operand
        ("MOV R149, R2", True),  # writes one
        ("STG.E.64 [R4.64], R22", False),  # R22 and R23
        ("STG.E.128 [R4.64], R22", True),
    ],
)
def test_what_is_found(instruction, bad):
    count, found = sass.hazards(CODE.format(first=instruction, second="NOP"))
    assert (count, bool(found)) == (1, bad)
    assert not sass.hazards(CODE.format(first="NOP", second=instruction))[1]
