// Tiles of 16 x 16 floats and what the compilers do not make of simd.h's notation by themselves.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace audiomae {
namespace AUDIOMAE_TIER {
namespace {

constexpr int kTile = 16;
constexpr int kVectors = kTile / kLanes;  // of a tile's row

inline Floats load(const float* p) { return load<float>(p, All{}); }
inline void store(float* p, Floats x) { store<float>(p, x, All{}); }

#if defined(__AVX512F__)

constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of an undefined operand in the forms without a mask

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats sqrt(Floats x) { return _mm512_maskz_sqrt_ps(kAll, x); }
// b if one of them is NaN.
inline Floats max(Floats a, Floats b) { return _mm512_maskz_max_ps(kAll, a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_maskz_min_ps(kAll, a, b); }

// Of each 128-bit lane: the low (high) halves of a and b alternating, and one after the other.
inline Floats mix_low(Floats a, Floats b) { return _mm512_maskz_unpacklo_ps(kAll, a, b); }
inline Floats mix_high(Floats a, Floats b) { return _mm512_maskz_unpackhi_ps(kAll, a, b); }
inline Floats join_low(Floats a, Floats b) { return _mm512_maskz_shuffle_ps(kAll, a, b, 0x44); }
inline Floats join_high(Floats a, Floats b) { return _mm512_maskz_shuffle_ps(kAll, a, b, 0xee); }

// Four floats of rows 0, 4, 8 and 12: one row per 128-bit lane.
inline Floats load_quads(const float* in, int64_t pitch) {
  Floats x = _mm512_castps128_ps512(_mm_loadu_ps(in));
  x = _mm512_maskz_insertf32x4(kAll, x, _mm_loadu_ps(in + 4 * pitch), 1);
  x = _mm512_maskz_insertf32x4(kAll, x, _mm_loadu_ps(in + 8 * pitch), 2);
  return _mm512_maskz_insertf32x4(kAll, x, _mm_loadu_ps(in + 12 * pitch), 3);
}

#elif defined(__AVX2__)

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats sqrt(Floats x) { return _mm256_sqrt_ps(x); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }

inline Floats mix_low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
inline Floats mix_high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
inline Floats join_low(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0x44); }
inline Floats join_high(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0xee); }

inline Floats load_quads(const float* in, int64_t pitch) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(in)), _mm_loadu_ps(in + 4 * pitch), 1);
}

#else

inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats sqrt(Floats x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline Floats max(Floats a, Floats b) { return select(a > b, a, b); }
inline Floats min(Floats a, Floats b) { return select(a < b, a, b); }

#endif

// e^x for x <= 0, to 2 ulp; NaN for NaN.
inline Floats exp_of_negative(Floats x) {
#if defined(__AVX512F__)
  x = max(broadcast(-1000.0f), x);  // of which the scaling by 2^n at the end makes 0
  const Floats n = _mm512_maskz_roundscale_ps(kAll, x * 1.44269504f, 0);
  Floats r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts
  r = fma(n, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1 / 5040.0f);
  p = fma(p, r, broadcast(1 / 720.0f));
  p = fma(p, r, broadcast(1 / 120.0f));
  p = fma(p, r, broadcast(1 / 24.0f));
  p = fma(p, r, broadcast(1 / 6.0f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return _mm512_maskz_scalef_ps(kAll, p, n);
#else
  return exp(x);
#endif
}

#if defined(__AVX512BF16__)

// 0, n, 1, n + 1, ...: interleaves two vectors of n values.
inline __m512i interleaved(int n) {
  const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(n)), 16));
}

#endif

// Stores past the caches, to addresses aligned to what is stored; fence() before others may read.
template <class Element>
inline void stream(void* p, Floats x) {
#if defined(__AVX2__)
  const auto packed = Packed<Element>::from(x);
#if defined(__AVX512F__)
  if constexpr (sizeof(packed) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)packed);
#endif
  if constexpr (sizeof(packed) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)packed);
  if constexpr (sizeof(packed) == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)packed);
#else
  store<Element>(p, x, All{});
#endif
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// out[c][r] = in[r][c]. Rows of `in` are `pitch` floats apart, rows of `out` out_pitch.
inline void transpose(const float* in, int64_t pitch, float* out, int64_t out_pitch = kTile) {
#if defined(__AVX2__)
  for (int c = 0; c < kTile; c += 4) {
    for (int v = 0; v < kTile; v += kLanes) {
      const float* from = in + v * pitch + c;
      const Floats r0 = load_quads(from, pitch), r1 = load_quads(from + pitch, pitch);
      const Floats r2 = load_quads(from + 2 * pitch, pitch), r3 = load_quads(from + 3 * pitch, pitch);
      const Floats low01 = mix_low(r0, r1), high01 = mix_high(r0, r1);
      const Floats low23 = mix_low(r2, r3), high23 = mix_high(r2, r3);
      float* to = out + c * out_pitch + v;
      store(to, join_low(low01, low23));
      store(to + out_pitch, join_high(low01, low23));
      store(to + 2 * out_pitch, join_low(high01, high23));
      store(to + 3 * out_pitch, join_high(high01, high23));
    }
  }
#else
  for (int c = 0; c < kTile; ++c) {
    for (int r = 0; r < kTile; ++r) out[c * out_pitch + r] = in[r * pitch + c];
  }
#endif
}

// out[r] = sum of the lanes of rows[r], of kTile rows.
inline void sum_rows(const Floats* rows, float* out) {
#if defined(__AVX2__)
  Floats quads[kTile / 4];  // each 128-bit lane holds a part of the sums of four rows
#pragma GCC unroll 4
  for (int i = 0; i < kTile / 4; ++i) {
    const Floats* r = rows + 4 * i;
    const Floats a = mix_low(r[0], r[1]) + mix_high(r[0], r[1]);
    const Floats b = mix_low(r[2], r[3]) + mix_high(r[2], r[3]);
    quads[i] = join_low(a, b) + join_high(a, b);
  }
#if defined(__AVX512F__)
  const Floats a = (Floats)_mm512_maskz_shuffle_f32x4(kAll, quads[0], quads[1], 0x44) +
                   (Floats)_mm512_maskz_shuffle_f32x4(kAll, quads[0], quads[1], 0xee);
  const Floats b = (Floats)_mm512_maskz_shuffle_f32x4(kAll, quads[2], quads[3], 0x44) +
                   (Floats)_mm512_maskz_shuffle_f32x4(kAll, quads[2], quads[3], 0xee);
  store(out, (Floats)_mm512_maskz_shuffle_f32x4(kAll, a, b, 0x88) +
                 (Floats)_mm512_maskz_shuffle_f32x4(kAll, a, b, 0xdd));
#else
#pragma GCC unroll 2
  for (int i = 0; i < kTile / 4; i += 2) {
    store(out + 4 * i, (Floats)_mm256_permute2f128_ps(quads[i], quads[i + 1], 0x20) +
                           (Floats)_mm256_permute2f128_ps(quads[i], quads[i + 1], 0x31));
  }
#endif
#else
  for (int r = 0; r < kTile; ++r) out[r] = sum_lanes(rows[r]);
#endif
}

}  // namespace
}  // namespace AUDIOMAE_TIER
}  // namespace audiomae
