"""Host tooling for the CUDA kernels: compile them, read the machine code, hold it to its budgets."""
