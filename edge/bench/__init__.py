"""Benchmarks: prefill, decode, latency and memory of an engine, reported with the machine they came from."""
