"""The recipes of ``--recipe`` by name."""

from .data import Data
from .image_text import ImageText
from .moco import MoCo
from .process_context import ProcessContext
from .recipe import Recipe
from .supervised import Supervised

CLASSES = {"simclr": Recipe, "moco": MoCo, "supcon": Supervised, "image_text": ImageText}


def build_recipe(data: Data, context: ProcessContext) -> Recipe:
    """Build the recipe of the settings in ``data``."""
    return CLASSES[data.config.recipe](data, context)
