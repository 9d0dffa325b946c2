// Included by window_attention.cpp in the tiers with bfloat16 dot products: windows of 16 tokens, heads of 32
// channels. Products of bfloat16 pairs are exact and summed in float32, at twice the rate of float32. What is
// multiplied after the softmax is rounded to bfloat16, as in the eager version.
//
// A word is a pair of what a product sums over: of neighbouring channels in `rows` (16 x 16 words, as they come) and
// `columns` (its transpose). In the AMX tier the rows of a window and head fill a tile, and so do its scores.

struct PairTile {
  float *rows, *columns;
};

constexpr int kRowWords = 16;
constexpr int kPairs = kTile / 2;

inline __m512i load_words(const void* p) { return _mm512_loadu_si512(p); }

inline Floats dot_pairs(__m512i a, __m512i b, Floats sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

inline __m512i broadcast_word(const float* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

// The channels of a row in two vectors, and back.
inline Floats low_half(const float* row) { return load<BFloat16>(row, All{}); }
inline Floats high_half(const float* row) { return load<BFloat16>(row + kRowWords / 2, All{}); }
inline __m512i round_pair(Floats low, Floats high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void load_tile(const WindowAttention& w, const Rows& rows, const Place& at, float* out) {
  const int64_t* index = w.index + at.window * kTile;
  const int64_t step = rows.token;
  const char* in = start(rows, at);
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
    const __m512i row = index[r] < 0 ? __m512i{} : load_words(in + index[r] * step);
    _mm512_storeu_si512(out + r * kRowWords, row);
  }
}

// Where the products of tiles are laid out: 16 x 8 words of factors (16 x 16 with what is not used), 2 x 8 x 16 of
// pairs of rows, 16 x 16 floats of each half of the results. Registers need none of it.
struct ProductScratch {
  float *factors, *pairs, *low, *high;
};

#ifdef AUDIOMAE_TILES

constexpr int kLine = 64;  // bytes

// The tiles of a task: 0 and 1 for sums, 2 x 3 of pairs of channels, 4 x (5, 6) of pairs of tokens.
class Tiles {
 public:
  Tiles() {
    TileShapes shapes{};
    shapes.palette = 1;
    const uint8_t rows[] = {16, 16, 16, 16, 16, kPairs, kPairs};
    for (int t = 0; t < 7; ++t) {
      shapes.rows[t] = rows[t];
      shapes.row_bytes[t] = t == 4 ? kLine / 2 : kLine;
    }
    tile_configure(shapes);
  }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
};

#endif

// scores.keys[j][i] = sum over channels of columns[.][i] * rows[j][.].
#ifdef AUDIOMAE_TILES
inline void multiply_scores(const float* columns, const float* rows, float* sums, InRegisters& scores) {
  AUDIOMAE_TILE_ZERO(0);
  AUDIOMAE_TILE_LOAD(2, rows, kLine);
  AUDIOMAE_TILE_LOAD(3, columns, kLine);
  AUDIOMAE_TILE_DPBF16PS(0, 2, 3);
  AUDIOMAE_TILE_STORE(0, sums, kLine);
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) scores.keys[j] = load(sums + j * kTile);
}
#else
inline void multiply_scores(const float* columns, const float* rows, float*, InRegisters& scores) {
  Floats sums[kTile] = {};
#pragma GCC unroll 2
  for (int c = 0; c < kRowWords; ++c) {
    const __m512i x = load_words(columns + c * kTile);
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) sums[j] = dot_pairs(x, broadcast_word(rows + j * kRowWords + c), sums[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) scores.keys[j] = sums[j];
}
#endif

// done(r, low and high half of the sum over l of factors[l][r] * rows[l]), two l at a time: factors are pairs of
// neighbouring l. With kAlong, of factors[r][l].
#ifdef AUDIOMAE_TILES
template <bool kAlong, class Done>
inline void multiply_pairs(const float* factors, const float* rows, const ProductScratch& s, const Done& done) {
  const __m512i low_order = interleaved(32), high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
#pragma GCC unroll 8
  for (int l = 0; l < kPairs; ++l) {
    const __m512i a = load_words(rows + 2 * l * kRowWords), b = load_words(rows + (2 * l + 1) * kRowWords);
    _mm512_storeu_si512(s.pairs + l * kTile, _mm512_permutex2var_epi16(a, low_order, b));
    _mm512_storeu_si512(s.pairs + (kPairs + l) * kTile, _mm512_permutex2var_epi16(a, high_order, b));
  }
  AUDIOMAE_TILE_ZERO(0);
  AUDIOMAE_TILE_ZERO(1);
  if (kAlong) {
    AUDIOMAE_TILE_LOAD(4, factors, kLine / 2);
  } else {
    transpose(factors, kTile, s.factors);  // of its 16 columns, the first 8 are in use
    AUDIOMAE_TILE_LOAD(4, s.factors, kLine);
  }
  AUDIOMAE_TILE_LOAD(5, s.pairs, kLine);
  AUDIOMAE_TILE_LOAD(6, s.pairs + kPairs * kTile, kLine);
  AUDIOMAE_TILE_DPBF16PS(0, 4, 5);
  AUDIOMAE_TILE_DPBF16PS(1, 4, 6);
  AUDIOMAE_TILE_STORE(0, s.low, kLine);
  AUDIOMAE_TILE_STORE(1, s.high, kLine);
  for (int r = 0; r < kTile; ++r) done(r, load(s.low + r * kTile), load(s.high + r * kTile));
}
#else
template <bool kAlong, class Done>
inline void multiply_pairs(const float* factors, const float* rows, const ProductScratch&, const Done& done) {
  constexpr int kRows = 8;
  const __m512i low_order = interleaved(32), high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
  for (int r0 = 0; r0 < kTile; r0 += kRows) {
    Floats low[kRows] = {}, high[kRows] = {};
#pragma GCC unroll 2
    for (int l = 0; l < kPairs; ++l) {
      const __m512i a = load_words(rows + 2 * l * kRowWords), b = load_words(rows + (2 * l + 1) * kRowWords);
      const __m512i x = _mm512_permutex2var_epi16(a, low_order, b), y = _mm512_permutex2var_epi16(a, high_order, b);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i f = broadcast_word(factors + (kAlong ? (r0 + r) * kPairs + l : l * kTile + r0 + r));
        low[r] = dot_pairs(f, x, low[r]);
        high[r] = dot_pairs(f, y, high[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) done(r0 + r, low[r], high[r]);
  }
}
#endif

// Scores as factors: pairs of keys for each query, and pairs of queries for each key.
inline void pack_keys(const InRegisters& scores, float* out) {
  const __m512i order = interleaved(16);
#pragma GCC unroll 8
  for (int l = 0; l < kPairs; ++l) {
    const __m512i both = round_pair(scores.keys[2 * l], scores.keys[2 * l + 1]);
    _mm512_storeu_si512(out + l * kTile, _mm512_permutexvar_epi16(order, both));
  }
}

inline void pack_queries(const InRegisters& scores, float* out) {
#pragma GCC unroll 8
  for (int j = 0; j < kTile; j += 2) {
    _mm512_storeu_si512(out + j * kPairs, round_pair(scores.keys[j], scores.keys[j + 1]));
  }
}

inline void store_pair(char* row, Floats low, Floats high, bool streamed) {
  const __m512i x = round_pair(low, high);
  if (streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(row), x);
  } else {
    _mm512_storeu_si512(row, x);
  }
}

// The tiles and factors of a window, laid out in the scratch of the float32 kernels.
struct PairScratch {
  PairTile q, k, v, grad;
  float *p_keys, *p_queries, *d_keys, *d_queries;
  ProductScratch products;
};

inline PairScratch pair_scratch(const Buffers& s) {
  constexpr int kFactors = kTile * kPairs, kWords = kTile * kRowWords;  // tiles fill half of the float32 buffers
  return {{s.q, s.q_columns}, {s.k, nullptr},      {s.v, nullptr},          {s.grad, s.grad_columns},
          s.packed,           s.packed + kFactors, s.packed + 2 * kFactors, s.packed,
          {s.q_columns + kWords, s.q + kWords, s.k + kWords, s.v + kWords}};
}

template <bool kBackward>
struct AttendPairs {
  const WindowAttention& w;
  const Buffers& s;
  const PairScratch& pairs;
  const Place& at;

  template <bool kCosine, bool kParted>
  void run() const {
    using Size = Sizes<32, kTile>;
    InRegisters scores;
    multiply_scores(pairs.q.columns, pairs.k.rows, s.p, scores);
    if constexpr (kBackward) {
      softmax<Size, kCosine, kParted>(w, s, at, 0, 0, scores, InMemory{s.cosine});
#pragma GCC unroll 16
      for (int j = 0; j < kTile; ++j) store(s.p + j * kTile, scores.keys[j]);
      pack_queries(scores, pairs.p_queries);
    } else {
      softmax<Size, kCosine, kParted>(w, s, at, 0, 0, scores, Nowhere{});
      pack_keys(scores, pairs.p_keys);
    }
  }
};

struct AttendPairsBackward {
  const WindowAttention& w;
  const Buffers& s;
  const PairScratch& pairs;
  const Place& at;
  float *d_bias, *d_scale;

  template <bool kCosine, bool kParted>
  void run() const {
    InRegisters scores;
    multiply_scores(pairs.grad.columns, pairs.v.rows, s.d_scores, scores);
    softmax_backward<Sizes<32, kTile>, kCosine, kParted>(w, s, at, 0, 0, scores, d_bias, d_scale);
    pack_keys(scores, pairs.d_keys);
    pack_queries(scores, pairs.d_queries);
  }
};

// Loads the window; what forward and backward have in common.
template <bool kBackward>
inline void attend_pairs(const WindowAttention& w, const Buffers& s, const PairScratch& pairs, const Place& at,
                         const Ahead<BFloat16>& ahead) {
  load_tile(w, w.q, at, pairs.q.rows);
  load_tile(w, w.k, at, pairs.k.rows);
  load_tile(w, w.v, at, pairs.v.rows);
  transpose(pairs.q.rows, kRowWords, pairs.q.columns);
  if (w.cosine) {
    Floats even{}, odd{}, squares[kTile];
#pragma GCC unroll 16
    for (int c = 0; c < kRowWords; c += 2) {
      const __m512i x = load_words(pairs.q.columns + c * kTile), y = load_words(pairs.q.columns + (c + 1) * kTile);
      even = dot_pairs(x, x, even);
      odd = dot_pairs(y, y, odd);
    }
    store(s.q_inverse, 1.0f / sqrt(even + odd));
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const __m512i x = load_words(pairs.k.rows + r * kRowWords);
      squares[r] = dot_pairs(x, x, Floats{});
    }
    sum_rows(squares, s.k_inverse);
    store(s.k_inverse, 1.0f / sqrt(load(s.k_inverse)));
  }
  ahead.ask(w.q);
  with_flags(w.cosine, w.parted[at.window], AttendPairs<kBackward>{w, s, pairs, at});
  ahead.ask(w.k);
}

void forward_pairs(const WindowAttention& w, const Buffers& s, const Place& at, const Ahead<BFloat16>& ahead) {
  const PairScratch pairs = pair_scratch(s);
  const int64_t* index = w.index + at.window * kTile;
  const int64_t step = w.out.token;
  char* out = start(w.out, at);
  const bool streamed = w.streamed;
  attend_pairs<false>(w, s, pairs, at, ahead);
  ahead.ask(w.v);
  multiply_pairs<false>(pairs.p_keys, pairs.v.rows, pairs.products, [=](int i, Floats low, Floats high) {
    if (index[i] >= 0) store_pair(out + index[i] * step, low, high, streamed);
  });
}

void backward_pairs(const WindowAttention& w, const Buffers& s, const Place& at, const Ahead<BFloat16>& ahead,
                    float* d_bias, float* d_scale) {
  const PairScratch pairs = pair_scratch(s);
  const int64_t* index = w.index + at.window * kTile;
  const int64_t step = w.d_q.token;
  char *d_q = start(w.d_q, at), *d_k = start(w.d_k, at), *d_v = start(w.d_v, at);
  const bool cosine = w.cosine, streamed = w.streamed;
  attend_pairs<true>(w, s, pairs, at, ahead);
  load_tile(w, w.grad, at, pairs.grad.rows);
  transpose(pairs.grad.rows, kRowWords, pairs.grad.columns);
  with_flags(cosine, w.parted[at.window], AttendPairsBackward{w, s, pairs, at, d_bias, d_scale});
  ahead.ask(w.v);
  if (cosine) finish_key_factors<Sizes<32, kTile>>(w, s, at, 0);
  // - factor * row is the part of a gradient that flows through the norm.
  const auto finish = [=](char* to, int r, Floats low, Floats high, const float* rows, const float* factors) {
    if (index[r] < 0) return;
    if (cosine) {
      const Floats factor = broadcast(-factors[r]);
      low = fma(factor, low_half(rows + r * kRowWords), low);
      high = fma(factor, high_half(rows + r * kRowWords), high);
    }
    store_pair(to + index[r] * step, low, high, streamed);
  };
  multiply_pairs<false>(pairs.d_keys, pairs.k.rows, pairs.products, [=](int i, Floats low, Floats high) {
    finish(d_q, i, low, high, pairs.q.rows, s.q_factor);
  });
  ahead.ask(w.grad);
  multiply_pairs<true>(pairs.d_queries, pairs.q.rows, pairs.products, [=](int j, Floats low, Floats high) {
    finish(d_k, j, low, high, pairs.k.rows, s.k_factor);
  });
  multiply_pairs<true>(pairs.p_queries, pairs.grad.rows, pairs.products, [=](int j, Floats low, Floats high) {
    if (index[j] >= 0) store_pair(d_v + index[j] * step, low, high, streamed);
  });
}
