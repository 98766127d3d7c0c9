"""Implementations of the operators: plain PyTorch here, C++ and CUDA in the compiled libraries."""
