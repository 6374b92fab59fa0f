#define ELEMENT_F32
#include "elementwise.c"
