#define ELEMENT_F32
#include "gradients.c"
