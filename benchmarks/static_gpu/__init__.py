"""What the compiled CUDA kernels ask of a GPU, counted in their machine code. Needs nvcc and no GPU."""
