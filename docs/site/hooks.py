"""What mkdocs is told about these pages that Markdown on its own does not say."""

from __future__ import annotations

import re
from typing import Any

# The words after a block's language tell tests/test_docs_blocks.py what it needs; readers need not see them.
_MARKED_FENCE = re.compile(r"^(\s*`{3,}\w+)[ \t]+[^`\n]+$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _MARKED_FENCE.sub(r"\1", markdown)
