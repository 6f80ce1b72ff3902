"""An emulated CUDA driver: a libcuda.so.1 over host memory that runs the CPU builds of this project's kernels."""
