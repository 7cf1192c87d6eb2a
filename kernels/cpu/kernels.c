/* One translation unit, one library: what kernels/cpu/native.py calls. */
#include "attention.c"
#include "elementwise.c"
#include "linear.c"
