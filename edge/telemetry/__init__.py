"""Reads a machine's sensors while something runs: power, clocks, temperatures, throttling (docs/power.md)."""
