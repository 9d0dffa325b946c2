// attention: (B, L, 3, H, d) or packed clips (total, 3, H, d) -> (B, L, H d) or (total, H d), and for each row of scores
// the highest q k and log2 of the sum of e^(score - highest). Per clip and head softmax(q kᵀ / sqrt(d)) v with dropout of
// the softmax, and its gradients; nothing of the size of the scores is kept.
//
// A unit of work is a head of a clip. Its operands are laid out once in scratch memory, as words (product.h). Forward, a
// strip of kRows queries meets all keys: up to 512 of them its scores stay in the L1 cache, and the softmax needs no
// running maximum.
// Backward, a strip of kRows keys meets all queries, so that dv and dk are finished products; the transposed dq is summed
// over blocks of kKeys keys. What is multiplied after the softmax is rounded to bfloat16 where words are pairs.
#include "tier.h"

#include <cstdint>

#include "product.h"

namespace audiomae {

struct Tokens {  // (clips, tokens, heads, channels), channels side by side
  const char* data;
  int64_t clip_step, token_step, head_step;  // bytes
};

struct Attention {
  Tokens q, k, v;
  bool bfloat16;              // else float32
  int64_t heads, width;       // H, d
  int64_t clips, longest;     // tokens of the longest clip
  const int64_t* starts;      // (clips + 1): first token of each clip among those of all clips
  bool packed;                // clips lie one after the other, else clip_step apart
  float scale;                // of the scores, 1 / sqrt(d)
  float to_log2;              // and over ln 2
  uint32_t threshold;         // of 16 random bits: weights below it are dropped
  float keep_scale;           // of those that are not
  uint32_t seed[2];
  float* statistics;          // (all tokens, H, 2): highest q k, log2 of the sum; written forward, read backward
  char* out;                  // (all tokens, H, d), contiguous
  Tokens grad, saved_out;     // backward only
  char* d_qkv;                // (all tokens, 3, H, d), contiguous
};

namespace AUDIOMAE_TIER {
namespace {

constexpr int64_t kQueries = 24;   // forward: strips that share the drawing of dropout, whole groups of 8 queries
constexpr int64_t kKeys = 144;     // backward: keys of a block, whole strips and tiles
constexpr int64_t kGroup = 8;      // queries of one random draw
constexpr int64_t kGap = 16;       // floats after a row: rows not all in the same set of the L1 cache
constexpr int64_t kPadding = 32;   // tokens are padded to its multiple: whole vectors of pairs in every tier
static_assert(kQueries % kRows == 0 && kQueries % kGroup == 0 && kKeys % kRows == 0 && kKeys % kTile == 0);

constexpr float kLargest = 3.4028235e38f;

struct Unit {  // of work
  int64_t clip, head;
};

// --- dropout ------------------------------------------------------------------------------------------------
//
// Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
// seed, the counter (key j, query / 8, head, clip); the low and high halves of its four words are for eight queries.

typedef uint64_t Longs __attribute__((vector_size(4 * kLanes)));

// The product of the low halves.
inline Longs multiply_low(Longs a, uint32_t b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

// A bit for each lane with a >= b.
inline uint32_t not_less(Words a, Words b) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a >= b));
#else
  const Ints yes = a >= b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (yes[i] & 1) << i;
  return bits;
#endif
}

// The lanes whose bit is set; the others become 0.
inline Floats keep_bits(Floats x, uint32_t bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
#else
  Words of_lane;
  for (int i = 0; i < kLanes; ++i) of_lane[i] = 1u << i;
  return (Floats)((Words)x & (Words)((of_lane & bits) == of_lane));
#endif
}

// For the queries [8 group, 8 group + 8) and `tiles` tiles of keys from `key` on, which weights stay: a bit for each
// key at out[query * query_step + tile * tile_step].
inline void draw(const Attention& a, const Unit& u, int64_t group, int64_t key, int64_t tiles, uint16_t* out,
                 int64_t query_step, int64_t tile_step) {
  const Words threshold = Words{} + (a.threshold << 16);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    uint32_t bits[kGroup] = {};
    for (int v = 0; v < kVectors; ++v) {
      Longs x[2][4];  // of the even and the odd keys; the high halves do not count
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        for (int i = 0; i < kLanes / 2; ++i) x[odd][0][i] = 2 * i + odd;
        x[odd][0] += static_cast<uint64_t>(key + tile * kTile + v * kLanes);
        x[odd][1] = Longs{} + static_cast<uint64_t>(group);
        x[odd][2] = Longs{} + static_cast<uint64_t>(u.head);
        x[odd][3] = Longs{} + static_cast<uint64_t>(u.clip);
      }
#pragma GCC unroll 7
      for (uint32_t round = 0; round < 7; ++round) {
        const uint64_t k0 = a.seed[0] + round * 0x9e3779b9u, k1 = a.seed[1] + round * 0xbb67ae85u;
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const Longs p0 = multiply_low(x[odd][0], 0xd2511f53u), p1 = multiply_low(x[odd][2], 0xcd9e8d57u);
          x[odd][0] = (p1 >> 32) ^ x[odd][1] ^ k0;
          x[odd][1] = p1;
          x[odd][2] = (p0 >> 32) ^ x[odd][3] ^ k1;
          x[odd][3] = p0;
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Words w = (Words)((x[0][i] & 0xffffffff) | (x[1][i] << 32));
        bits[2 * i] |= not_less(w << 16, threshold) << (v * kLanes);
        bits[2 * i + 1] |= not_less(w, threshold) << (v * kLanes);
      }
    }
    for (int64_t i = 0; i < kGroup; ++i) out[i * query_step + tile * tile_step] = static_cast<uint16_t>(bits[i]);
  }
}

// out[c * step] has as its bit r the bit c of in[r].
inline void transpose_bits(const uint16_t* in, uint16_t* out, int64_t step) {
#if defined(__AVX2__)
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 8));
#pragma GCC unroll 16
  for (int c = 0; c < kTile; ++c) {  // packing saturates and so keeps the sign
    const __m128i signs = _mm_packs_epi16(_mm_slli_epi16(low, 15 - c), _mm_slli_epi16(high, 15 - c));
    out[c * step] = static_cast<uint16_t>(_mm_movemask_epi8(signs));
  }
#else
  for (int c = 0; c < kTile; ++c) {
    uint32_t bits = 0;
    for (int r = 0; r < kTile; ++r) bits |= (in[r] >> c & 1u) << r;
    out[c * step] = static_cast<uint16_t>(bits);
  }
#endif
}

// --- layouts ------------------------------------------------------------------------------------------------

// Sizes of a clip's operands in scratch memory, in words.
template <bool kPairs>
struct Layout {
  int64_t length, tokens;  // L, and padded
  int64_t depth;           // words of a row's channels
  int64_t pitch;           // and padded
  int64_t channels;        // padded
  int64_t along;           // words of a column's tokens, padded
  int64_t row;             // floats from one row of scores to the next

  Layout(int64_t n, int64_t width)
      : length(n),
        tokens(round_up(n, kPadding)),
        depth(words<kPairs>(width)),
        pitch(kPairs ? round_up(depth, kTile) : round_up(width, kWhole)),
        channels(kPairs ? 2 * pitch : pitch),
        along(words<kPairs>(tokens)),
        row(tokens + kGap) {}
};

inline int64_t clip_offset(const Attention& a, const Tokens& x, int64_t clip) {
  return a.packed ? a.starts[clip] * x.token_step : clip * x.clip_step;
}

inline const char* token(const Attention& a, const Tokens& x, const Unit& u, int64_t i) {
  return x.data + clip_offset(a, x, u.clip) + u.head * x.head_step + i * x.token_step;
}

// Asks for tokens [i, i + n) of the next unit, so that they arrive while this one is computed: they lie far apart,
// where the hardware does not look ahead.
template <class... Operands>
inline __attribute__((always_inline)) void ask_for(const Attention& a, const Unit& next, int64_t i, int64_t n,
                                                   const Operands&... operands) {
  constexpr int64_t kLine = 64;
  const int64_t length = a.starts[next.clip + 1] - a.starts[next.clip], bytes = a.width * (a.bfloat16 ? 2 : 4);
  const Tokens* of[] = {&operands...};
  for (const Tokens* x : of) {
    for (int64_t row = i; row < i + n && row < length; ++row) {
      const char* data = token(a, *x, next, row);
      for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(data + at);
    }
  }
}

// Tokens [i, i + n) of a clip as rows of words, and zeros up to `whole` rows.
template <bool kPairs>
inline void read_rows(const Attention& a, const Tokens& x, const Unit& u, int64_t i, int64_t n, int64_t whole,
                      int64_t pitch, float* out) {
  for (int64_t r = 0; r < n; ++r) {
    const char* from = token(a, x, u, i + r);
    float* row = out + r * pitch;
    if constexpr (kPairs) {
      const int64_t full = a.width / 2;
      for_each_vector(full, [&](int64_t c, int, auto lanes) {
        store<float>(row + c, load<float>(from + 4 * c, lanes), lanes);
      });
      for (int64_t c = full; c < pitch; ++c) row[c] = 0;
      if (a.width % 2) __builtin_memcpy(row + full, from + 4 * full, 2);
    } else {
      for_each_vector(a.width, [&](int64_t c, int, auto lanes) {
        store<float>(row + c, a.bfloat16 ? load<BFloat16>(from + 2 * c, lanes) : load<float>(from + 4 * c, lanes),
                     lanes);
      });
      for (int64_t c = a.width; c < pitch; ++c) row[c] = 0;
    }
  }
  if (n < whole) __builtin_memset(out + n * pitch, 0, (whole - n) * pitch * sizeof(float));
}

// Rows as columns: Panels over the words of a row.
template <bool kPairs>
inline Panels pack_columns(const Layout<kPairs>& l, const float* rows, float* out) {
  for (int64_t j = 0; j < l.tokens; j += kTile) {
    for (int64_t word = 0; word < l.pitch; word += kTile) {
      transpose(rows + j * l.pitch + word, l.pitch, out + j * l.pitch + word * kTile);
    }
  }
  return {out, l.pitch};
}

// Channels as columns: Panels over the rows.
template <bool kPairs>
inline Panels pack_values(const Layout<kPairs>& l, const float* rows, float* out) {
  for (int64_t word = 0; word < l.along; ++word) {
    for (int64_t c = 0; c < l.pitch; c += kTile) {
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
        const __m512i low = interleaved(32), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const float* row = rows + 2 * word * l.pitch + c;
        const __m512i x = _mm512_loadu_si512(row), y = _mm512_loadu_si512(row + l.pitch);
        float* to = out + (c / kTile * 2 * l.along + word) * kTile;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(to + l.along * kTile, _mm512_permutex2var_epi16(x, high, y));
        continue;
      }
#endif
      float* to = out + (c / kTile * l.along + word) * kTile;
      for (int i = 0; i < kTile; i += kLanes) store(to + i, load(rows + word * l.pitch + c + i));
    }
  }
  return {out, l.along};
}

// c (+)= a b for `rows` rows of a and so many columns of b, both rounded up.
template <bool kPairs>
inline void product(const Strip& a, int64_t rows, const Panels& b, int64_t columns, int64_t depth, bool add,
                    float* c, int64_t c_stride) {
  constexpr int kThird = kRows / 3;
  for (int64_t j = 0; j < columns; j += kColumns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const Strip strip{a.data + r * a.step, a.step};
      float* sums = c + r * c_stride + j;
      if (rows - r > 2 * kThird) {
        multiply<kPairs>(strip, b, 0, j, depth, add, sums, c_stride);
      } else if (rows - r > kThird) {
        multiply<kPairs, 2 * kThird>(strip, b, 0, j, depth, add, sums, c_stride);
      } else {
        multiply<kPairs, kThird>(strip, b, 0, j, depth, add, sums, c_stride);
      }
    }
  }
}

inline Strip strip_of(const float* rows, int64_t pitch) { return {reinterpret_cast<const char*>(rows), pitch * 4}; }

template <bool kPairs>
inline void write_row(const Attention& a, const float* row, float scale, char* out) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= a.width; c += 2 * kLanes) {
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(load(row + c + kLanes) * scale, load(row + c) * scale);
      _mm512_storeu_si512(out + 2 * c, both);
    }
    for (; c < a.width; c += kLanes) {
      const int64_t rest = a.width - c < kLanes ? a.width - c : kLanes;
      store<BFloat16>(out + 2 * c, load(row + c) * scale, rest);
    }
    return;
  }
#endif
  for_each_vector(a.width, [&](int64_t c, int, auto lanes) {
    const Floats x = load<float>(row + c, lanes) * scale;
    if (a.bfloat16) {
      store<BFloat16>(out + 2 * c, x, lanes);
    } else {
      store<float>(out + 4 * c, x, lanes);
    }
  });
}

// --- the softmax --------------------------------------------------------------------------------------------

// 2^x for x that is not much above 0, to 2 ulp; NaN for NaN.
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
  constexpr int kDown = 1;
  const Floats f = _mm512_maskz_reduce_ps(kAll, x, kDown);  // x - floor(x)
#else
  const Floats lowest = broadcast(-126.0f), magic = broadcast(12582912.0f);  // 1.5 * 2^23, see exp
  const Ints underflow = x < lowest;
  x = max(lowest, x);
  const Floats shifted = (x - 0.5f) + magic;
  const Floats f = x - (shifted - magic);
#endif
  Floats p = broadcast(0.0002161292f);  // to 2e-8 on [0, 1]
  p = fma(p, f, broadcast(0.0012467846f));
  p = fma(p, f, broadcast(0.0096754516f));
  p = fma(p, f, broadcast(0.0554852821f));
  p = fma(p, f, broadcast(0.2402293086f));
  p = fma(p, f, broadcast(0.6931470633f));
  p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(kAll, p, x);  // rounds x down
#else
  const Floats power = (Floats)(((Words)shifted - (Words)magic + 127) << 23);
  return select(underflow, Floats{}, p * power);
#endif
}

// Two vectors of a row of scores as words, at their place in it.
template <bool kPairs>
inline void store_words(float* row, int64_t j, Floats low, Floats high) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    store(row + j / 2, (Floats)_mm512_cvtne2ps_pbh(high, low));
    return;
  }
#endif
  store(row + j, low);
  store(row + j + kLanes, high);
}

// Products q k of one query -> e^(score - highest score) as words, 0 past the last key. Returns their sum; `highest` is
// the highest product. It is taken off before the scale is put on: the highest has weight 1 however large it is, and
// the backward pass, whose products are the same to the bit, finds the same weights.
template <bool kPairs>
inline float soften(const Attention& a, int64_t n, float* s, const uint16_t* keep, float* highest) {
  const int64_t whole = round_up(n, kColumns);
  for (int64_t j = n; j < whole; ++j) s[j] = -__builtin_inff();
  Floats top[2] = {broadcast(-kLargest), broadcast(-kLargest)};
  for (int64_t j = 0; j < whole; j += kColumns) {
    top[0] = max(load(s + j), top[0]);
    top[1] = max(load(s + j + kLanes), top[1]);
  }
  *highest = max_lanes(max(top[0], top[1]));
  const Floats factor = broadcast(a.to_log2), from = broadcast(*highest);
  Floats sum[2] = {};
  for (int64_t j = 0; j < whole; j += kColumns) {
    Floats p[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      p[v] = exp2((load(s + j + v * kLanes) - from) * factor);
      sum[v] += p[v];
      const int64_t at = j + v * kLanes;
      if (keep) p[v] = keep_bits(p[v], keep[at / kTile] >> at % kTile);
    }
    store_words<kPairs>(s, j, p[0], p[1]);
  }
  return sum_lanes(sum[0] + sum[1]);
}

// --- forward ------------------------------------------------------------------------------------------------

template <bool kPairs>
void forward(const Attention& a, const Unit& u, const Unit& next, float* scratch) {
  const int64_t start = a.starts[u.clip], n = a.starts[u.clip + 1] - start;
  const Layout<kPairs> l(n, a.width);
  float* rows = scratch;
  float* columns = rows + l.tokens * l.pitch;
  float* values = columns + l.tokens * l.pitch;
  float* q = values + l.channels * l.along;
  float* s = q + kQueries * l.pitch;
  float* o = s + kRows * l.row;
  auto* kept = reinterpret_cast<uint16_t*>(o + kRows * l.channels);
  const int64_t tiles = l.tokens / kTile;

  read_rows<kPairs>(a, a.k, u, 0, n, l.tokens, l.pitch, rows);
  const Panels k = pack_columns(l, rows, columns);
  read_rows<kPairs>(a, a.v, u, 0, n, l.tokens, l.pitch, rows);
  const Panels v = pack_values(l, rows, values);
  for (int64_t i0 = 0; i0 < n; i0 += kQueries) {
    const int64_t queries = n - i0 < kQueries ? n - i0 : kQueries;
    read_rows<kPairs>(a, a.q, u, i0, queries, kQueries, l.pitch, q);
    ask_for(a, next, i0, kQueries, a.k, a.v, a.q);
    for (int64_t g = 0; a.threshold > 0 && g < queries; g += kGroup) {
      draw(a, u, (i0 + g) / kGroup, 0, tiles, kept + g * tiles, tiles, 1);
    }
    for (int64_t i = 0; i < queries; i += kRows) {
      const int64_t strip = queries - i < kRows ? queries - i : kRows;
      product<kPairs>(strip_of(q + i * l.pitch, l.pitch), strip, k, n, l.depth, false, s, l.row);
      float sums[kRows];
      for (int64_t r = 0; r < strip; ++r) {
        const uint16_t* keep = a.threshold > 0 ? kept + (i + r) * tiles : nullptr;
        float* statistics = a.statistics + 2 * ((start + i0 + i + r) * a.heads + u.head);
        sums[r] = soften<kPairs>(a, n, s + r * l.row, keep, statistics);
        statistics[1] = __builtin_log2f(sums[r]);
      }
      product<kPairs>(strip_of(s, l.row), strip, v, a.width, words<kPairs>(n), false, o, l.channels);
      for (int64_t r = 0; r < strip; ++r) {
        const int64_t at = ((start + i0 + i + r) * a.heads + u.head) * a.width * (a.bfloat16 ? 2 : 4);
        write_row<kPairs>(a, o + r * l.channels, a.keep_scale / sums[r], a.out + at);
      }
    }
  }
}

// --- backward -----------------------------------------------------------------------------------------------

// x y of two rows of channels.
template <bool kPairs>
inline float dot(const Attention& a, const char* x, const char* y) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    Floats sum{};
    int64_t c = 0;
    for (; c + 2 * kLanes <= a.width; c += 2 * kLanes) {
      const auto u = _mm512_loadu_si512(x + 2 * c), v = _mm512_loadu_si512(y + 2 * c);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)u, (__m512bh)v);
    }
    for (; c < a.width; c += kLanes) {
      const int64_t rest = a.width - c < kLanes ? a.width - c : kLanes;
      sum += load<BFloat16>(x + 2 * c, rest) * load<BFloat16>(y + 2 * c, rest);
    }
    return sum_lanes(sum);
  }
#endif
  Floats sums[kSlots] = {};
  for_each_vector(a.width, [&](int64_t c, int slot, auto lanes) {
    if (a.bfloat16) {
      sums[slot] += load<BFloat16>(x + 2 * c, lanes) * load<BFloat16>(y + 2 * c, lanes);
    } else {
      sums[slot] += load<float>(x + 4 * c, lanes) * load<float>(y + 4 * c, lanes);
    }
  });
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Statistics {  // of each query
  const float *highest, *sum;  // as saved; past the last query the sum is infinite
  const float* delta;          // the sum of do o
};

// Of kColumns queries from i on, the weights p of a key and the gradients ds of its scores. s and g: its scores and
// the gradients of its weights.
inline void weigh(const Attention& a, const Statistics& of, int64_t i, const float* s, const float* g,
                  const uint16_t* keep, Floats* p, Floats* ds) {
  const Floats to_log2 = broadcast(a.to_log2), keep_scale = broadcast(a.keep_scale);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const int64_t at = i + v * kLanes;
    p[v] = exp2(fma(load(s + at) - load(of.highest + at), to_log2, -load(of.sum + at)));
    if (keep) {
      const uint32_t bits = keep[at / kTile] >> at % kTile;
      ds[v] = p[v] * fma(keep_bits(load(g + at), bits), keep_scale, -load(of.delta + at));
      p[v] = keep_bits(p[v], bits);
    } else {
      ds[v] = p[v] * (load(g + at) - load(of.delta + at));
    }
  }
}

// For `keys` keys, from s and g as above: p and ds as words over the queries in their place, and ds as words over the
// keys, Panels from word `first` on.
template <bool kPairs>
inline void gradients(const Attention& a, const Statistics& of, int64_t queries, int64_t keys, const uint16_t* keep,
                      int64_t tiles, int64_t row, float* s, float* g, int64_t first, int64_t depth, float* panels) {
  constexpr int kStep = kPairs ? 2 : 1;
  for (int64_t j = 0; j < keys; j += kStep) {
    const bool odd = j + 1 == keys;
    float* to = panels + (first + j / kStep) * kTile;
    for (int64_t i = 0; i < queries; i += kColumns) {
      Floats p[kStep][2], ds[kStep][2];
#pragma GCC unroll 2
      for (int r = 0; r < kStep; ++r) {
        if (r && odd) {
          ds[r][0] = ds[r][1] = Floats{};
          continue;
        }
        float *scores = s + (j + r) * row, *of_weights = g + (j + r) * row;
        weigh(a, of, i, scores, of_weights, keep ? keep + (j + r) * tiles : nullptr, p[r], ds[r]);
        store_words<kPairs>(scores, i, p[r][0], p[r][1]);
        store_words<kPairs>(of_weights, i, ds[r][0], ds[r][1]);
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int64_t at = i + v * kLanes;
        float* panel = to + at / kTile * depth * kTile + at % kTile;
#if defined(__AVX512BF16__)
        if constexpr (kPairs) {
          const auto both = (__m512i)_mm512_cvtne2ps_pbh(ds[kStep - 1][v], ds[0][v]);
          _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(interleaved(16), both));
          continue;
        }
#endif
        store(panel, ds[0][v]);
      }
    }
  }
}

template <bool kPairs>
void backward(const Attention& a, const Unit& u, const Unit& next, float* scratch) {
  const int64_t start = a.starts[u.clip], n = a.starts[u.clip + 1] - start;
  const Layout<kPairs> l(n, a.width);
  const int64_t operand = l.tokens * l.pitch, values = l.channels * l.along, block = words<kPairs>(kKeys);
  const int64_t tiles = l.tokens / kTile, element = a.bfloat16 ? 2 : 4;
  float* k_rows = scratch;
  float* v_rows = k_rows + operand;
  float* rows = v_rows + operand;
  float* q_columns = rows + operand;
  float* grad_columns = q_columns + operand;
  float* q_values = grad_columns + operand;
  float* grad_values = q_values + values;
  float* k_turned = grad_values + values;  // rows of channels, words over keys
  float* dq_turned = k_turned + l.channels * (l.along + kGap);
  float* ds_panels = dq_turned + (l.channels + kRows) * l.row;
  float* s = ds_panels + block * l.tokens;
  float* g = s + kRows * l.row;
  float* result = g + kRows * l.row;
  float* highest = result + kTile * l.channels;
  float* sum = highest + l.tokens;
  float* delta = sum + l.tokens;
  auto* drawn = reinterpret_cast<uint16_t*>(delta + l.tokens);  // by tiles of keys, 16 queries each
  uint16_t* kept = drawn + kKeys * kTile;                       // (kKeys, tiles of queries)

  read_rows<kPairs>(a, a.v, u, 0, n, l.tokens, l.pitch, v_rows);
  read_rows<kPairs>(a, a.k, u, 0, n, l.tokens, l.pitch, k_rows);
  const Panels k = pack_values(l, k_rows, q_values);  // for a moment
  for (int64_t c = 0; c < l.channels; c += kTile) {
    for (int64_t word = 0; word < l.along; word += kTile) {
      transpose(k.data + c * l.along + word * kTile, kTile, k_turned + c * (l.along + kGap) + word, l.along + kGap);
    }
  }
  read_rows<kPairs>(a, a.q, u, 0, n, l.tokens, l.pitch, rows);
  const Panels q_by_token = pack_columns(l, rows, q_columns), q_by_channel = pack_values(l, rows, q_values);
  read_rows<kPairs>(a, a.grad, u, 0, n, l.tokens, l.pitch, rows);
  const Panels grad_by_token = pack_columns(l, rows, grad_columns), grad_by_channel = pack_values(l, rows, grad_values);
  for (int64_t i = 0; i < l.tokens; ++i) {
    const float* statistics = a.statistics + 2 * ((start + i) * a.heads + u.head);
    highest[i] = i < n ? statistics[0] : 0;
    sum[i] = i < n ? statistics[1] : __builtin_inff();
    delta[i] = i < n ? dot<kPairs>(a, token(a, a.grad, u, i), token(a, a.saved_out, u, i)) : 0;
  }

  // The part (0: q, 1: k, 2: v) of a token's gradient.
  const auto place = [&](int64_t i, int64_t part) {
    return a.d_qkv + (((start + i) * 3 + part) * a.heads + u.head) * a.width * element;
  };
  const int64_t along = words<kPairs>(n), queries = round_up(n, kColumns);
  for (int64_t j0 = 0; j0 < n; j0 += kKeys) {
    const int64_t keys = n - j0 < kKeys ? n - j0 : kKeys, depth = words<kPairs>(keys);
    for (int64_t i = 0; a.threshold > 0 && i < n; i += kTile) {
      const int64_t key_tiles = (keys + kTile - 1) / kTile;
      draw(a, u, i / kGroup, j0, key_tiles, drawn, 1, kTile);
      draw(a, u, i / kGroup + 1, j0, key_tiles, drawn + kGroup, 1, kTile);
      for (int64_t t = 0; t < key_tiles; ++t) {
        transpose_bits(drawn + t * kTile, kept + t * kTile * tiles + i / kTile, tiles);
      }
    }
    for (int64_t j = 0; j < keys; j += kRows) {
      const int64_t strip = keys - j < kRows ? keys - j : kRows, at = (j0 + j) * l.pitch;
      ask_for(a, next, j0 + j, kRows, a.v, a.k, a.q, a.grad, a.saved_out);
      product<kPairs>(strip_of(k_rows + at, l.pitch), strip, q_by_token, n, l.depth, false, s, l.row);
      product<kPairs>(strip_of(v_rows + at, l.pitch), strip, grad_by_token, n, l.depth, false, g, l.row);
      gradients<kPairs>(a, {highest, sum, delta}, queries, strip, a.threshold > 0 ? kept + j * tiles : nullptr, tiles,
                        l.row, s, g, words<kPairs>(j), depth, ds_panels);
      product<kPairs>(strip_of(s, l.row), strip, grad_by_channel, a.width, along, false, result, l.channels);
      for (int64_t r = 0; r < strip; ++r) {
        write_row<kPairs>(a, result + r * l.channels, a.keep_scale, place(j0 + j + r, 2));
      }
      product<kPairs>(strip_of(g, l.row), strip, q_by_channel, a.width, along, false, result, l.channels);
      for (int64_t r = 0; r < strip; ++r) {
        write_row<kPairs>(a, result + r * l.channels, a.scale, place(j0 + j + r, 1));
      }
    }
    product<kPairs>(strip_of(k_turned + words<kPairs>(j0), l.along + kGap), a.width, {ds_panels, depth}, n, depth,
                    j0 > 0, dq_turned, l.row);
  }
  for (int64_t i = 0; i < n; i += kTile) {
    for (int64_t c = 0; c < l.channels; c += kTile) {
      transpose(dq_turned + c * l.row + i, l.row, result + c, l.channels);
    }
    for (int64_t r = 0; r < kTile && i + r < n; ++r) {
      write_row<kPairs>(a, result + r * l.channels, a.scale, place(i + r, 0));
    }
  }
}

// The heads of a clip lie side by side and come one after the other; but clips of different lengths do, head by head,
// so that equal shares of the units are about equal shares of the work.
inline Unit unit(const Attention& a, int64_t i) {
  return a.packed ? Unit{i % a.clips, i / a.clips} : Unit{i / a.heads, i % a.heads};
}

template <bool kPairs>
int64_t scratch(int64_t longest, int64_t width, bool backward) {
  const Layout<kPairs> l(longest, width);
  const int64_t operand = l.tokens * l.pitch, values = l.channels * l.along, tiles = l.tokens / kTile;
  const auto halves = [](int64_t n) { return round_up(n, kPadding) / 2; };
  if (!backward) {
    return 2 * operand + values + kQueries * l.pitch + kRows * (l.row + l.channels) + halves(kQueries * tiles);
  }
  return 5 * operand + 2 * values + l.channels * (l.along + kGap) + (l.channels + kRows) * l.row +
         words<kPairs>(kKeys) * l.tokens + 2 * kRows * l.row + kTile * l.channels + 3 * l.tokens +
         halves(kKeys * (kTile + tiles));
}

}  // namespace

// float32 values of scratch memory for any clip and head.
int64_t attention_scratch(const Attention& a, bool backward) {
  return kHasPairs && a.bfloat16 ? scratch<kHasPairs>(a.longest, a.width, backward)
                                 : scratch<false>(a.longest, a.width, backward);
}

// Units [begin, end).
void attention_forward(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit(a, i), next = unit(a, i + 1 < end ? i + 1 : i);
    if (kHasPairs && a.bfloat16) {
      forward<kHasPairs>(a, u, next, scratch);
    } else {
      forward<false>(a, u, next, scratch);
    }
  }
}

void attention_backward(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit(a, i), next = unit(a, i + 1 < end ? i + 1 : i);
    if (kHasPairs && a.bfloat16) {
      backward<kHasPairs>(a, u, next, scratch);
    } else {
      backward<false>(a, u, next, scratch);
    }
  }
}

}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "scratch.h"

namespace audiomae {

AUDIOMAE_DECLARE(int64_t attention_scratch(const Attention& a, bool backward))
AUDIOMAE_DECLARE(void attention_forward(const Attention& a, int64_t begin, int64_t end, float* scratch))
AUDIOMAE_DECLARE(void attention_backward(const Attention& a, int64_t begin, int64_t end, float* scratch))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where each clip starts, and at the end the number of all tokens.
std::vector<int64_t> clip_starts(const Tensor& qkv, const std::optional<Tensor>& cu_seqlens) {
  std::vector<int64_t> starts;
  if (!cu_seqlens) {
    for (int64_t clip = 0; clip <= qkv.size(0); ++clip) starts.push_back(clip * qkv.size(1));
    return starts;
  }
  check(cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 &&
            cu_seqlens->scalar_type() == ScalarType::Int,
        "attention expects int32 cu_seqlens of shape (clips + 1,), got ", dtype_name(*cu_seqlens), " of shape ",
        shape(*cu_seqlens), ".");
  const Tensor ends = torch::stable::contiguous(*cu_seqlens);
  const auto* values = static_cast<const int32_t*>(ends.const_data_ptr());
  for (int64_t i = 0; i < ends.size(0); ++i) {
    int32_t value;
    std::memcpy(&value, values + i, sizeof(value));
    starts.push_back(value);
  }
  check(starts.front() == 0 && starts.back() == qkv.size(0) && std::is_sorted(starts.begin(), starts.end()),
        "attention expects cu_seqlens that rise from 0 to the number of tokens, ", qkv.size(0), ".");
  return starts;
}

// (B, L, H * d), (B, L, H, d), or without B.
Tokens tokens_of(const Tensor& x, bool packed, int64_t head_step) {
  return {static_cast<const char*>(x.const_data_ptr()), packed ? 0 : byte_step(x, 0), byte_step(x, packed ? 0 : 1),
          head_step};
}

// A call's checked arguments, with the memory behind the pointers.
struct Call {
  Attention a{};
  Tensor qkv;
  std::vector<int64_t> starts;

  Call(const Tensor& given, const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& seed,
       double dropout)
      : qkv(given) {
    const int64_t dim = cu_seqlens ? 4 : 5;
    check(given.dim() == dim && given.size(dim - 3) == 3, "attention expects qkv of shape ",
          cu_seqlens ? "(tokens, 3, heads, channels) with cu_seqlens" : "(batch, tokens, 3, heads, channels)",
          ", got ", shape(given), ".");
    check(given.is_cpu(), "attention of the native library expects CPU tensors.");
    check(is_float32_or_bfloat16(given), "attention expects float32 or bfloat16 qkv, got ", dtype_name(given), ".");
    check(dropout >= 0 && dropout < 1, "attention expects a dropout in [0, 1), got ", dropout, ".");
    check((dropout == 0) || (seed && seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
          "attention expects one int64 as the seed of its dropout.");
    starts = clip_starts(given, cu_seqlens);
    qkv = rows_in_one_piece(given);
    a.packed = cu_seqlens.has_value();
    a.bfloat16 = is_bfloat16(qkv);
    a.heads = qkv.size(dim - 2);
    a.width = qkv.size(dim - 1);
    a.clips = static_cast<int64_t>(starts.size()) - 1;
    a.starts = starts.data();
    for (int64_t i = 0; i < a.clips; ++i) a.longest = std::max(a.longest, starts[i + 1] - starts[i]);
    const double scale = 1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, a.width)));
    a.scale = static_cast<float>(scale);
    a.to_log2 = static_cast<float>(scale * 1.4426950408889634);
    a.threshold = std::min<uint32_t>(65535, static_cast<uint32_t>(std::nearbyint(dropout * 65536)));
    a.keep_scale = static_cast<float>(65536 / (65536.0 - a.threshold));
    if (a.threshold > 0) std::memcpy(a.seed, seed->const_data_ptr(), sizeof(a.seed));
    const int64_t part = byte_step(qkv, dim - 3);
    a.q = a.k = a.v = tokens_of(qkv, a.packed, byte_step(qkv, dim - 2));
    a.k.data += part;
    a.v.data += 2 * part;
  }
  Call(const Call&) = delete;

  // Runs `kernel` over all heads of all clips with scratch memory.
  template <class Kernel>
  void run(Kernel kernel, bool backward) const {
    static const auto scratch_size = AUDIOMAE_SELECT(attention_scratch);
    constexpr int64_t kMultiplyAddsPerTask = 1 << 20;
    const int64_t units = a.clips * a.heads, total = starts.back();
    const int64_t of_unit = 2 * a.width * a.longest * std::max<int64_t>(1, total / std::max<int64_t>(1, a.clips));
    const int64_t grain = std::max<int64_t>(1, kMultiplyAddsPerTask / std::max<int64_t>(1, of_unit));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      Scratch<float> scratch(scratch_size(a, backward));
      kernel(a, begin, end, scratch.data());
    });
  }
};

// The output, and for the backward pass the (..., H, 2) statistics of each row of scores.
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const std::optional<Tensor>& cu_seqlens,
                                     const std::optional<Tensor>& seed, double dropout) {
  Call call(qkv, cu_seqlens, seed, dropout);
  Attention& a = call.a;
  std::vector<int64_t> sizes{qkv.size(0)};
  if (!a.packed) sizes.push_back(qkv.size(1));
  sizes.push_back(a.heads * a.width);
  Tensor out = torch::stable::new_empty(qkv, sizes);
  sizes.back() = a.heads;
  sizes.push_back(2);
  Tensor statistics = torch::stable::new_empty(qkv, sizes, ScalarType::Float);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  a.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  if (statistics.numel() > 0) call.run(AUDIOMAE_SELECT(attention_forward), false);
  return {out, statistics};
}

Tensor attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& statistics,
                          const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& seed,
                          double dropout) {
  Call call(qkv, cu_seqlens, seed, dropout);
  Attention& a = call.a;
  const int64_t dim = a.packed ? 2 : 3;
  const auto expect = [&](const char* what, const Tensor& x, int64_t last, bool right) {
    check(x.is_cpu() && right && x.size(0) == qkv.size(0) && x.size(dim - 2) == qkv.size(dim - 2) &&
              x.size(dim - 1) == last,
          "attention expects ", what, " for qkv of shape ", shape(qkv), ", got ", dtype_name(x), " of shape ",
          shape(x), ".");
  };
  expect("a gradient of the output's shape and dtype", grad, a.heads * a.width,
         grad.dim() == dim && grad.scalar_type() == qkv.scalar_type());
  expect("an output of the shape and dtype that it has", out, a.heads * a.width,
         out.dim() == dim && out.scalar_type() == qkv.scalar_type());
  expect("two float32 statistics of each token and head", statistics, a.heads,
         statistics.dim() == dim + 1 && statistics.size(dim) == 2 && statistics.scalar_type() == ScalarType::Float);
  const Tensor grad_rows = rows_in_one_piece(grad), out_rows = rows_in_one_piece(out);
  const Tensor kept = torch::stable::contiguous(statistics);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < qkv.dim(); ++i) sizes.push_back(qkv.size(i));
  Tensor d_qkv = torch::stable::new_empty(qkv, sizes);
  a.statistics = const_cast<float*>(static_cast<const float*>(kept.const_data_ptr()));
  const int64_t head_step = a.width * int64_t(qkv.element_size());
  a.grad = tokens_of(grad_rows, a.packed, head_step);
  a.saved_out = tokens_of(out_rows, a.packed, head_step);
  a.d_qkv = static_cast<char*>(d_qkv.mutable_data_ptr());
  if (d_qkv.numel() > 0) call.run(AUDIOMAE_SELECT(attention_backward), true);
  return d_qkv;
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&audiomae::attention));
  m.impl("attention_backward", TORCH_BOX(&audiomae::attention_backward));
}

#endif  // AUDIOMAE_ENTRY
