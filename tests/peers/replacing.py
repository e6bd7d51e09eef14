"""A plugin of pytest that puts classes of ours in the place of a package's, before its tests."""

from __future__ import annotations

import importlib
import json
import os
import string
import sys
import tempfile
from pathlib import Path

#: JSON of "module:class" → "module:class"; empty for the baseline.
REPLACED = "ALPHACL_PEERS_REPLACED"
#: Whether models of sentence-transformers' hub are replaced too.
TINY_MODEL = "ALPHACL_PEERS_TINY_MODEL"


def pytest_configure(config):
    pairs = json.loads(os.environ.get(REPLACED, "{}"))
    if os.environ.get(TINY_MODEL):
        use_a_tiny_model()
    replace({load(theirs): load(ours) for theirs, ours in pairs.items()})


def load(name):
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def replace(classes):
    """In every module that has been imported, but those of ours, whose bases they are."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("alphacl_fast"):
            continue
        for attribute, value in [*vars(module or object).items()]:
            if isinstance(value, type) and value in classes:
                setattr(module, attribute, classes[value])


def use_a_tiny_model():
    """Names of models of the hub give a small BERT of random numbers."""
    from sentence_transformers import SentenceTransformer

    folder, original = tempfile.mkdtemp(), SentenceTransformer.__init__

    def init(self, model_name_or_path=None, *arguments, **options):
        if isinstance(model_name_or_path, str) and not os.path.exists(model_name_or_path):
            model_name_or_path = tiny_model(folder)
        original(self, model_name_or_path, *arguments, **options)

    SentenceTransformer.__init__ = init


def tiny_model(folder):
    """The path of a BERT that reads letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

    made = Path(folder) / "model"
    if not made.exists():
        letters = string.ascii_lowercase + string.digits + string.punctuation
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
        words += [f"##{letter}" for letter in letters]
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(words))
        set_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(words), **sizes, **layers)
        BertModel(config).save_pretrained(made)
        BertTokenizerFast(str(vocabulary), model_max_length=512).save_pretrained(made)
    return str(made)
