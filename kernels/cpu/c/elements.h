/* The type of activations and of the KV cache: bf16, or fp32 in the files that define ELEMENT_F32 and
 * include the others. Their exported names end in _f32. */
#ifndef TURRET_ELEMENTS_H
#define TURRET_ELEMENTS_H

#include "vec.h"

#ifdef ELEMENT_F32
typedef float element;
#define EXPORTED(name) name##_f32
INLINE f32x16 load_element(const element *p) { return load_f32(p); }
INLINE void store_element(element *p, f32x16 value) { store_f32(p, value); }
INLINE float from_element(element value) { return value; }
INLINE element to_element(float value) { return value; }
#else
typedef bf16 element;
#define EXPORTED(name) name
INLINE f32x16 load_element(const element *p) { return load_bf16(p); }
INLINE void store_element(element *p, f32x16 value) { store_bf16(p, value); }
INLINE float from_element(element value) { return to_f32(value); }
INLINE element to_element(float value) { return to_bf16(value); }
#endif

#endif
