"""`edge.SwiGLU`: silu(gate) * up of a fused gate/up projection."""
