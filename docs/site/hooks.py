"""What mkdocs is told about these pages that Markdown on its own does not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# The words after a block's language tell tests/test_docs_blocks.py what it needs; readers need not see them.
_MARKED_FENCE = re.compile(r"^(\s*`{3,}\w+)[ \t]+[^`\n]+$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _MARKED_FENCE.sub(r"\1", markdown)


def on_config(config: Any) -> Any:
    """Leave out navigation entries whose page is not there."""
    config["nav"] = _present(config["nav"], Path(config["docs_dir"]))
    return config


def _present(entries: list[dict[str, Any]], docs: Path) -> list[dict[str, Any]]:
    kept = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _present(target, docs)})
        elif (docs / target).exists():
            kept.append(entry)
    return kept
