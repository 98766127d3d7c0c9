"""The operators in Triton: for NVIDIA and AMD GPUs where the compiled CUDA library is absent. Nothing is imported here,
because importing Triton takes 0.3 s and most processes need none of it."""
