"""Suggestions for misspelt names in error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, names: Iterable[object]) -> str:
    """Return "; did you mean 'NAME'?" for the name nearest to ``given``, or "" if none is near."""
    near = difflib.get_close_matches(str(given), [str(name) for name in names], 1)
    return f"; did you mean {near[0]!r}?" if near else ""
