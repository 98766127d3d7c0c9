"""Everything that needs a GPU: correctness, races, capture and speed of the CUDA and the Triton kernels."""
