/* Attention over a KV cache in fp32: attention.c, compiled for fp32 elements (elements.h). */
#define ELEMENT_F32
#include "attention.c"
