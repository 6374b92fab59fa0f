#define ELEMENT_F32
#include "attention.c"
