// Vectors as wide as the tier's registers, in the notation that GCC and Clang share; bfloat16 as its bits.
//
// Memory is addressed in bytes and may be misaligned: a tensor over foreign memory need not be aligned to its
// element. Everything computes in float32.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Everything that the function calls becomes part of it: compilers shy away from inlining the body of a
// for_each_vector in all of its five places.
#define AUDIOMAE_FLATTEN __attribute__((flatten))

namespace audiomae {
namespace AUDIOMAE_TIER {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats broadcast(float x) { return x - Floats{}; }  // 0 + x turns -0 into 0: not free

// The one instruction where the compilers' own conversion takes several (maskz: see over_lanes).
inline Words widen(Halves x) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

inline Halves narrow(Words x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

inline Floats to_floats(Floats x) { return x; }
inline Floats to_floats(Halves x) { return (Floats)(widen(x) << 16); }

inline Halves to_bfloat16(Floats x) {  // to nearest, ties to even
  const Words bits = (Words)x, number = (Words)(x == x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow((rounded & number) | (0x7fc0 & ~number));
}

template <class Element>
struct Packed;
template <>
struct Packed<float> {
  using Vector = Floats;
  static Vector from(Floats x) { return x; }
};
template <>
struct Packed<BFloat16> {
  using Vector = Halves;
  static Vector from(Floats x) { return to_bfloat16(x); }
};

// How many lanes of a vector count: all of them, known at compile time, or the first few.
struct All {};

template <class Element>
inline Floats load(const void* p, All) {
  typename Packed<Element>::Vector x;
  __builtin_memcpy(&x, p, sizeof(x));
  return to_floats(x);
}

template <class Element>
inline Floats load(const void* p, int64_t lanes) {  // the others are 0
  typename Packed<Element>::Vector x{};
  __builtin_memcpy(&x, p, lanes * sizeof(Element));
  return to_floats(x);
}

template <class Element>
inline void store(void* p, Floats x, All) {
  const auto packed = Packed<Element>::from(x);
  __builtin_memcpy(p, &packed, sizeof(packed));
}

template <class Element>
inline void store(void* p, Floats x, int64_t lanes) {
  const auto packed = Packed<Element>::from(x);
  __builtin_memcpy(p, &packed, lanes * sizeof(Element));
}

inline Floats keep(Floats x, All) { return x; }
inline Floats keep(Floats x, int64_t lanes) {  // the others become 0
  Floats kept{};
  __builtin_memcpy(&kept, &x, lanes * sizeof(float));
  return kept;
}

inline Floats select(Ints condition, Floats yes, Floats no) {
  return (Floats)((condition & (Ints)yes) | (~condition & (Ints)no));
}

// Sum and maximum over the lanes, by halves. The intrinsics are always inlined, so that they are in no tier's
// object file.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

template <class Combine>
inline float over_lanes(Floats x, Combine combine) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  // maskz: GCC 12 warns of the other form's own undefined operand.
  const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, x, 0), high = _mm512_maskz_extractf32x8_ps(0xff, x, 1);
  const __m256 half = combine(low, high);
#else
  const __m256 half = x;
#endif
  __m128 y = combine(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  y = combine(y, _mm_movehl_ps(y, y));
  return combine(y[0], y[1]);
#else
  return combine(combine(x[0], x[2]), combine(x[1], x[3]));
#endif
}

inline float sum_lanes(Floats x) { return over_lanes(x, Add{}); }
inline float max_lanes(Floats x) { return over_lanes(x, Max{}); }

// Calls body(i, slot, lanes) for the vectors at 0, kLanes, ... of n elements. The slot runs through 0..3, for
// four sums side by side that do not wait for each other.
constexpr int kSlots = 4;

template <class Body>
inline void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kSlots * kLanes <= n; i += kSlots * kLanes) {
    body(i, 0, All{});
    body(i + kLanes, 1, All{});
    body(i + 2 * kLanes, 2, All{});
    body(i + 3 * kLanes, 3, All{});
  }
  for (; i + kLanes <= n; i += kLanes) body(i, 0, All{});
  if (i < n) body(i, 0, n - i);
}

// exp(x) to 2 ulp: 0 below the smallest normal result, infinity above the largest, NaN for NaN.
inline Floats exp(Floats x) {
  const Floats lowest = broadcast(-87.33654f), highest = broadcast(88.72284f);
  const Ints underflow = x < lowest;
  x = select(x > highest, highest, x);
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact in n
  Floats p = broadcast(1 / 5040.0f);
  p = p * r + 1 / 720.0f;
  p = p * r + 1 / 120.0f;
  p = p * r + 1 / 24.0f;
  p = p * r + 1 / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats power = (Floats)(((Words)shifted - (Words)magic + 127) << 23);
  return select(underflow, Floats{}, p * power);
}

}  // namespace
}  // namespace AUDIOMAE_TIER
}  // namespace audiomae
