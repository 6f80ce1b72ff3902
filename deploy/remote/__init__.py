"""What the scripts in deploy/ do, with nothing but Python's standard library."""
