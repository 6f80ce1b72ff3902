"""`edge.AddGroupOffsets`: what asymmetric int4 groups add to a product that was computed without zero points."""
