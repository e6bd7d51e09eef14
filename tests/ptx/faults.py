"""What an interpreted kernel can do wrong.

A `Fault` stops the block: what follows has no meaning. A hazard (`Machine.report`) is noted and the
block goes on: its numbers may still be right, on this schedule.
"""


class Fault(Exception):
    """An access out of bounds, a misaligned one, a deadlock, a broken rule of an instruction."""


class Unsupported(Exception):
    """An opcode, a modifier or an operand that the interpreter does not know."""
