// Matrix products that go word by word. A word is a float, or, where the tier has dot products of them, a pair of
// bfloat16: their products are exact and summed in float32, at twice the rate.
#pragma once

#include "tile.h"

namespace audiomae {
namespace AUDIOMAE_TIER {
namespace {

// The product's tile, kRows x kColumns, fills the registers with sums.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kColumns = 2 * kLanes;
constexpr int kWhole = kColumns > kTile ? kColumns : kTile;  // what is packed has a multiple of it of columns

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <bool kPairs>
inline int64_t words(int64_t n) {
  return kPairs ? (n + 1) / 2 : n;
}

template <bool kPairs>
inline Floats multiply_add(const char* word, Floats b, Floats sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    int32_t pair;
    __builtin_memcpy(&pair, word, sizeof(pair));
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
#endif
  float x;
  __builtin_memcpy(&x, word, sizeof(x));
  return fma(broadcast(x), b, sum);
}

// The left side of a product: rows of words, `step` bytes apart.
struct Strip {
  const char* data;
  int64_t step;
};

// The right side of a product: panels[column / kTile][word][column % kTile].
struct Panels {
  const float* data;
  int64_t depth;  // words
};

// c (+)= a b. a: kHeight rows of `depth` words; b: as many words from `word` on, kColumns columns
// from `column` on; c: kHeight rows of kColumns, c_stride apart.
template <bool kPairs, int kHeight = kRows>
__attribute__((noinline)) void multiply(const Strip& a, const Panels& panels, int64_t word, int64_t column,
                                        int64_t depth, bool add, float* c, int64_t c_stride) {
  const float* b = panels.data + (column / kTile * panels.depth + word) * kTile + column % kTile;
  const float* b_next = b + (kLanes < kTile ? kLanes : panels.depth * kTile);
  Floats sum[kHeight][2];
#pragma GCC unroll 12
  for (int i = 0; i < kHeight; ++i) {
    sum[i][0] = add ? load(c + i * c_stride) : Floats{};
    sum[i][1] = add ? load(c + i * c_stride + kLanes) : Floats{};
  }
  constexpr int kApart = 3;  // a pointer reaches as many rows with an address's one scaled index
  constexpr int kPointers = (kHeight + kApart - 1) / kApart;
  const int64_t step = a.step;
  const char* rows[kPointers];
  for (int i = 0; i < kPointers; ++i) rows[i] = a.data + i * kApart * step;
  for (int64_t k = 0; k < depth; ++k) {
    const Floats b0 = load(b + k * kTile), b1 = load(b_next + k * kTile);
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
      const char* word = rows[i / kApart] + i % kApart * step;
      sum[i][0] = multiply_add<kPairs>(word, b0, sum[i][0]);
      sum[i][1] = multiply_add<kPairs>(word, b1, sum[i][1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) rows[i] += sizeof(float);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kHeight; ++i) {
    store(c + i * c_stride, sum[i][0]);
    store(c + i * c_stride + kLanes, sum[i][1]);
  }
}

}  // namespace
}  // namespace AUDIOMAE_TIER
}  // namespace audiomae
