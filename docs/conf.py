"""Sphinx: the pages of this folder and the reference made of the docstrings.

`make docs` builds it into build/docs.
"""

import dataclasses
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from alphacl_fast import __version__ as release

project = "alphacl_fast"
author = "The alphacl_fast developers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # formulas are readable without a network
]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring is a link where there is such a name
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100


def _bars(app, what, name, obj, options, lines):
    """|Neg| is a number here, not a substitution of reStructuredText.

    Text in ``…`` is left alone.
    """
    lines[:] = [
        "".join(
            part if part.startswith("``") else part.replace("|", r"\|")
            for part in re.split(r"(``.*?``)", line)
        )
        for line in lines
    ]


def _flags(app, what, name, obj, options, lines):
    """The fields of a run's settings, with the texts of ``alphacl train --help``."""
    if name == "alphacl_fast.train.Config":
        fields = [(field.name, field.metadata["help"]) for field in dataclasses.fields(obj)]
        lines += ["", *(f"* ``{field}``: {text}" for field, text in fields), ""]


def setup(app):
    app.connect("autodoc-process-docstring", _flags)
    app.connect("autodoc-process-docstring", _bars)
