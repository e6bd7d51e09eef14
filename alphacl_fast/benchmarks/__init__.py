"""`alphacl bench`: beside this file in a wheel, in the top-level folder `benchmarks/` of a
checkout.
"""

from pathlib import Path

if not Path(__file__).with_name("bench.py").exists():
    __path__.append(str(Path(__file__).parents[2] / "benchmarks"))
