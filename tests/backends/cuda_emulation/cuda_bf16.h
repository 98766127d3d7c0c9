// Stands in for CUDA's header of this name.
#pragma once
#include <torch/headeronly/util/BFloat16.h>

#include "emulate.h"
using __nv_bfloat16 = torch::headeronly::BFloat16;
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.x; }
