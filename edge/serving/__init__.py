"""Many requests on one engine: a fair queue, continuous batching, and a thread that owns the engine."""
