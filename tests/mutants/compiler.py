"""A C++ compiler that compiles only what a planted fault has changed; `run.py` sets CXX to it.

It takes the arguments of a compiler. An object whose preprocessed source is the same as without the
fault is copied from the store, and so is every object that is built for another instruction set or
dtype than the test needs.

Environment:
    MUTANTS_STORE: folder of the objects without a fault.
    MUTANTS_VARIANT: the instruction set (-DALPHACL_ISA=) or dtype (-DALPHACL_DTYPE=) that the test
        needs; not set: there is no fault, and the store is brought up to date.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

COMPILER = ["c++"]


def main(arguments):
    sources = [a for a in arguments if a.startswith("csrc/")]
    needed, mine = os.environ.get("MUTANTS_VARIANT"), variant(arguments)
    if "-c" not in arguments or not sources:  # a version, a probe, a link
        # Of an inline function that several objects hold the linker takes the first.
        objects = [a for a in arguments if a.endswith(".o")]
        if "-shared" in arguments and needed:
            objects.sort(key=lambda a: needed not in a)
            arguments = [*objects, *(a for a in arguments if not a.endswith(".o"))]
        return subprocess.run([*COMPILER, *arguments]).returncode
    at = arguments.index("-o")
    output, options = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    # The fingerprint of the sources is not looked at by any test that a fault is meant for.
    options = [a for a in options if not a.startswith("-DALPHACL_SOURCES=")]
    # emulated threads would run for minutes
    quick = "-O1" if "-DALPHACL_EMULATED" in arguments else "-O0"
    command = [*COMPILER, *options, '-DALPHACL_SOURCES="planted"', quick]
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    kept = Path(os.environ["MUTANTS_STORE"]) / f"{key}.o"
    if needed is not None and mine not in (None, needed):
        shutil.copy(kept, output)
        return 0
    plain = [a for a in command if a != "-c"]
    done = subprocess.run([*plain, "-E", "-P"], capture_output=True)
    if done.returncode:
        sys.stderr.buffer.write(done.stderr)
        return done.returncode
    digest, known = hashlib.sha256(done.stdout).hexdigest(), kept.with_suffix(".txt")
    if kept.exists() and known.exists() and known.read_text() == digest:
        shutil.copy(kept, output)
        return 0
    code = subprocess.run([*command, "-o", str(output)]).returncode
    if code == 0 and needed is None:
        shutil.copy(output, kept)
        known.write_text(digest)
    return code


def variant(arguments):
    """The instruction set or dtype that an object is for; None: it is for all."""
    found = re.search(r"-DALPHACL_(?:ISA|DTYPE)=(\w+)", " ".join(arguments))
    return found and found[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
