/* The product with MXFP4 weights (OCP Microscaling Formats 1.0). */
#define MXFP4
#include "nf4_product.c"
