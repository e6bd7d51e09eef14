"""The machine code of the kernels of hopper.h leaves registers of products under way alone."""

import pytest
from ptx import sass

from alphacl_fast.backend import cuda
from tools import cuda_resources


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


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_products_under_way_are_left_alone():
    kernels = sass.functions(sass.of_library(cuda.LIBRARY, cuobjdump()[0], "hopper"))
    scanned = {name: sass.hazards(code) for name, code in kernels.items() if "hopper" in name}
    if not scanned:
        pytest.skip("the library is compiled for other architectures than sm_90a")
    assert len(scanned) == 24
    assert all(count >= 12 for count, _ in scanned.values())
    assert not {name: found[:3] for name, (_, found) in scanned.items() if found}


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
