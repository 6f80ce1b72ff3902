"""`edge.PagedAttention`: rotate q and k, append k and v to their pages, attend causally over a ragged batch."""
