"""What this machine lacks for the product, and the command that mends it: facts, checks on them, a report."""
