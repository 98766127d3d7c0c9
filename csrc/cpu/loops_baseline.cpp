// The loops for the compiler's default instruction set (SSE2 on x86-64, NEON on Arm).
#define CRL_ISA baseline
#include "cpu/loops.inc"
