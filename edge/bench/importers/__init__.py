"""Other engines' benchmark results, read from their own output files as rows of a report (docs/compare.md)."""

from edge.bench.importers.peers import Imported, read_peers

__all__ = ["Imported", "read_peers"]
