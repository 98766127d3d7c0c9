// The CUDA operators, compiled for the host and registered for tensors of the CPU.
#include <torch/csrc/stable/library.h>

#include "emulate.h"
#include "operands.h"
#define CUDA CPU  // the dispatch key of the registration; the headers above have their own use for the name
#include "cuda/operators.cu"
