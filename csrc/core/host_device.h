// Marks a function that the CPU kernels and the CUDA kernels both compile.
#pragma once

#if defined(__CUDACC__)
#define CRL_HOST_DEVICE __host__ __device__
#else
#define CRL_HOST_DEVICE
#endif
