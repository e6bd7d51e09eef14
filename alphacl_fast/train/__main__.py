"""``python -m alphacl_fast.train …`` runs ``alphacl train …``, also in torchrun's processes."""

import sys

from alphacl_cli import program

sys.exit(program(["train", *sys.argv[1:]]))
