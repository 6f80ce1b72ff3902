"""Rows of a table, scaled: the embedding (scale_emb), the rows that need logits (1), the head's input (1 / divisor)."""
