"""``python -m alphacl_fast.train …`` runs ``alphacl train …``; torchrun starts it in each process."""

import sys

from alphacl_fast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
