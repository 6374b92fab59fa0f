/* The type of activations and of the KV cache. It is bf16 by default. A file that defines ELEMENT_F32 and
 * includes another C file compiles the latter for fp32; the exported names then end in _f32. */
#ifndef TURRET_ELEMENTS_H
#define TURRET_ELEMENTS_H

#include "vec.h"

#ifdef ELEMENT_F32
typedef float element;
#define EXPORTED(name) name##_f32
INLINE f32x16 load_element(const element *p) { return load_f32(p); }
INLINE fvec fvec_element(const element *p) { return fvec_f32(p); }
INLINE void store_element(element *p, f32x16 value) { store_f32(p, value); }
INLINE float from_element(element value) { return value; }
INLINE element to_element(float value) { return value; }
#else
typedef bf16 element;
#define EXPORTED(name) name
INLINE f32x16 load_element(const element *p) { return load_bf16(p); }
INLINE fvec fvec_element(const element *p) { return fvec_bf16(p); }
INLINE void store_element(element *p, f32x16 value) { store_bf16(p, value); }
INLINE float from_element(element value) { return to_f32(value); }
INLINE element to_element(float value) { return to_bf16(value); }
#endif

#endif
