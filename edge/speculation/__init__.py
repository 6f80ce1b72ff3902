"""Speculative decoding: what to propose, how much of it, what of it is kept. Numbers only: no tensor, no device."""
