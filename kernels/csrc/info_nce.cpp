// info_nce: (B, M, V), (B, M, V) -> scalar and (B, M). Per clip S = X Yᵀ, the mean over rows of
// logsumexp_j S_ij - S_ii, and its gradients, without ever holding S.
//
// A strip is kRows rows of X, a block kBlock rows of Y. Strip by block, S lives in the L1 cache; the
// logsumexp is a running one over the blocks. A strip's result depends on nothing but its clip, so that the
// order of all sums is the same for any number of threads.
//
// Where both sides are bfloat16 and the tier has dot products of them, softmax - I is rounded to bfloat16 for its
// product, as in the eager version.
#include "tier.h"

#include <cstdint>

#include "product.h"

namespace audiomae {

struct Side {
  const char* data;                // (B, M, V)
  int64_t clip_step, row_step;     // bytes
  bool bfloat16;                   // else float32
};

struct InfoNce {
  Side x, y;
  int64_t length, values;          // M, V
  int64_t strips;                  // of a clip
  float* lse;                      // (B, M): written forward, read backward
  float* loss;                     // (B, M): each row's term, forward only
  bool lse_of_columns;             // backward: the softmax that S belongs to runs over X's rows, not Y's
  float scale;                     // backward only
  char* d_x;                       // (B, M, V) contiguous, in X's dtype, backward only
};

namespace AUDIOMAE_TIER {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kStride = kBlock + 16;  // of a strip's rows: not all in the same set of the L1 cache

inline Strip strip_of(const float* rows) { return {reinterpret_cast<const char*>(rows), kStride * 4}; }

inline const char* row_of(const Side& rows, int64_t clip, int64_t row) {
  return rows.data + clip * rows.clip_step + row * rows.row_step;
}

// Asks for the share from / of .. to / of of rows [row, row + n), so that they arrive while something else is
// computed.
inline void ask_for(const InfoNce& e, const Side& rows, int64_t clip, int64_t row, int64_t n, int64_t from,
                    int64_t to, int64_t of) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = e.values * (rows.bfloat16 ? 2 : 4);
  for (int64_t i = row + n * from / of; i < row + n * to / of && i < e.length; ++i) {
    const char* data = row_of(rows, clip, i);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(data + at);
  }
}

// Words [first, first + n) of a row of `values` values; the second half of a last, odd pair is 0.
template <bool kPairs>
inline void read_words(const Side& rows, int64_t clip, int64_t row, int64_t values, int64_t first, int64_t n,
                       float* out) {
  const char* data = row_of(rows, clip, row) + first * (rows.bfloat16 && !kPairs ? 2 : 4);
  if (rows.bfloat16 && !kPairs) {
    for_each_vector(n, [&](int64_t i, int, auto lanes) {
      store<float>(out + i, load<BFloat16>(data + i * 2, lanes), lanes);
    });
    return;
  }
  const bool odd = kPairs && 2 * (first + n) > values;
  for_each_vector(odd ? n - 1 : n, [&](int64_t i, int, auto lanes) {
    store<float>(out + i, load<float>(data + i * 4, lanes), lanes);
  });
  if (odd) {
    out[n - 1] = 0;
    __builtin_memcpy(out + n - 1, data + (n - 1) * 4, 2);
  }
}

// Rows of Y as columns: Panels over the words of a row. Rows past the last one are 0. `rows`: kTile of kStride.
template <bool kPairs>
inline Panels pack_columns(const InfoNce& e, int64_t clip, int64_t j0, int64_t columns, float* rows,
                           float* out) {
  const int64_t used = words<kPairs>(e.values), depth = round_up(used, kTile);
  for (int64_t j = 0; j < round_up(columns, kWhole); j += kTile) {
    for (int64_t word = 0; word < used; word += kBlock) {
      const int64_t n = used - word < kBlock ? used - word : kBlock;
      for (int64_t lane = 0; lane < kTile; ++lane) {
        float* row = rows + lane * kStride;
        if (j + lane < columns) {
          read_words<kPairs>(e.y, clip, j0 + j + lane, e.values, word, n, row);
        } else {
          __builtin_memset(row, 0, n * sizeof(float));
        }
        for (int64_t i = n; i % kTile; ++i) row[i] = 0;
      }
      for (int64_t i = 0; i < n; i += kTile) {
        ask_for(e, e.y, clip, j0 + j + kTile, kTile, word + i, word + i + kTile, depth);
        transpose(rows + i, kStride, out + j * depth + (word + i) * kTile);
      }
    }
  }
  return {out, depth};
}

// Values of Y as columns: Panels over its rows. Values past the last one are 0.
template <bool kPairs>
inline Panels pack_values(const InfoNce& e, int64_t clip, int64_t j0, int64_t columns, float* out) {
  const int64_t depth = words<kPairs>(columns);
  if (e.values % kWhole) __builtin_memset(out, 0, round_up(e.values, kWhole) * depth * sizeof(float));
  const auto place = [=](int64_t v, int64_t word) {
    return out + (v / kTile * depth + word) * kTile + v % kTile;
  };
  for (int64_t word = 0; word < depth; ++word) {
    if constexpr (kPairs) {
      const int64_t j = j0 + 2 * word;
      const bool odd = 2 * word + 1 == columns;
      const char *low = row_of(e.y, clip, j), *high = odd ? low : row_of(e.y, clip, j + 1);
      const uint32_t keep_high = odd ? 0 : ~0u;
      for_each_vector(e.values, [&](int64_t v, int, auto lanes) {
        const Words first = (Words)load<BFloat16>(low + v * 2, lanes) >> 16;
        const Words second = (Words)load<BFloat16>(high + v * 2, lanes) & keep_high;
        store(place(v, word), (Floats)(first | second));
      });
    } else {
      const char* row = row_of(e.y, clip, j0 + word);
      for_each_vector(e.values, [&](int64_t v, int, auto lanes) {
        const Floats y = e.y.bfloat16 ? load<BFloat16>(row + v * 2, lanes) : load<float>(row + v * 4, lanes);
        store(place(v, word), y);
      });
    }
  }
  return {out, depth};
}

// Rows of Y in a block: as few blocks as kBlock allows, of about the same size.
inline int64_t block_of(int64_t length) {
  const int64_t blocks = length > kBlock ? (length + kBlock - 1) / kBlock : 1;
  return round_up((length + blocks - 1) / blocks, kWhole);
}

inline int64_t rows_of(const InfoNce& e, int64_t strip) {
  const int64_t rest = e.length - strip * kRows;
  return rest < kRows ? rest : kRows;
}

// s = the strip of S over the packed block; rows and columns past the last ones are 0.
template <bool kPairs>
inline void scores(const InfoNce& e, int64_t clip, int64_t strip, int64_t columns, const Panels& packed,
                   float* x, float* s) {
  const int64_t rows = rows_of(e, strip), depth = words<kPairs>(e.values), whole = round_up(columns, kColumns);
  // Whole rows of words as they are need no copy.
  const bool in_place = rows == kRows && e.x.bfloat16 == kPairs && !(kPairs && e.values % 2);
  __builtin_memset(x + rows * kStride, 0, (kRows - rows) * kStride * sizeof(float));
  for (int64_t word = 0; word == 0 || word < depth; word += kBlock) {  // S is 0 if there are no values
    const int64_t n = depth - word < kBlock ? depth - word : kBlock;
    for (int64_t i = 0; i < rows && n > 0 && !in_place; ++i) {
      read_words<kPairs>(e.x, clip, strip * kRows + i, e.values, word, n, x + i * kStride);
    }
    const Strip a = in_place ? Strip{row_of(e.x, clip, strip * kRows) + word * 4, e.x.row_step} : strip_of(x);
    for (int64_t j = 0; j < whole; j += kColumns) {
      if (word == 0) ask_for(e, e.x, clip, (strip + 1) * kRows, kRows, j, j + kColumns, whole);
      multiply<kPairs>(a, packed, word, j, n, word > 0, s + j, kStride);
    }
  }
}

constexpr float kLargest = 3.4028235e38f;

// e^(x - highest), where infinity is as large as what is infinitely large.
inline Floats weight(Floats x, Floats highest) {
  return exp_of_negative(min(Floats{}, x - min(broadcast(kLargest), highest)));
}

// Takes n more logits into kLanes running logsumexps side by side, max + log(sum).
inline void update(float* max_so_far, float* sum_so_far, const float* s, int64_t n) {
  const Floats before = load(max_so_far);
  Floats top[kSlots] = {before, before, before, before};
  for_each_vector(n, [&](int64_t j, int slot, auto lanes) {
    top[slot] = max(load<float>(s + j, lanes), top[slot]);
  });
  const Floats highest = max(max(top[0], top[1]), max(top[2], top[3]));
  Floats sum[kSlots] = {load(sum_so_far) * weight(before, highest)};
  for_each_vector(n, [&](int64_t j, int slot, auto lanes) {
    sum[slot] += weight(load<float>(s + j, lanes), highest);
  });
  store(max_so_far, highest);
  store(sum_so_far, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Strips [begin, end) of all clips: lse and loss.
template <bool kPairs>
void forward(const InfoNce& e, int64_t begin, int64_t end, float* scratch) {
  const int64_t block = block_of(e.length);
  float* x = scratch;
  float* s = x + kTile * kStride;
  float* max_so_far = s + kRows * kStride;
  float* sum_so_far = max_so_far + e.strips * kRows * kLanes;
  float* by_column = sum_so_far + e.strips * kRows * kLanes;
  while (begin < end) {
    const int64_t clip = begin / e.strips, first = begin % e.strips;
    const int64_t last = first + end - begin < e.strips ? first + end - begin : e.strips;
    const int64_t last_row = last * kRows < e.length ? last * kRows : e.length;
    float* lse = e.lse + clip * e.length;
    float* loss = e.loss + clip * e.length;
    for (int64_t i = first * kRows; i < last_row; ++i) {
      store(max_so_far + i * kLanes, broadcast(-kLargest));
      store(sum_so_far + i * kLanes, Floats{});
    }
    for (int64_t j0 = 0; j0 < e.length; j0 += block) {
      const int64_t columns = e.length - j0 < block ? e.length - j0 : block;
      const Panels packed = pack_columns<kPairs>(e, clip, j0, columns, x, by_column);
      for (int64_t strip = first; strip < last; ++strip) {
        scores<kPairs>(e, clip, strip, columns, packed, x, s);
        for (int64_t row = 0; row < rows_of(e, strip); ++row) {
          const int64_t i = strip * kRows + row;
          float* logits = s + row * kStride;
          for (int64_t j = columns; j % kLanes; ++j) logits[j] = -__builtin_inff();
          update(max_so_far + i * kLanes, sum_so_far + i * kLanes, logits, round_up(columns, kLanes));
          if (i >= j0 && i < j0 + columns) loss[i] = logits[i - j0];
        }
      }
    }
    for (int64_t i = first * kRows; i < last_row; ++i) {
      const Floats of_lanes = load(max_so_far + i * kLanes);
      const float highest = max_lanes(of_lanes);
      const float sum = sum_lanes(load(sum_so_far + i * kLanes) * weight(of_lanes, broadcast(highest)));
      lse[i] = highest + __builtin_logf(sum);
      loss[i] = lse[i] - loss[i];
    }
    begin += last - first;
  }
}

// s = softmax - I of the strip and the block.
inline void subtract_identity(const InfoNce& e, const float* lse, int64_t strip, int64_t j0, int64_t columns,
                              float* s) {
  for (int64_t row = 0; row < rows_of(e, strip); ++row) {
    const int64_t i = strip * kRows + row;
    float* p = s + row * kStride;
    const Floats of_row = broadcast(lse[i]);
    for_each_vector(columns, [&](int64_t j, int, auto lanes) {
      const Floats shift = e.lse_of_columns ? load<float>(lse + j0 + j, lanes) : of_row;
      store<float>(p + j, exp_of_negative(load<float>(p + j, lanes) - shift), lanes);
    });
    if (i >= j0 && i < j0 + columns) p[i - j0] -= 1;
  }
}

// The strip's words in place of its floats. What is past the last column is 0.
template <bool kPairs>
inline void to_words([[maybe_unused]] int64_t columns, [[maybe_unused]] float* s) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    for (int64_t row = 0; row < kRows; ++row) {
      float* p = s + row * kStride;
      if (columns % 2) p[columns] = 0;
      for (int64_t j = 0; j < columns; j += 2 * kLanes) {
        store(p + j / 2, (Floats)_mm512_cvtne2ps_pbh(load(p + j + kLanes), load(p + j)));
      }
    }
  }
#endif
}

template <class Element>
inline void write_row(const float* row, int64_t n, float scale, char* out) {
  for_each_vector(n, [&](int64_t i, int, auto lanes) {
    store<Element>(out + i * sizeof(Element), load<float>(row + i, lanes) * scale, lanes);
  });
}

// Strips [begin, end) of all clips: d_x = scale (softmax - I) Y.
template <bool kPairs>
void backward(const InfoNce& e, int64_t begin, int64_t end, float* scratch) {
  const int64_t wide = round_up(e.values, kWhole), block = block_of(e.length);
  float* x = scratch;
  float* s = x + kTile * kStride;
  float* d_x = s + kRows * kStride;
  float* by_column = d_x + e.strips * kRows * wide;
  float* by_value = by_column + block * round_up(e.values, kTile);
  while (begin < end) {
    const int64_t clip = begin / e.strips, first = begin % e.strips;
    const int64_t last = first + end - begin < e.strips ? first + end - begin : e.strips;
    const float* lse = e.lse + clip * e.length;
    for (int64_t j0 = 0; j0 < e.length; j0 += block) {
      const int64_t columns = e.length - j0 < block ? e.length - j0 : block;
      const Panels rows = pack_columns<kPairs>(e, clip, j0, columns, x, by_column);
      const Panels values = pack_values<kPairs>(e, clip, j0, columns, by_value);
      for (int64_t strip = first; strip < last; ++strip) {
        scores<kPairs>(e, clip, strip, columns, rows, x, s);
        subtract_identity(e, lse, strip, j0, columns, s);
        to_words<kPairs>(columns, s);
        for (int64_t v = 0; v < e.values; v += kColumns) {
          multiply<kPairs>(strip_of(s), values, 0, v, values.depth, j0 > 0,
                           d_x + (strip - first) * kRows * wide + v, wide);
        }
      }
    }
    for (int64_t i = first * kRows; i < last * kRows && i < e.length; ++i) {
      const float* row = d_x + (i - first * kRows) * wide;
      char* out = e.d_x + (clip * e.length + i) * e.values * (e.x.bfloat16 ? 2 : 4);
      if (e.x.bfloat16) {
        write_row<BFloat16>(row, e.values, e.scale, out);
      } else {
        write_row<float>(row, e.values, e.scale, out);
      }
    }
    begin += last - first;
  }
}

}  // namespace

// float32 values of scratch memory, for any part of the strips.
int64_t info_nce_scratch(int64_t length, int64_t values) {
  const int64_t tall = round_up(length, kRows), wide = round_up(values, kWhole);
  const int64_t packed = block_of(length) * (round_up(values, kTile) + wide);
  return (kTile + kRows) * kStride + tall * (wide + 2 * kLanes) + packed;
}

int64_t info_nce_strip() { return kRows; }

void info_nce_forward(const InfoNce& e, int64_t begin, int64_t end, float* scratch) {
  if (kHasPairs && e.x.bfloat16 && e.y.bfloat16) return forward<kHasPairs>(e, begin, end, scratch);
  forward<false>(e, begin, end, scratch);
}

void info_nce_backward(const InfoNce& e, int64_t begin, int64_t end, float* scratch) {
  if (kHasPairs && e.x.bfloat16 && e.y.bfloat16) return backward<kHasPairs>(e, begin, end, scratch);
  backward<false>(e, begin, end, scratch);
}

}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "scratch.h"

namespace audiomae {

AUDIOMAE_DECLARE(int64_t info_nce_scratch(int64_t length, int64_t values))
AUDIOMAE_DECLARE(int64_t info_nce_strip())
AUDIOMAE_DECLARE(void info_nce_forward(const InfoNce& e, int64_t begin, int64_t end, float* scratch))
AUDIOMAE_DECLARE(void info_nce_backward(const InfoNce& e, int64_t begin, int64_t end, float* scratch))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_inputs(const Tensor& pred, const Tensor& target, const std::string& over) {
  check(pred.dim() == 3 && target.dim() == 3 && shape(pred) == shape(target),
        "info_nce expects predictions and targets of one shape (batch, masked, values), got ", shape(pred),
        " and ", shape(target), ".");
  check(pred.is_cpu() && target.is_cpu(), "info_nce of the native library expects CPU tensors.");
  check(is_float32_or_bfloat16(pred) && is_float32_or_bfloat16(target),
        "info_nce expects float32 or bfloat16 predictions and targets, got ", dtype_name(pred), " and ",
        dtype_name(target), ".");
  check(over == "target" || over == "prediction", "info_nce expects over to be target or prediction, got ",
        over, ".");
}

Side rows_of(const Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), byte_step(tensor, 0), byte_step(tensor, 1),
          is_bfloat16(tensor)};
}

InfoNce problem(const Tensor& x, const Tensor& y) {
  static const auto strip = AUDIOMAE_SELECT(info_nce_strip);
  InfoNce e{};
  e.x = rows_of(x);
  e.y = rows_of(y);
  e.length = x.size(1);
  e.values = x.size(2);
  e.strips = (e.length + strip() - 1) / strip();
  return e;
}

// Runs `kernel` over all strips with scratch memory.
template <class Kernel>
void for_each_strip(const InfoNce& e, int64_t clips, Kernel kernel) {
  static const auto scratch_size = AUDIOMAE_SELECT(info_nce_scratch);
  constexpr int64_t kMultiplyAddsPerTask = 1 << 20;
  const int64_t of_clip = std::max<int64_t>(1, e.length * e.length * e.values);
  const int64_t grain = std::max<int64_t>(1, kMultiplyAddsPerTask * e.strips / of_clip);
  torch::stable::parallel_for(0, clips * e.strips, grain, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(scratch_size(e.length, e.values));
    kernel(e, begin, end, scratch.data());
  });
}

// The loss, and the (B, M) logsumexp of each softmax for the backward pass.
std::tuple<Tensor, Tensor> info_nce(const Tensor& pred, const Tensor& target, std::string over) {
  check_inputs(pred, target, over);
  const Tensor p = rows_in_one_piece(pred), t = rows_in_one_piece(target);
  InfoNce e = over == "target" ? problem(p, t) : problem(t, p);
  const int64_t clips = pred.size(0);
  Tensor lse = torch::stable::new_empty(pred, {clips, e.length}, ScalarType::Float);
  std::vector<float> terms(clips * e.length);
  e.lse = static_cast<float*>(lse.mutable_data_ptr());
  e.loss = terms.data();
  for_each_strip(e, clips, AUDIOMAE_SELECT(info_nce_forward));
  double sum = 0;
  for (const float term : terms) sum += term;
  const float loss = float(sum / double(std::max<size_t>(1, terms.size())));
  Tensor out = torch::stable::new_empty(pred, {}, ScalarType::Float);
  std::memcpy(out.mutable_data_ptr(), &loss, sizeof(loss));
  return {out, lse};
}

// Gradients of pred and target, an empty tensor for one that is not wanted.
std::tuple<Tensor, Tensor> info_nce_backward(const Tensor& grad, const Tensor& pred, const Tensor& target,
                                             const Tensor& lse, std::string over, bool wants_pred,
                                             bool wants_target) {
  check_inputs(pred, target, over);
  const int64_t clips = pred.size(0), length = pred.size(1);
  check(grad.is_cpu() && grad.numel() == 1 && grad.scalar_type() == ScalarType::Float,
        "info_nce expects the loss's gradient as one float32 value, got ", dtype_name(grad), " of shape ",
        shape(grad), ".");
  check(lse.is_cpu() && lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == clips &&
            lse.size(1) == length,
        "info_nce expects the float32 logsumexp of shape (", clips, ", ", length, "), got ", dtype_name(lse),
        " of shape ", shape(lse), ".");
  const Tensor p = rows_in_one_piece(pred), t = rows_in_one_piece(target);
  const Tensor lse_values = torch::stable::contiguous(lse);
  float upstream;
  std::memcpy(&upstream, grad.const_data_ptr(), sizeof(upstream));

  const auto gradient = [&](const Tensor& x, const Tensor& y, bool wanted, bool lse_of_columns) {
    if (!wanted) return torch::stable::new_empty(x, {0});
    Tensor d_x = torch::stable::new_empty(x, {clips, length, x.size(2)});
    if (d_x.numel() == 0) return d_x;
    InfoNce e = problem(x, y);
    e.lse = const_cast<float*>(static_cast<const float*>(lse_values.const_data_ptr()));
    e.lse_of_columns = lse_of_columns;
    e.scale = upstream / float(clips * length);
    e.d_x = static_cast<char*>(d_x.mutable_data_ptr());
    for_each_strip(e, clips, AUDIOMAE_SELECT(info_nce_backward));
    return d_x;
  };
  return {gradient(p, t, wants_pred, over == "prediction"), gradient(t, p, wants_target, over == "target")};
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&audiomae::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&audiomae::info_nce_backward));
}

#endif  // AUDIOMAE_ENTRY
