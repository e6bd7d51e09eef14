"""``python -m alphacl_fast.train …`` is ``alphacl train …``, and what torchrun starts in every process."""

import sys

from alphacl_fast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
