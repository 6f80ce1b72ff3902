"""Does this device compute what it should? Vectors through the kernels, and what the user sees of it."""
