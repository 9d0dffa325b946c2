// info_nce: (B, M, V), (B, M, V) -> scalar and (B, M). Per clip S = X Yᵀ, the mean over rows of
// logsumexp_j S_ij - S_ii, and its gradients, without ever holding S.
//
// A strip is kRows rows of X, a block kBlock rows of Y. Strip by block, S lives in the L1 cache; the
// logsumexp is a running one over the blocks. A strip's result depends on nothing but its clip, so that the
// order of all sums is the same for any number of threads.
#include "tier.h"

#include <cstdint>

#include "simd.h"

namespace audiomae {

struct Rows {
  const char* data;                // (B, M, V)
  int64_t clip_step, row_step;     // bytes
  bool bfloat16;                   // else float32
};

struct InfoNce {
  Rows x, y;
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

// The matrix product's tile, kRows x kColumns, fills the registers with sums.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kColumns = 2 * kLanes;
constexpr int64_t kBlock = 256;
constexpr int64_t kStride = kBlock + 16;  // of a strip's rows: not all in the same set of the L1 cache

inline int64_t panels(int64_t n) { return (n + kColumns - 1) / kColumns; }

// c (+)= a b. a: kRows rows of `depth` values, kStride apart; b: `depth` rows of kColumns; c: kRows rows of
// kColumns, c_stride apart.
inline void multiply(const float* a, const float* b, int64_t depth, bool add, float* c, int64_t c_stride) {
  Floats sum[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = add ? load<float>(c + i * c_stride, All{}) : Floats{};
    sum[i][1] = add ? load<float>(c + i * c_stride + kLanes, All{}) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k, b += kColumns) {
    const Floats b0 = load<float>(b, All{}), b1 = load<float>(b + kLanes, All{});
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Floats x = broadcast(a[i * kStride + k]);
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    store<float>(c + i * c_stride, sum[i][0], All{});
    store<float>(c + i * c_stride + kLanes, sum[i][1], All{});
  }
}

template <class Element>
inline void read_row(const char* row, int64_t first, int64_t n, float* out) {
  for_each_vector(n, [&](int64_t i, int, auto lanes) {
    store<float>(out + i, load<Element>(row + (first + i) * sizeof(Element), lanes), lanes);
  });
}

// Values [first, first + n) of a row in float32.
inline void read_row(const Rows& rows, int64_t clip, int64_t row, int64_t first, int64_t n, float* out) {
  const char* data = rows.data + clip * rows.clip_step + row * rows.row_step;
  return rows.bfloat16 ? read_row<BFloat16>(data, first, n, out) : read_row<float>(data, first, n, out);
}

// Panels of kColumns rows of Y, value by value: out[panel][v][row], rows past the last one 0.
inline void pack_columns(const InfoNce& e, int64_t clip, int64_t j0, int64_t columns, float* out) {
  constexpr int64_t kPiece = 16;
  float piece[kPiece] = {};
  for (int64_t panel = 0; panel < panels(columns); ++panel) {
    for (int64_t v = 0; v < e.values; v += kPiece) {
      const int64_t n = e.values - v < kPiece ? e.values - v : kPiece;
      for (int64_t lane = 0; lane < kColumns; ++lane) {
        const int64_t j = panel * kColumns + lane;
        float* to = out + (panel * e.values + v) * kColumns + lane;
        if (j < columns) {
          read_row(e.y, clip, j0 + j, v, n, piece);
          for (int64_t i = 0; i < n; ++i) to[i * kColumns] = piece[i];
        } else {
          for (int64_t i = 0; i < n; ++i) to[i * kColumns] = 0;
        }
      }
    }
  }
}

// Panels of kColumns values of Y, row by row: out[panel][row][v], values past the last one 0.
inline void pack_values(const InfoNce& e, int64_t clip, int64_t j0, int64_t columns, float* out) {
  for (int64_t panel = 0; panel < panels(e.values); ++panel) {
    const int64_t v = panel * kColumns, n = e.values - v < kColumns ? e.values - v : kColumns;
    for (int64_t j = 0; j < columns; ++j, out += kColumns) {
      for (int64_t i = n; i < kColumns; ++i) out[i] = 0;
      read_row(e.y, clip, j0 + j, v, n, out);
    }
  }
}

inline int64_t block_of(int64_t length) { return length < kBlock ? panels(length) * kColumns : kBlock; }

inline int64_t rows_of(const InfoNce& e, int64_t strip) {
  const int64_t rest = e.length - strip * kRows;
  return rest < kRows ? rest : kRows;
}

// s = the strip of S over the packed block; rows past the last one are 0.
inline void scores(const InfoNce& e, int64_t clip, int64_t strip, int64_t columns, const float* packed,
                   float* x, float* s) {
  const int64_t rows = rows_of(e, strip);
  __builtin_memset(x + rows * kStride, 0, (kRows - rows) * kStride * sizeof(float));
  for (int64_t v = 0; v == 0 || v < e.values; v += kBlock) {  // S is 0 if there are no values
    const int64_t depth = e.values - v < kBlock ? e.values - v : kBlock;
    for (int64_t i = 0; i < rows; ++i) read_row(e.x, clip, strip * kRows + i, v, depth, x + i * kStride);
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
      multiply(x, packed + (panel * e.values + v) * kColumns, depth, v > 0, s + panel * kColumns, kStride);
    }
  }
}

inline float finite_or_zero(float x) { return __builtin_isinf(x) ? 0 : x; }

// Takes `n` more logits into a running logsumexp, max + log(sum).
inline void update(float& max_so_far, float& sum_so_far, const float* s, int64_t n) {
  const float infinity = __builtin_inff();
  const Floats lowest = broadcast(-infinity);
  Floats max[kSlots] = {lowest, lowest, lowest, lowest};
  float tail = -infinity;
  const int64_t whole = n / kLanes * kLanes;
  for_each_vector(whole, [&](int64_t i, int slot, auto lanes) {
    const Floats x = load<float>(s + i, lanes);
    max[slot] = select(x > max[slot], x, max[slot]);
  });
  for (int64_t i = whole; i < n; ++i) tail = s[i] > tail ? s[i] : tail;
  const Floats m01 = select(max[0] > max[1], max[0], max[1]), m23 = select(max[2] > max[3], max[2], max[3]);
  float highest = max_lanes(select(m01 > m23, m01, m23));
  highest = tail > highest ? tail : highest;
  highest = max_so_far > highest ? max_so_far : highest;
  const float shift = finite_or_zero(highest);

  Floats sum[kSlots] = {};
  for_each_vector(n, [&](int64_t i, int slot, auto lanes) {
    sum[slot] += keep(exp(load<float>(s + i, lanes) - shift), lanes);
  });
  const float more = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (sum_so_far > 0) sum_so_far *= __builtin_expf(finite_or_zero(max_so_far) - shift);
  max_so_far = highest;
  sum_so_far += more;
}

}  // namespace

// float32 values of scratch memory, for any part of the strips.
int64_t info_nce_scratch(int64_t length, int64_t values) {
  const int64_t tall = (length + kRows - 1) / kRows * kRows, wide = panels(values) * kColumns;
  return 2 * kRows * kStride + block_of(length) * (values + wide) + tall * (wide + 2);
}

int64_t info_nce_strip() { return kRows; }

// Strips [begin, end) of all clips: lse and loss.
void info_nce_forward(const InfoNce& e, int64_t begin, int64_t end, float* scratch) {
  float* x = scratch;
  float* s = x + kRows * kStride;
  float* packed = s + kRows * kStride;
  float* max = packed + block_of(e.length) * e.values;
  float* sum = max + e.strips * kRows;
  while (begin < end) {
    const int64_t clip = begin / e.strips, first = begin % e.strips;
    const int64_t last = first + end - begin < e.strips ? first + end - begin : e.strips;
    float* lse = e.lse + clip * e.length;
    float* loss = e.loss + clip * e.length;
    for (int64_t i = first * kRows; i < last * kRows; ++i) {
      max[i] = -__builtin_inff();
      sum[i] = 0;
    }
    for (int64_t j0 = 0; j0 < e.length; j0 += kBlock) {
      const int64_t columns = e.length - j0 < kBlock ? e.length - j0 : kBlock;
      pack_columns(e, clip, j0, columns, packed);
      for (int64_t strip = first; strip < last; ++strip) {
        scores(e, clip, strip, columns, packed, x, s);
        for (int64_t row = 0; row < rows_of(e, strip); ++row) {
          const int64_t i = strip * kRows + row;
          update(max[i], sum[i], s + row * kStride, columns);
          if (i >= j0 && i < j0 + columns) loss[i] = s[row * kStride + i - j0];
        }
      }
    }
    for (int64_t i = first * kRows; i < last * kRows && i < e.length; ++i) {
      lse[i] = finite_or_zero(max[i]) + __builtin_logf(sum[i]);
      loss[i] = lse[i] - loss[i];
    }
    begin += last - first;
  }
}

// Strips [begin, end) of all clips: d_x = scale (softmax - I) Y.
void info_nce_backward(const InfoNce& e, int64_t begin, int64_t end, float* scratch) {
  const int64_t wide = panels(e.values) * kColumns;
  float* x = scratch;
  float* s = x + kRows * kStride;
  float* by_column = s + kRows * kStride;
  float* by_value = by_column + block_of(e.length) * e.values;
  float* d_x = by_value + block_of(e.length) * wide;
  while (begin < end) {
    const int64_t clip = begin / e.strips, first = begin % e.strips;
    const int64_t last = first + end - begin < e.strips ? first + end - begin : e.strips;
    const float* lse = e.lse + clip * e.length;
    for (int64_t j0 = 0; j0 < e.length; j0 += kBlock) {
      const int64_t columns = e.length - j0 < kBlock ? e.length - j0 : kBlock;
      pack_columns(e, clip, j0, columns, by_column);
      pack_values(e, clip, j0, columns, by_value);
      for (int64_t strip = first; strip < last; ++strip) {
        scores(e, clip, strip, columns, by_column, x, s);
        for (int64_t row = 0; row < rows_of(e, strip); ++row) {
          const int64_t i = strip * kRows + row;
          float* p = s + row * kStride;
          const float of_row = lse[i];
          const bool diagonal = i >= j0 && i < j0 + columns;
          for_each_vector(columns, [&](int64_t j, int, auto lanes) {
            const Floats shift = e.lse_of_columns ? load<float>(lse + j0 + j, lanes) : broadcast(of_row);
            store<float>(p + j, exp(load<float>(p + j, lanes) - shift) * e.scale, lanes);
          });
          if (diagonal) p[i - j0] -= e.scale;
        }
        for (int64_t panel = 0; panel < panels(e.values); ++panel) {
          multiply(s, by_value + panel * columns * kColumns, columns, j0 > 0,
                   d_x + (strip - first) * kRows * wide + panel * kColumns, wide);
        }
      }
    }
    for (int64_t i = first * kRows; i < last * kRows && i < e.length; ++i) {
      const float* row = d_x + (i - first * kRows) * wide;
      char* out = e.d_x + (clip * e.length + i) * e.values * (e.x.bfloat16 ? 2 : 4);
      for_each_vector(e.values, [&](int64_t v, int, auto lanes) {
        const Floats value = load<float>(row + v, lanes);
        if (e.x.bfloat16) {
          store<BFloat16>(out + v * sizeof(BFloat16), value, lanes);
        } else {
          store<float>(out + v * sizeof(float), value, lanes);
        }
      });
    }
    begin += last - first;
  }
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

Rows rows_of(const Tensor& tensor) {
  const int64_t element = tensor.element_size();
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * element,
          tensor.stride(1) * element, is_bfloat16(tensor)};
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
