// Stands in for CUDA's header of this name.
#pragma once
#include <torch/headeronly/util/Half.h>

#include "emulate.h"
using __half = torch::headeronly::Half;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline unsigned short __half_as_ushort(__half value) { return value.x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(bits, __half::from_bits()); }
