// Registers of float32 numbers, and what cpu_kernels.cc computes with them.
//
// Written in the vector extensions of GCC and Clang, which know every CPU; cpu_products.h adds
// intrinsics where a CPU has an instruction for which the extensions have no word.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace {

// LANES float32 numbers are a register. A product's block of MAX_ROWS rows fills the registers: 2 a
// row hold sums, 2 weights, 1 an input.
#if defined(__AVX512BW__)  // 32 registers
constexpr int LANES = 16, MAX_ROWS = 12;
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)  // 16 registers
constexpr int LANES = 8, MAX_ROWS = 6;
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else  // SSE2, NEON
constexpr int LANES = 4, MAX_ROWS = 6;
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define CODE_FOR_TILES 1
#else
#define CODE_FOR_TILES 0
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(2 * LANES)));

// Copy a vector, or the bits of a number, from memory of any alignment.
template <class Vector>
inline Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Return [a0+a1, a2+a3, ..., b0+b1, b2+b3, ...].
inline Floats add_pairs(Floats a, Floats b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, EVEN_LANES) + __builtin_shufflevector(a, b, ODD_LANES);
#else
  return __builtin_shuffle(a, b, Ints{EVEN_LANES}) + __builtin_shuffle(a, b, Ints{ODD_LANES});
#endif
}

// Return a vector whose lane i is the sum of the lanes of x[i], for LANES vectors.
template <int COUNT = LANES>
inline Floats sums_of_lanes(const Floats* x) {
  if constexpr (COUNT == 1) return x[0];
  else return add_pairs(sums_of_lanes<COUNT / 2>(x), sums_of_lanes<COUNT / 2>(x + COUNT / 2));
}

// Return e^x to 2 units in the last place; 0 below -87, e^88 above 88, NaN for NaN.
inline Floats exp(Floats x) {
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: a number this large has no fraction
  Floats clipped = x > 88.0f ? Floats{} + 88.0f : x;
  Floats shifted = clipped * 1.44269504f + to_integer;
  Floats n = shifted - to_integer;
  Floats r = clipped - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln 2, |r| <= ln 2 / 2
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;          // the polynomial of Cephes's expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Words exponent = ((Words)shifted << 23) + (127u << 23);  // n is in the low bits of shifted
  return x < -87.0f ? Floats{} : p * (Floats)exponent;
}

// Return GPT-2's GELU, the tanh form: x / 2 (1 + tanh u) = x / (1 + e^-2u).
inline Floats gelu_new(Floats x) {
  Floats u = 0.7978845608f * x * (0.044715f * x * x + 1.0f);
  return x / (exp(-2.0f * u) + 1.0f);
}

inline float from_bfloat16(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  return load<float>(&bits);
}

// Convert the bits of n bfloat16 numbers, a multiple of LANES.
inline void widen(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += LANES) {
    store(to + i, (Floats)(__builtin_convertvector(load<Halves>(from + i), Words) << 16));
  }
}

// Return number i of an array of float32, or of the bits of bfloat16.
inline float number(const void* array, bool is_float32, int64_t i) {
  return is_float32 ? ((const float*)array)[i] : from_bfloat16(((const uint16_t*)array)[i]);
}

// Return the bits of the bfloat16 nearest to x, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits = load<uint32_t>(&x);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace
