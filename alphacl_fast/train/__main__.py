"""``python -m alphacl_fast.train …`` runs ``alphacl train …``, also in torchrun's processes."""

import sys

from alphacl_fast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
