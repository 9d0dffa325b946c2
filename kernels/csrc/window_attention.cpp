// window_attention: (B, L, 3, H, d), (H,), (H, N, N) -> (B, L, H * d). Attention in shifted windows of a grid,
// and its gradients.
//
// One window and head at a time, in float32 and in the L1 cache: q, k, v (and the gradient of the output) are
// read once, where they lie, and the results written once. Tiles of 16 x 16 scores are held transposed, a key
// per row and a query per lane, so that the softmax and its gradient need no sum across lanes.
//
// B clips, L = T' * F' tokens, H heads of d channels, N tokens in a window; scratch pads d and N to tiles.
#include "tier.h"

#include <cstdint>

#include "tile.h"

#if defined(__AMX_BF16__) || defined(AUDIOMAE_EMULATED_TILES)
#define AUDIOMAE_TILES
#include "amx.h"
#endif

namespace audiomae {

// (clips, tokens, heads, channels) with the channels side by side; steps in bytes.
struct Rows {
  char* data;
  int64_t clip, token, head;
};

struct WindowAttention {
  bool bfloat16;                 // qkv, grad and results; else float32
  bool cosine;                   // else q·k / sqrt(d)
  int64_t heads, width, tokens;  // H, d, N
  int64_t padded_width, padded_tokens;
  int64_t clips, windows;        // B, windows of a clip
  int64_t chunks, groups;        // of consecutive windows, of heads; a unit of work is a group of a chunk
  const int64_t* index;          // (windows, N): token at each place, -1 for padding
  const int32_t* region;         // (windows, padded N): shift borders part different regions; -1 for padding
  const uint8_t* parted;         // (windows,): whether a window is not one whole region of whole tiles
  const float* scale;            // (H,): 1 / clamp(tau) or 1 / sqrt(d)
  const float* bias;             // (H, padded N / 16, padded N keys, 16 queries)
  int64_t bias_step;             // floats from head to head; 0 without a bias, which is then zeros
  Rows q, k, v;
  Rows out;                      // forward only
  Rows grad, d_q, d_k, d_v;      // backward only
  // Whether results go past the caches: windows scatter rows that share few sets of a cache, and evict each other.
  // Only for whole aligned lines, of more than what the next operation would find in a cache.
  bool streamed;
  float* d_bias;                 // (chunks, H, ...) as bias, or null
  float* d_scale;                // (chunks, H, 16) or null
};

namespace AUDIOMAE_TIER {
namespace {

constexpr float kLowest = -3.402823466e38f;
constexpr float kInfinity = __builtin_inff();
constexpr float kBorder = -100.0f;   // added to cosine scores across a shift border
constexpr float kMaxInverse = 1e6f;  // of |q||k|, which is clamped from below to 1e-6

// Scratch of one thread, carved up. It comes zeroed, and what only pads stays zero.
struct Buffers {
  float *q, *q_columns, *q_inverse;           // 16 queries: rows, transposed, 1 / norm
  float *k, *k_inverse, *v;                   // all keys
  float *p, *cosine;                          // (padded N keys, 16 queries)
  float *grad, *grad_columns;                 // as q
  float *d_scores;                            // as p
  float *q_factor, *k_factor, *k_sums;        // what the norms add to the gradients
  float *d_k, *d_v;                           // sums over blocks of queries, if there are several
  float *packed;                              // bfloat16 pairs
};

int64_t carve(const WindowAttention& w, bool backward, float* base, Buffers& s) {
  const int64_t tile = kTile * w.padded_width, keys = w.padded_tokens * w.padded_width;
  const int64_t scores = w.padded_tokens * kTile;
  int64_t used = 0;
  const auto take = [&](int64_t floats, bool needed = true) {
    float* start = base + used;
    used += needed ? floats : 0;
    return start;
  };
  s.q = take(tile);
  s.q_columns = take(tile);
  s.q_inverse = take(kTile);
  s.k = take(keys);
  s.k_inverse = take(w.padded_tokens);
  s.v = take(keys);
  s.p = take(scores);
  s.packed = take(4 * kTile * kTile / 2);  // three arrays; an AMX tile is transposed with what follows it
  s.cosine = take(scores, backward);
  s.grad = take(tile, backward);
  s.grad_columns = take(tile, backward);
  s.d_scores = take(scores, backward);
  s.q_factor = take(kTile, backward);
  s.k_factor = take(w.padded_tokens, backward);
  s.k_sums = take(scores, backward);
  s.d_k = take(keys, backward && w.padded_tokens > kTile);
  s.d_v = take(keys, backward && w.padded_tokens > kTile);
  return used;
}

// The sizes that are known at compile time; 0: not known.
template <int kWidth, int kTokens>
struct Sizes {
  static constexpr bool kOneTile = kTokens == kTile;
  static constexpr bool kWholeRows = kWidth > 0 && kWidth % kTile == 0;
  static int64_t width(const WindowAttention& w) { return kWidth ? kWidth : w.width; }
  static int64_t padded_width(const WindowAttention& w) { return kWidth ? kWidth : w.padded_width; }
  static int64_t tokens(const WindowAttention& w) { return kTokens ? kTokens : w.tokens; }
  static int64_t padded_tokens(const WindowAttention& w) { return kTokens ? kTokens : w.padded_tokens; }
};

// One window of one head.
struct Place {
  int64_t clip, window, head;
};

inline char* start(const Rows& rows, const Place& at) {
  return rows.data + at.clip * rows.clip + at.head * rows.head;
}

// Stores may alias whatever is behind a pointer: loops read what they need of their arguments beforehand.

// Rows to float32 scratch: those of `count` tokens, zeros for padding.
template <class Element, class Size>
void load_rows(const WindowAttention& w, const Rows& rows, const Place& at, const int64_t* index, int64_t count,
               float* out) {
  const int64_t width = Size::width(w), pitch = Size::padded_width(w), step = rows.token;
  const char* in = start(rows, at);
#pragma GCC unroll 4
  for (int64_t r = 0; r < count; ++r, out += pitch) {
    if (__builtin_expect(index[r] < 0, 0)) {
      for (int64_t c = 0; c < pitch; c += kLanes) store(out + c, Floats{});
      continue;
    }
    const char* row = in + index[r] * step;
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) store(out + c, load<Element>(row + c * sizeof(Element), All{}));
    if (!Size::kWholeRows && c < width) store(out + c, load<Element>(row + c * sizeof(Element), width - c));
  }
}

template <class Element, class Size>
inline void store_row(char* row, int64_t width, int64_t c, Floats x, bool streamed) {
  char* to = row + c * sizeof(Element);
  if (streamed) {
    stream<Element>(to, x);
  } else if (Size::kWholeRows || c + kLanes <= width) {
    store<Element>(to, x, All{});
  } else if (c < width) {
    store<Element>(to, x, width - c);
  }
}

// Asks for the rows of the window that comes next, all heads at once and a share with each head of this one: by the
// time they are needed they are in the L2 cache. The hardware foresees neither jump. One operand at a time, with
// arithmetic in between: more requests than a core can have under way would keep its own loads waiting.
template <class Element>
struct Ahead {
  const WindowAttention& w;
  Place next;
  int64_t share, shares;  // of the tokens; no shares: no next window

  void ask(const Rows& rows) const {
    if (shares == 0) return;
    __asm__ volatile("");  // GCC takes a function that only prefetches for one without effect, and drops its calls
    const int64_t* index = w.index + next.window * w.tokens;
    const int64_t bytes = shares * w.width * sizeof(Element);
    const char* in = start(rows, next);
    for (int64_t i = share * w.tokens / shares; i < (share + 1) * w.tokens / shares; ++i) {
      const char* row = in + (index[i] < 0 ? 0 : index[i]) * rows.token;
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
  }
};

template <class Size>
void transpose_rows(const WindowAttention& w, const float* in, float* out) {
  const int64_t width = Size::padded_width(w);
  for (int64_t c = 0; c < width; c += kTile) transpose(in + c, width, out + c * kTile);
}

// Scores of 16 queries: 16 or all keys, one vector of queries each.
struct InRegisters {
  Floats keys[kTile];
  Floats get(int64_t j) const { return keys[j]; }
  void put(int64_t j, Floats x) { keys[j] = x; }
};
struct InMemory {
  float* keys;
  Floats get(int64_t j) const { return load(keys + j * kTile); }
  void put(int64_t j, Floats x) const { store(keys + j * kTile, x); }
};
struct Nowhere {
  void put(int64_t, Floats) const {}
};

// A tile of scores, out.put(j, sum over c of columns[c][i] * rows[j][c]) for kRows j and the i of kColumns vectors.
template <class Size, int kRows, int kColumns, class Scores>
inline void multiply_scores(const WindowAttention& w, const float* columns, const float* rows, Scores* out) {
  const int64_t width = Size::padded_width(w);
  Floats sums[kRows][kColumns] = {};
#pragma GCC unroll 2
  for (int64_t c = 0; c < width; ++c) {
    Floats x[kColumns];
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) x[v] = load(columns + c * kTile + v * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      const Floats y = broadcast(rows[j * width + c]);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) sums[j][v] = fma(x[v], y, sums[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) out[v].put(j, sums[j][v]);
  }
}

// All keys into memory.
template <class Size>
void multiply_scores(const WindowAttention& w, const float* columns, const float* rows, float* out) {
  constexpr int kRows = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;  // as the registers allow
  const int64_t width = Size::padded_width(w), keys = Size::padded_tokens(w);
  for (int64_t j = 0; j < keys; j += kRows) {
    InMemory scores[kVectors];
    for (int v = 0; v < kVectors; ++v) scores[v].keys = out + j * kTile + v * kLanes;
    multiply_scores<Size, kRows, kVectors>(w, columns, rows + j * width, scores);
  }
}

// done(r, c, sum over l < count of factors[l][r] * rows[l][c]) for 16 r and the c of kColumns vectors; with
// kAlong, of factors[r][l]. Rows of factors are kTile apart.
template <class Size, bool kAlong, int kColumns, class Done>
inline void multiply_columns(const float* factors, const float* rows, int64_t width, int64_t count, int64_t c,
                             const Done& done) {
  constexpr int kRows = (kLanes == 16 ? 16 : 8) / kColumns;
  constexpr int64_t kStep = kAlong ? kTile : 1;
  for (int r0 = 0; r0 < kTile; r0 += kRows) {
    Floats sums[kRows][kColumns] = {};
    const float *factor = factors + r0 * kStep, *row = rows + c;
#pragma GCC unroll 2
    for (int64_t l = 0; l < count; ++l, factor += kTile / kStep, row += width) {
      Floats x[kColumns];
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) x[v] = load(row + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Floats f = broadcast(factor[r * kStep]);
#pragma GCC unroll 4
        for (int v = 0; v < kColumns; ++v) sums[r][v] = fma(f, x[v], sums[r][v]);
      }
    }
    if constexpr (Size::kWholeRows) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kColumns; ++v) done(r0 + r, c + v * kLanes, sums[r][v]);
      }
    } else {  // one copy of `done`, which is not small
      float results[kRows * kColumns * kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kColumns; ++v) store(results + (r * kColumns + v) * kLanes, sums[r][v]);
      }
#pragma GCC unroll 1
      for (int i = 0; i < kRows * kColumns; ++i) {
        done(r0 + i / kColumns, c + i % kColumns * kLanes, load(results + i * kLanes));
      }
    }
  }
}

template <class Size, bool kAlong, class Done>
inline void multiply(const WindowAttention& w, const float* factors, const float* rows, int64_t count,
                     const Done& done) {
  const int64_t width = Size::padded_width(w);
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    multiply_columns<Size, kAlong, 2>(factors, rows, width, count, c, done);
  }
  if (c < width) multiply_columns<Size, kAlong, 1>(factors, rows, width, count, c, done);
}

// 1 / |x| of 16 columns and of 16 rows.
template <class Size>
void inverse_norms_of_columns(const WindowAttention& w, const float* columns, float* out) {
  const int64_t width = Size::padded_width(w);
  for (int i = 0; i < kTile; i += kLanes) {
    Floats even{}, odd{};
    for (int64_t c = 0; c < width; c += 2) {
      const Floats x = load(columns + c * kTile + i), y = load(columns + (c + 1) * kTile + i);
      even = fma(x, x, even);
      odd = fma(y, y, odd);
    }
    store(out + i, 1.0f / sqrt(even + odd));
  }
}

template <class Size>
void inverse_norms_of_rows(const WindowAttention& w, const float* rows, float* out) {
  const int64_t width = Size::padded_width(w);
  Floats squares[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    Floats sum{};
    for (int64_t c = 0; c < width; c += kLanes) {
      const Floats x = load(rows + r * width + c);
      sum = fma(x, x, sum);
    }
    squares[r] = sum;
  }
  sum_rows(squares, out);
  for (int i = 0; i < kTile; i += kLanes) store(out + i, 1.0f / sqrt(load(out + i)));
}

// From dot products of the queries first + [i, i + kLanes) to probabilities.
template <class Size, bool kCosine, bool kParted, class Scores, class Cosines>
inline void softmax(const WindowAttention& w, const Buffers& s, const Place& at, int64_t first, int i,
                    Scores& scores, const Cosines& cosines) {
  const int64_t tokens = Size::tokens(w), padded = Size::padded_tokens(w);
  const int32_t* region = w.region + at.window * padded;
  const float* bias = w.bias + at.head * w.bias_step + first * padded + i;
  const float* k_inverse = s.k_inverse;
  const Floats scale = broadcast(w.scale[at.head]), q_inverse = load(s.q_inverse + i);
  Ints query{};
  if (kParted) __builtin_memcpy(&query, region + first + i, sizeof(query));
  constexpr int kChains = 4;  // sums that do not wait for each other
  Floats tops[kChains], sums[kChains] = {};
  for (Floats& top : tops) top = broadcast(kLowest);
#pragma GCC unroll 16
  for (int64_t j = 0; j < tokens; ++j) {
    Floats x = scores.get(j);
    if (kCosine) {
      x *= min(broadcast(kMaxInverse), q_inverse * broadcast(k_inverse[j]));
      cosines.put(j, x);
    }
    x = fma(x, scale, load(bias + j * kTile));
    if (kParted) {
      const Ints across = query != region[j];
      x = kCosine ? x + select(across, broadcast(kBorder), Floats{}) : select(across, broadcast(kLowest), x);
      if (region[j] < 0) x = broadcast(kLowest);
    }
    scores.put(j, x);
    tops[j % kChains] = max(tops[j % kChains], x);
  }
  const Floats top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
#pragma GCC unroll 16
  for (int64_t j = 0; j < tokens; ++j) {
    const Floats x = exp_of_negative(scores.get(j) - top);
    scores.put(j, x);
    sums[j % kChains] += x;
  }
  const Floats inverse = 1.0f / ((sums[0] + sums[1]) + (sums[2] + sums[3]));
#pragma GCC unroll 16
  for (int64_t j = 0; j < tokens; ++j) {
    Floats x = scores.get(j) * inverse;
    if (kParted) x = select(query >= 0, x, Floats{});
    scores.put(j, x);
  }
}

// From the gradients of those probabilities to what multiplies k and q in the gradients of q and k. Adds up the
// gradients of the bias and of the scale, and what flows through the norms of q and k.
template <class Size, bool kCosine, bool kParted, class Scores>
inline void softmax_backward(const WindowAttention& w, const Buffers& s, const Place& at, int64_t first, int i,
                             Scores& scores, float* d_bias, float* d_scale) {
  const int64_t tokens = Size::tokens(w), padded = Size::padded_tokens(w);
  const int32_t* region = w.region + at.window * padded;
  const float *p = s.p + i, *cosine = s.cosine + i, *k_inverse = s.k_inverse;
  float* k_sums = s.k_sums;
  const Floats scale = broadcast(w.scale[at.head]), q_inverse = load(s.q_inverse + i);
  Ints query{};
  if (kParted) __builtin_memcpy(&query, region + first + i, sizeof(query));
  constexpr int kChains = 4;
  Floats means[kChains] = {}, q_sums[kChains] = {}, scale_sums[kChains] = {};
#pragma GCC unroll 16
  for (int64_t j = 0; j < tokens; ++j) {
    means[j % kChains] = fma(load(p + j * kTile), scores.get(j), means[j % kChains]);
  }
  const Floats mean = (means[0] + means[1]) + (means[2] + means[3]);
#pragma GCC unroll 16
  for (int64_t j = 0; j < tokens; ++j) {
    Floats x = load(p + j * kTile) * (scores.get(j) - mean);
    if (kParted) x = select(query >= 0, region[j] < 0 ? Floats{} : x, Floats{});
    scores.put(j, x);
  }
  if (d_bias) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < tokens; ++j) {
      float* sum = d_bias + (first * padded + i) + j * kTile;
      store(sum, load(sum) + scores.get(j));
    }
  }
#pragma GCC unroll 16
  for (int64_t j = 0; j < tokens; ++j) {
    Floats x = scores.get(j);
    if (kCosine) {
      const Floats inverse = q_inverse * broadcast(k_inverse[j]), by_scale = x * load(cosine + j * kTile);
      const Floats by_norm = select(inverse > kMaxInverse, Floats{}, by_scale);  // none through a clamped norm
      float* k_sum = k_sums + j * kLanes;
      store(k_sum, i == 0 ? by_norm : load(k_sum) + by_norm);
      q_sums[j % kChains] += by_norm;
      scale_sums[j % kChains] += by_scale;
      x *= min(broadcast(kMaxInverse), inverse);
    }
    scores.put(j, x * scale);
  }
  if (kCosine) {
    const Floats inverse = select(q_inverse == kInfinity, Floats{}, q_inverse);
    const Floats q_sum = (q_sums[0] + q_sums[1]) + (q_sums[2] + q_sums[3]);
    const Floats scale_sum = (scale_sums[0] + scale_sums[1]) + (scale_sums[2] + scale_sums[3]);
    store(s.q_factor + i, q_sum * scale * inverse * inverse);
    if (d_scale) store(d_scale + i, load(d_scale + i) + scale_sum);
  }
}

// What the norms of the keys contribute: from k_sums to k_factor.
template <class Size>
void finish_key_factors(const WindowAttention& w, const Buffers& s, const Place& at, int64_t first) {
  const float scale = w.scale[at.head];
  for (int64_t j = 0; j < Size::padded_tokens(w); j += kTile) {
    Floats rows[kTile];
    float sums[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) rows[r] = load(s.k_sums + (j + r) * kLanes);
    sum_rows(rows, sums);
    for (int r = 0; r < kTile; r += kLanes) {
      const Floats k_inverse = load(s.k_inverse + j + r);
      const Floats inverse = select(k_inverse == kInfinity, Floats{}, k_inverse);
      const Floats factor = load(sums + r) * scale * inverse * inverse;
      store(s.k_factor + j + r, first == 0 ? factor : load(s.k_factor + j + r) + factor);
    }
  }
}

// Calls softmax(scores, i) or its backward for each vector of 16 queries, with the scores where the tier wants them.
template <class Size, class Function>
inline void for_each_vector_of_queries(const WindowAttention& w, const float* columns, const float* rows,
                                       float* out, const Function& function) {
  if constexpr (Size::kOneTile && kLanes == kTile) {
    InRegisters scores;
    multiply_scores<Size, kTile, 1>(w, columns, rows, &scores);
    function(scores, 0);
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) store(out + j * kTile, scores.keys[j]);
  } else {
    multiply_scores<Size>(w, columns, rows, out);
    for (int i = 0; i < kTile; i += kLanes) {
      InMemory scores{out + i};
      function(scores, i);
    }
  }
}

template <class Element, class Size>
void load_queries(const WindowAttention& w, const Rows& rows, const Place& at, int64_t first, float* out,
                  float* columns) {
  const int64_t tokens = Size::tokens(w), width = Size::padded_width(w);
  const int64_t count = tokens - first < kTile ? tokens - first : kTile;
  load_rows<Element, Size>(w, rows, at, w.index + at.window * tokens + first, count, out);
  for (int64_t i = count * width; i < kTile * width; i += kLanes) store(out + i, Floats{});
  transpose_rows<Size>(w, out, columns);
}

// Calls f.run<kCosine, kParted>().
template <class Function>
inline void with_flags(bool cosine, bool parted, const Function& f) {
  if (cosine) {
    parted ? f.template run<true, true>() : f.template run<true, false>();
  } else {
    parted ? f.template run<false, true>() : f.template run<false, false>();
  }
}

template <class Element, class Size, bool kBackward>
struct Attend {
  const WindowAttention& w;
  const Buffers& s;
  const Place& at;
  int64_t first;

  template <bool kCosine, bool kParted>
  void run() const {
    for_each_vector_of_queries<Size>(w, s.q_columns, s.k, s.p, [&](auto& scores, int i) {
      if constexpr (kBackward) {
        softmax<Size, kCosine, kParted>(w, s, at, first, i, scores, InMemory{s.cosine + i});
      } else {
        softmax<Size, kCosine, kParted>(w, s, at, first, i, scores, Nowhere{});
      }
    });
  }
};

template <class Size>
struct AttendBackward {
  const WindowAttention& w;
  const Buffers& s;
  const Place& at;
  int64_t first;
  float *d_bias, *d_scale;

  template <bool kCosine, bool kParted>
  void run() const {
    for_each_vector_of_queries<Size>(w, s.grad_columns, s.v, s.d_scores, [&](auto& scores, int i) {
      softmax_backward<Size, kCosine, kParted>(w, s, at, first, i, scores, d_bias, d_scale);
    });
  }
};

// Keys and values of a window.
template <class Element, class Size>
void load_keys(const WindowAttention& w, const Buffers& s, const Place& at) {
  const int64_t tokens = Size::tokens(w), padded = Size::padded_tokens(w);
  load_rows<Element, Size>(w, w.k, at, w.index + at.window * tokens, tokens, s.k);
  load_rows<Element, Size>(w, w.v, at, w.index + at.window * tokens, tokens, s.v);
  for (int64_t j = 0; w.cosine && j < padded; j += kTile) {
    inverse_norms_of_rows<Size>(w, s.k + j * Size::padded_width(w), s.k_inverse + j);
  }
}

// Probabilities of 16 queries, of padding none.
template <class Element, class Size, bool kBackward>
void attend(const WindowAttention& w, const Buffers& s, const Place& at, int64_t first) {
  load_queries<Element, Size>(w, w.q, at, first, s.q, s.q_columns);
  if (w.cosine) inverse_norms_of_columns<Size>(w, s.q_columns, s.q_inverse);
  with_flags(w.cosine, w.parted[at.window], Attend<Element, Size, kBackward>{w, s, at, first});
}

template <class Element, class Size>
void forward(const WindowAttention& w, const Buffers& s, const Place& at, const Ahead<Element>& ahead) {
  const int64_t tokens = Size::tokens(w), width = Size::width(w), step = w.out.token;
  const bool streamed = w.streamed;
  const int64_t* index = w.index + at.window * tokens;
  char* out = start(w.out, at);
  load_keys<Element, Size>(w, s, at);
  ahead.ask(w.q);
  for (int64_t first = 0; first < tokens; first += kTile) {
    attend<Element, Size, false>(w, s, at, first);
    if (first == 0) ahead.ask(w.k);
    multiply<Size, false>(w, s.p, s.v, tokens, [=](int64_t i, int64_t c, Floats x) {
      i += first;
      if (Size::kOneTile || i < tokens) {
        if (index[i] >= 0) store_row<Element, Size>(out + index[i] * step, width, c, x, streamed);
      }
    });
  }
  ahead.ask(w.v);
}

template <class Element, class Size>
void backward(const WindowAttention& w, const Buffers& s, const Place& at, const Ahead<Element>& ahead,
              float* d_bias, float* d_scale) {
  const int64_t tokens = Size::tokens(w), padded = Size::padded_tokens(w);
  const int64_t width = Size::width(w), pitch = Size::padded_width(w), step = w.d_q.token;
  const int64_t* index = w.index + at.window * tokens;
  char *d_q = start(w.d_q, at), *d_k = start(w.d_k, at), *d_v = start(w.d_v, at);
  const bool cosine = w.cosine, streamed = w.streamed;
  const float *q = s.q, *k = s.k, *q_factor = s.q_factor, *k_factor = s.k_factor;
  load_keys<Element, Size>(w, s, at);
  ahead.ask(w.q);
  for (int64_t first = 0; first < tokens; first += kTile) {
    attend<Element, Size, true>(w, s, at, first);
    if (first == 0) ahead.ask(w.k);
    load_queries<Element, Size>(w, w.grad, at, first, s.grad, s.grad_columns);
    with_flags(cosine, w.parted[at.window], AttendBackward<Size>{w, s, at, first, d_bias, d_scale});
    if (first == 0) ahead.ask(w.v);
    if (cosine) finish_key_factors<Size>(w, s, at, first);
    multiply<Size, false>(w, s.d_scores, k, tokens, [=](int64_t i, int64_t c, Floats x) {
      if (cosine) x -= load(q + i * pitch + c) * q_factor[i];
      i += first;
      if (Size::kOneTile || i < tokens) {
        if (index[i] >= 0) store_row<Element, Size>(d_q + index[i] * step, width, c, x, streamed);
      }
    });
    if (first == 0) ahead.ask(w.grad);
    const bool last = first + kTile >= tokens;
    for (int64_t j0 = 0; j0 < padded; j0 += kTile) {
      // Adds up over the blocks of queries, then writes the row of a key.
      const auto finish = [=](char* out, float* sums, int64_t j, int64_t c, Floats x, auto correct) {
        j += j0;
        if (!Size::kOneTile) {
          if (first > 0) x += load(sums + j * pitch + c);
          if (!last) return store(sums + j * pitch + c, x);
          if (j >= tokens) return;
        }
        if (index[j] >= 0) store_row<Element, Size>(out + index[j] * step, width, c, correct(x, j, c), streamed);
      };
      float *k_sums = s.d_k, *v_sums = s.d_v;
      multiply<Size, true>(w, s.d_scores + j0 * kTile, q, kTile, [=](int64_t j, int64_t c, Floats x) {
        finish(d_k, k_sums, j, c, x, [=](Floats y, int64_t key, int64_t channel) {
          return cosine ? y - load(k + key * pitch + channel) * k_factor[key] : y;
        });
      });
      multiply<Size, true>(w, s.p + j0 * kTile, s.grad, kTile, [=](int64_t j, int64_t c, Floats x) {
        finish(d_v, v_sums, j, c, x, [](Floats y, int64_t, int64_t) { return y; });
      });
    }
  }
}

template <class Element, class Size>
struct Window {
  static constexpr auto forward = audiomae::AUDIOMAE_TIER::forward<Element, Size>;
  static constexpr auto backward = audiomae::AUDIOMAE_TIER::backward<Element, Size>;
};

#if defined(__AVX512BF16__)
#include "window_attention_bf16.h"

template <>
struct Window<BFloat16, Sizes<32, kTile>> {
  static constexpr auto forward = forward_pairs;
  static constexpr auto backward = backward_pairs;
};
#endif

// Units of work [begin, end): a group of heads of a chunk of windows each, chunk by chunk.
template <class Element, class Size, bool kBackward>
void run(const WindowAttention& w, const Buffers& s, int64_t begin, int64_t end) {
  const int64_t windows = w.clips * w.windows, scores = w.padded_tokens * w.padded_tokens;
  const auto first_window = [&](int64_t chunk) { return chunk * windows / w.chunks; };
  const auto first_head = [&](int64_t group) { return group * w.heads / w.groups; };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / w.groups, stop = first_window(chunk + 1);
    const int64_t head0 = first_head(unit % w.groups), head1 = first_head(unit % w.groups + 1);
    for (int64_t window = first_window(chunk); window < stop; ++window) {
      const bool fresh = window == first_window(chunk);
      const Place next{(window + 1) / w.windows, (window + 1) % w.windows, head0};
      for (int64_t head = head0; head < head1; ++head) {
        const Place at{window / w.windows, window % w.windows, head};
        const Ahead<Element> ahead{w, next, head - head0, window + 1 < windows ? head1 - head0 : 0};
        if constexpr (kBackward) {
          const int64_t partial = chunk * w.heads + head;
          float* d_bias = w.d_bias ? w.d_bias + partial * scores : nullptr;
          float* d_scale = w.d_scale ? w.d_scale + partial * kTile : nullptr;
          for (int64_t i = 0; fresh && d_bias && i < scores; i += kLanes) store(d_bias + i, Floats{});
          for (int i = 0; fresh && d_scale && i < kTile; i += kLanes) store(d_scale + i, Floats{});
          Window<Element, Size>::backward(w, s, at, ahead, d_bias, d_scale);
        } else {
          Window<Element, Size>::forward(w, s, at, ahead);
        }
      }
    }
  }
  if (w.streamed) fence();
}

template <class Element, bool kBackward>
void run_sizes(const WindowAttention& w, float* scratch, int64_t begin, int64_t end) {
  Buffers s;
  carve(w, kBackward, scratch, s);
  if (w.tokens == kTile && w.width == 32) {
#ifdef AUDIOMAE_TILES
    const Tiles tiles;
#endif
    return run<Element, Sizes<32, kTile>, kBackward>(w, s, begin, end);
  }
  if (w.tokens == kTile) return run<Element, Sizes<0, kTile>, kBackward>(w, s, begin, end);
  run<Element, Sizes<0, 0>, kBackward>(w, s, begin, end);
}

}  // namespace

// Floats of scratch, zeroed, that a call of one of the two below needs.
int64_t window_attention_scratch(const WindowAttention& w, bool backward) {
  Buffers s;
  return carve(w, backward, nullptr, s);
}

void window_attention_forward(const WindowAttention& w, float* scratch, int64_t begin, int64_t end) {
  if (w.bfloat16) return run_sizes<BFloat16, false>(w, scratch, begin, end);
  run_sizes<float, false>(w, scratch, begin, end);
}

void window_attention_backward(const WindowAttention& w, float* scratch, int64_t begin, int64_t end) {
  if (w.bfloat16) return run_sizes<BFloat16, true>(w, scratch, begin, end);
  run_sizes<float, true>(w, scratch, begin, end);
}

// sums[e] += the e-th of each of `count` arrays of `size` floats, in their order, for e in [begin, end).
void add_arrays(const float* arrays, int64_t count, int64_t size, float* sums, int64_t begin, int64_t end) {
  for (int64_t a = 0; a < count; ++a) {
    for (int64_t e = begin; e < end; ++e) sums[e] += arrays[a * size + e];
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

AUDIOMAE_DECLARE(int64_t window_attention_scratch(const WindowAttention& w, bool backward))
AUDIOMAE_DECLARE(void window_attention_forward(const WindowAttention& w, float* scratch, int64_t begin,
                                               int64_t end))
AUDIOMAE_DECLARE(void window_attention_backward(const WindowAttention& w, float* scratch, int64_t begin,
                                                int64_t end))
AUDIOMAE_DECLARE(void add_arrays(const float* arrays, int64_t count, int64_t size, float* sums, int64_t begin,
                                 int64_t end))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 16, kLine = 64;
constexpr float kMinTau = 0.01f;
constexpr int64_t kStreamedBytes = 4 << 20;  // results from this size on go past the caches
constexpr int64_t kMaxChunks = 64, kMaxPartialFloats = 1 << 22;

int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// The geometry of a call, (time, frequency) each, as the reference has it after clipping window and shift.
struct Geometry {
  int64_t grid_t, grid_f, window_t, window_f, shift_t, shift_f;
};

// Each place of a rolled and padded axis: the token there, -1 for padding, and whether it wrapped round.
struct Axis {
  std::vector<int64_t> token;
  std::vector<int32_t> wrapped;

  Axis(int64_t size, int64_t window, int64_t shift) {
    const int64_t padded = round_up(size, window);
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t place = (i + shift) % padded;
      token.push_back(place < size ? place : -1);
      wrapped.push_back(place < shift);
    }
  }
};

// A call's checked arguments, with the memory behind the pointers.
struct Problem {
  WindowAttention w{};
  Tensor qkv;
  std::vector<int64_t> index;
  std::vector<int32_t> region;
  std::vector<uint8_t> parted;
  std::vector<float> tau, scale, bias;

  Problem(const Tensor& packed, const std::optional<Tensor>& tau, const std::optional<Tensor>& bias,
          const Geometry& g);
  Problem(const Problem&) = delete;

 private:
  void set_windows(const Geometry& g);
  void set_scale(const std::optional<Tensor>& tensor);
  void set_bias(const Tensor& tensor);
};

// The part (0: q, 1: k, 2: v) of a (B, L, 3, H, d) tensor.
Rows part(const Tensor& qkv, const void* data, int64_t i) {
  char* first = static_cast<char*>(const_cast<void*>(data));
  return {first + i * byte_step(qkv, 2), byte_step(qkv, 0), byte_step(qkv, 1), byte_step(qkv, 3)};
}

// The heads of a (B, L, H * d) tensor.
Rows heads(const Tensor& x, const void* data, int64_t width) {
  return {static_cast<char*>(const_cast<void*>(data)), byte_step(x, 0), byte_step(x, 1),
          width * int64_t(x.element_size())};
}

Problem::Problem(const Tensor& packed, const std::optional<Tensor>& tau, const std::optional<Tensor>& bias,
                 const Geometry& g)
    : qkv(packed) {
  check(g.window_t >= 1 && g.window_f >= 1 && g.window_t <= g.grid_t && g.window_f <= g.grid_f,
        "window_attention expects a window that fits the grid, got a window of ", g.window_t, " x ", g.window_f,
        " and a grid of ", g.grid_t, " x ", g.grid_f, ".");
  check(g.shift_t >= 0 && g.shift_f >= 0 && g.shift_t < g.window_t && g.shift_f < g.window_f,
        "window_attention expects a shift smaller than the window of ", g.window_t, " x ", g.window_f, ", got (",
        g.shift_t, ", ", g.shift_f, ").");
  check(packed.dim() == 5 && packed.size(1) == g.grid_t * g.grid_f && packed.size(2) == 3,
        "window_attention expects qkv of shape (batch, ", g.grid_t * g.grid_f, ", 3, heads, channels), got ",
        shape(packed), ".");
  check(is_float32_or_bfloat16(packed), "window_attention expects float32 or bfloat16 qkv, got ",
        dtype_name(packed), ".");
  w.bfloat16 = is_bfloat16(packed);
  w.cosine = tau.has_value();
  w.clips = packed.size(0);
  w.heads = packed.size(3);
  w.width = packed.size(4);
  w.tokens = g.window_t * g.window_f;
  w.padded_width = round_up(w.width, kTile);
  w.padded_tokens = round_up(w.tokens, kTile);
  check(!tau || (tau->dim() == 1 && tau->size(0) == w.heads), "window_attention expects tau of shape (", w.heads,
        ",), got ", tau ? shape(*tau) : "", ".");
  check(!bias || (bias->dim() == 3 && bias->size(0) == w.heads && bias->size(1) == w.tokens &&
                  bias->size(2) == w.tokens),
        "window_attention expects bias of shape (", w.heads, ", ", w.tokens, ", ", w.tokens, "), got ",
        bias ? shape(*bias) : "", ".");
  check(packed.is_cpu() && (!tau || tau->is_cpu()) && (!bias || bias->is_cpu()),
        "window_attention of the native library expects CPU tensors.");

  qkv = rows_in_one_piece(packed);
  w.q = part(qkv, qkv.const_data_ptr(), 0);
  w.k = part(qkv, qkv.const_data_ptr(), 1);
  w.v = part(qkv, qkv.const_data_ptr(), 2);
  set_windows(g);
  set_scale(tau);
  if (bias) {
    set_bias(*bias);
  } else {
    this->bias.assign(w.padded_tokens * w.padded_tokens, 0.0f);
  }
  w.bias = this->bias.data();
}

void Problem::set_windows(const Geometry& g) {
  const Axis t(g.grid_t, g.window_t, g.shift_t), f(g.grid_f, g.window_f, g.shift_f);
  const int64_t padded_t = t.token.size(), padded_f = f.token.size();
  for (int64_t t0 = 0; t0 < padded_t; t0 += g.window_t) {
    for (int64_t f0 = 0; f0 < padded_f; f0 += g.window_f) {
      const int64_t first = region.size();
      for (int64_t i = t0; i < t0 + g.window_t; ++i) {
        for (int64_t j = f0; j < f0 + g.window_f; ++j) {
          const bool inside = t.token[i] >= 0 && f.token[j] >= 0;
          index.push_back(inside ? t.token[i] * g.grid_f + f.token[j] : -1);
          region.push_back(inside ? 2 * t.wrapped[i] + f.wrapped[j] : -1);
        }
      }
      region.resize(first + w.padded_tokens, -1);
      parted.push_back(region[first] < 0 || std::any_of(region.begin() + first, region.end(), [&](int32_t other) {
        return other != region[first];
      }));
    }
  }
  w.windows = parted.size();
  w.index = index.data();
  w.region = region.data();
  w.parted = parted.data();
}

void Problem::set_scale(const std::optional<Tensor>& tensor) {
  if (tensor) {
    const Tensor values = float32_in_one_piece(*tensor);
    tau.resize(w.heads);
    if (w.heads) std::memcpy(tau.data(), values.const_data_ptr(), w.heads * sizeof(float));
    for (const float x : tau) scale.push_back(1.0f / (x < kMinTau ? kMinTau : x));
  } else {
    scale.assign(w.heads, float(1.0 / std::sqrt(double(w.width))));
  }
  w.scale = scale.data();
}

// (H, queries, keys) to tiles of 16 queries, transposed and padded.
void Problem::set_bias(const Tensor& tensor) {
  const Tensor values = float32_in_one_piece(tensor);
  const char* value = static_cast<const char*>(values.const_data_ptr());  // not necessarily aligned to a float
  w.bias_step = w.padded_tokens * w.padded_tokens;
  bias.assign(w.heads * w.bias_step, 0.0f);
  for (int64_t h = 0; h < w.heads; ++h) {
    for (int64_t i = 0; i < w.tokens; ++i) {
      float* column = bias.data() + h * w.bias_step + i / kTile * kTile * w.padded_tokens + i % kTile;
      for (int64_t j = 0; j < w.tokens; ++j, value += sizeof(float)) {
        std::memcpy(column + j * kTile, value, sizeof(float));
      }
    }
  }
}

// Shares the units of work out. Their grouping of heads does not touch the result, so it may follow the threads.
template <class Kernel>
void for_all_units(WindowAttention& w, Kernel kernel, bool backward, const Tensor& result) {
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  w.groups = std::min(w.heads, std::max<int64_t>(1, (wanted + w.chunks - 1) / w.chunks));
  const int64_t bytes = result.numel() * result.element_size();
  w.streamed = bytes >= kStreamedBytes && w.width * result.element_size() % kLine == 0 &&
               reinterpret_cast<uintptr_t>(result.const_data_ptr()) % kLine == 0;
  static const auto scratch_size = AUDIOMAE_SELECT_WITH_AMX(window_attention_scratch);
  const int64_t size = scratch_size(w, backward);
  torch::stable::parallel_for(0, w.chunks * w.groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(size);
    std::fill_n(scratch.data(), size, 0.0f);
    kernel(w, scratch.data(), begin, end);
  });
}

Tensor window_attention(const Tensor& qkv, const std::optional<Tensor>& tau, const std::optional<Tensor>& bias,
                        int64_t grid_t, int64_t grid_f, int64_t window_t, int64_t window_f, int64_t shift_t,
                        int64_t shift_f) {
  Problem problem(qkv, tau, bias, {grid_t, grid_f, window_t, window_f, shift_t, shift_f});
  WindowAttention& w = problem.w;
  Tensor out = torch::stable::new_empty(qkv, {w.clips, grid_t * grid_f, w.heads * w.width});
  if (out.numel() == 0) return out;
  w.out = heads(out, out.mutable_data_ptr(), w.width);
  w.chunks = w.clips * w.windows;
  static const auto forward = AUDIOMAE_SELECT_WITH_AMX(window_attention_forward);
  for_all_units(w, forward, false, out);
  return out;
}

// A gradient of a parameter in its dtype; an empty tensor if nobody wants it.
Tensor parameter_gradient(const Tensor& qkv, const std::optional<Tensor>& parameter, bool wanted,
                          const std::vector<float>& values) {
  if (!wanted) return torch::stable::new_empty(parameter ? *parameter : qkv, {0});
  Tensor out = torch::stable::new_empty(*parameter, parameter->sizes(), ScalarType::Float);
  if (out.numel()) std::memcpy(out.mutable_data_ptr(), values.data(), values.size() * sizeof(float));
  return torch::stable::to(out, parameter->scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad, const Tensor& qkv, const std::optional<Tensor>& tau, const std::optional<Tensor>& bias,
    int64_t grid_t, int64_t grid_f, int64_t window_t, int64_t window_f, int64_t shift_t, int64_t shift_f,
    bool wants_qkv, bool wants_tau, bool wants_bias) {
  Problem problem(qkv, tau, bias, {grid_t, grid_f, window_t, window_f, shift_t, shift_f});
  WindowAttention& w = problem.w;
  const int64_t tokens = grid_t * grid_f;
  check(grad.is_cpu() && grad.scalar_type() == qkv.scalar_type() && grad.dim() == 3 && grad.size(0) == w.clips &&
            grad.size(1) == tokens && grad.size(2) == w.heads * w.width,
        "window_attention expects a gradient of shape (", w.clips, ", ", tokens, ", ", w.heads * w.width, ") of ",
        dtype_name(qkv), ", got ", shape(grad), " of ", dtype_name(grad), ".");
  wants_tau = wants_tau && tau;
  wants_bias = wants_bias && bias;

  // Partial sums by chunk, whose number follows from the shapes: the order of addition is the same for any number
  // of threads.
  const int64_t windows = w.clips * w.windows, scores = w.padded_tokens * w.padded_tokens;
  const int64_t size = wants_bias ? w.heads * scores : 0;
  w.chunks = std::min({windows, kMaxChunks, std::max<int64_t>(1, kMaxPartialFloats / std::max<int64_t>(1, size))});
  std::vector<float> bias_sums(size), scale_sums(wants_tau ? w.chunks * w.heads * kTile : 0);
  Tensor d_qkv = torch::stable::new_empty(qkv, {w.clips, tokens, 3, w.heads, w.width});
  if (d_qkv.numel() > 0) {
    const Tensor rows = rows_in_one_piece(grad);
    w.grad = heads(rows, rows.const_data_ptr(), w.width);
    w.d_q = part(d_qkv, d_qkv.mutable_data_ptr(), 0);
    w.d_k = part(d_qkv, d_qkv.mutable_data_ptr(), 1);
    w.d_v = part(d_qkv, d_qkv.mutable_data_ptr(), 2);
    Scratch<float> partials(w.chunks * size);
    w.d_bias = wants_bias ? partials.data() : nullptr;
    w.d_scale = wants_tau ? scale_sums.data() : nullptr;
    static const auto backward = AUDIOMAE_SELECT_WITH_AMX(window_attention_backward);
    for_all_units(w, backward, true, d_qkv);
    static const auto add = AUDIOMAE_SELECT_WITH_AMX(add_arrays);
    torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
      add(w.d_bias, w.chunks, size, bias_sums.data(), begin, end);
    });
  }

  std::vector<float> d_tau, d_bias;
  for (int64_t h = 0; wants_tau && h < w.heads; ++h) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      const float* lanes = scale_sums.data() + (chunk * w.heads + h) * kTile;
      for (int64_t i = 0; i < kTile; ++i) sum += lanes[i];
    }
    const float scale = problem.scale[h];  // 1 / tau, which is constant where tau is clamped
    d_tau.push_back(problem.tau[h] < kMinTau ? 0.0f : float(-sum * scale * scale));
  }
  for (int64_t h = 0; wants_bias && h < w.heads; ++h) {
    for (int64_t i = 0; i < w.tokens; ++i) {
      const float* column = bias_sums.data() + h * scores + i / kTile * kTile * w.padded_tokens + i % kTile;
      for (int64_t j = 0; j < w.tokens; ++j) d_bias.push_back(column[j * kTile]);
    }
  }
  return {wants_qkv ? d_qkv : torch::stable::new_empty(qkv, {0}), parameter_gradient(qkv, tau, wants_tau, d_tau),
          parameter_gradient(qkv, bias, wants_bias, d_bias)};
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&audiomae::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&audiomae::window_attention_backward));
}

#endif  // AUDIOMAE_ENTRY
