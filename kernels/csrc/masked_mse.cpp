// masked_mse: (R, M, V), (B, T, F), (R, M) -> scalar. Mean squared error against the patches that ids name,
// read straight from the spectrogram and normalised on the way; and the gradient of the predictions.
#include "tier.h"

#include <cstdint>

#include "patches.h"
#include "simd.h"

namespace audiomae {

struct MaskedMse {
  Patches patches;
  int64_t values;                  // V
  const char* pred;                // (R, M, V)
  int64_t row_step, token_step;    // bytes
  bool pred_bfloat16, spectrogram_bfloat16;  // else float32
  bool normalize;
  int64_t block;                   // tokens that are summed into one partial
  double* partial;                 // sums of squared errors, forward only
  char* d_pred;                    // (R, M, V) contiguous, backward only
  float scale;                     // backward only
};

namespace AUDIOMAE_TIER {
namespace {

struct Sum {
  Floats slot[kSlots] = {};
  float total() const { return sum_lanes((slot[0] + slot[1]) + (slot[2] + slot[3])); }
};

// The values of a patch where they are: rows of whole vectors, or one row of any length.
struct Patch {
  const char* data;
  int64_t rows, columns, step;  // step: bytes from row to row
};

// Calls body(p, i, slot, lanes) for the vectors of a patch: p is where, i which value of the patch is first.
template <class Element, class Body>
inline void for_each_vector(const Patch& patch, const Body& body) {
  if (patch.rows == 1) {
    return for_each_vector(patch.columns, [&](int64_t i, int slot, auto lanes) {
      body(patch.data + i * sizeof(Element), i, slot, lanes);
    });
  }
  const int64_t count = patch.rows * patch.columns, row_bytes = patch.columns * sizeof(Element);
  const char* row = patch.data;
  int64_t at = 0;
  const auto next = [&] {
    const char* p = row + at;
    at += kLanes * sizeof(Element);
    if (at == row_bytes) {
      at = 0;
      row += patch.step;
    }
    return p;
  };
  int64_t i = 0;
  for (; i + kSlots * kLanes <= count; i += kSlots * kLanes) {
    body(next(), i, 0, All{});
    body(next(), i + kLanes, 1, All{});
    body(next(), i + 2 * kLanes, 2, All{});
    body(next(), i + 3 * kLanes, 3, All{});
  }
  for (; i < count; i += kLanes) body(next(), i, 0, All{});
}

// Copies a patch into float32, side by side; zeros for none.
template <class Element>
inline void copy_patch(const Patches& p, const char* in, float* out) {
  if (in == nullptr) {
    __builtin_memset(out, 0, p.rows * p.columns * sizeof(float));
    return;
  }
  if (p.mel_step == sizeof(Element) && p.columns % kLanes == 0) {
    for (int64_t row = 0; row < p.rows; ++row, in += p.time_step) {
      for (const char* at = in; at < in + p.columns * sizeof(Element); at += kLanes * sizeof(Element)) {
        store<float>(out, load<Element>(at, All{}), All{});
        out += kLanes;
      }
    }
    return;
  }
  for (int64_t row = 0; row < p.rows; ++row, in += p.time_step) {
    for (int64_t j = 0; j < p.columns; ++j) {
      store<float>(out++, load<Element>(in + j * p.mel_step, int64_t(1)), int64_t(1));
    }
  }
}

// The target of a value x of a patch is ((x - pivot) - shift) * scale. Normalised: (x - mean) /
// sqrt(var + 1e-6), var unbiased. Deviations from a pivot near the mean give both in one pass: with the mean
// of the first vector, m of the n values, |pivot - mean| <= sqrt(n / m) std. The target of a constant patch is
// 0, and not a rounding error of the mean times 1000.
struct Target {
  float pivot, shift, scale;
};

template <class Element>
inline Target normalized(const Patch& patch) {
  const int64_t n = patch.rows * patch.columns;
  const float pivot = n < kLanes ? sum_lanes(load<Element>(patch.data, n)) / n
                                 : sum_lanes(load<Element>(patch.data, All{})) / kLanes;
  Sum deviations, squares;
  for_each_vector<Element>(patch, [&](const char* p, int64_t, int slot, auto lanes) {
    const Floats d = keep(load<Element>(p, lanes) - pivot, lanes);
    deviations.slot[slot] += d;
    squares.slot[slot] += d * d;
  });
  const float total = deviations.total(), shift = total / n;
  const float var = (squares.total() - total * shift) / (n - 1);
  return {pivot, shift, 1 / __builtin_sqrtf((var < 0 ? 0 : var) + 1e-6f)};
}

// Calls error(i, slot, lanes, pred - target) for the vectors of a token.
template <class Pred, class Element, class Error>
inline void for_each_error(const MaskedMse& e, const char* pred, const Patch& patch, const Error& error) {
  const Target t = e.normalize ? normalized<Element>(patch) : Target{0, 0, 1};
  for_each_vector<Element>(patch, [&](const char* p, int64_t i, int slot, auto lanes) {
    const Floats target = ((load<Element>(p, lanes) - t.pivot) - t.shift) * t.scale;
    error(i, slot, lanes, load<Pred>(pred + i * sizeof(Pred), lanes) - target);
  });
}

// Calls token(i, errors) for the tokens [begin, end) of the flattened (R, M); errors(error) is for_each_error.
template <class Pred, class Spectrogram, class Token>
inline void for_each_token(const MaskedMse& e, int64_t begin, int64_t end, float* scratch,
                           const Token& token) {
  const Patches& p = e.patches;
  // The others are copied into the L1 cache: bfloat16 to convert it once, what lies scattered to gather it.
  const bool in_place = sizeof(Spectrogram) == sizeof(float) && p.mel_step == sizeof(float) &&
                        (p.rows == 1 || p.columns % kLanes == 0);
  PatchWalk walk(p, begin, end);
  int64_t row = begin / p.kept, k = begin % p.kept;
  for (int64_t i = begin; i < end; ++i) {
    const char* pred = e.pred + row * e.row_step + k * e.token_step;
    const char* patch = walk.next();
    if (++k == p.kept) {
      k = 0;
      ++row;
    }
    if (in_place && patch != nullptr) {
      token(i, [&](const auto& error) {
        for_each_error<Pred, float>(e, pred, {patch, p.rows, p.columns, p.time_step}, error);
      });
    } else {
      copy_patch<Spectrogram>(p, patch, scratch);
      token(i, [&](const auto& error) {
        for_each_error<Pred, float>(e, pred, {reinterpret_cast<const char*>(scratch), 1, e.values, 0}, error);
      });
    }
  }
}

template <class Pred, class Spectrogram>
AUDIOMAE_FLATTEN void forward(const MaskedMse& e, int64_t begin, int64_t end, float* scratch) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * e.block, last = first + e.block;
    double total = 0;
    for_each_token<Pred, Spectrogram>(
        e, first, last < e.patches.count ? last : e.patches.count, scratch, [&](int64_t, const auto& errors) {
          Sum squares;
          errors([&](int64_t, int slot, auto lanes, Floats error) {
            error = keep(error, lanes);
            squares.slot[slot] += error * error;
          });
          total += squares.total();
        });
    e.partial[block] = total;
  }
}

template <class Pred, class Spectrogram>
AUDIOMAE_FLATTEN void backward(const MaskedMse& e, int64_t begin, int64_t end, float* scratch) {
  for_each_token<Pred, Spectrogram>(e, begin, end, scratch, [&](int64_t token, const auto& errors) {
    char* out = e.d_pred + token * e.values * sizeof(Pred);
    errors([&](int64_t i, int, auto lanes, Floats error) {
      store<Pred>(out + i * sizeof(Pred), error * e.scale, lanes);
    });
  });
}

}  // namespace

// Blocks [begin, end) of tokens of the flattened (R, M); `scratch` holds V values.
void masked_mse_forward(const MaskedMse& e, int64_t begin, int64_t end, float* scratch) {
  if (e.pred_bfloat16) {
    return e.spectrogram_bfloat16 ? forward<BFloat16, BFloat16>(e, begin, end, scratch)
                                  : forward<BFloat16, float>(e, begin, end, scratch);
  }
  return e.spectrogram_bfloat16 ? forward<float, BFloat16>(e, begin, end, scratch)
                                : forward<float, float>(e, begin, end, scratch);
}

// Tokens [begin, end) of the flattened (R, M); `scratch` holds V values.
void masked_mse_backward(const MaskedMse& e, int64_t begin, int64_t end, float* scratch) {
  if (e.pred_bfloat16) {
    return e.spectrogram_bfloat16 ? backward<BFloat16, BFloat16>(e, begin, end, scratch)
                                  : backward<BFloat16, float>(e, begin, end, scratch);
  }
  return e.spectrogram_bfloat16 ? backward<float, BFloat16>(e, begin, end, scratch)
                                : backward<float, float>(e, begin, end, scratch);
}

}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "scratch.h"

namespace audiomae {

AUDIOMAE_DECLARE(void masked_mse_forward(const MaskedMse& e, int64_t begin, int64_t end, float* scratch))
AUDIOMAE_DECLARE(void masked_mse_backward(const MaskedMse& e, int64_t begin, int64_t end, float* scratch))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensPerBlock = 16, kValuesPerTask = 16384;

// What both directions share; it refers to the tensors' memory. `pred` has its rows in one piece.
MaskedMse problem(const Tensor& pred, const Tensor& spectrogram, const Tensor& ids_masked, int64_t patch_t,
                  int64_t patch_f, int64_t stride_t, int64_t stride_f, bool normalize) {
  check(is_float32_or_bfloat16(pred) && is_float32_or_bfloat16(spectrogram),
        "masked_mse expects float32 or bfloat16 predictions and spectrograms, got ", dtype_name(pred),
        " and ", dtype_name(spectrogram), ".");
  MaskedMse e{};
  e.patches = find_patches("masked_mse", "ids_masked", spectrogram, ids_masked, patch_t, patch_f, stride_t,
                           stride_f);
  const int64_t values = patch_t * patch_f;
  check(pred.is_cpu(), "masked_mse of the native library expects CPU tensors.");
  check(pred.dim() == 3 && pred.size(0) == ids_masked.size(0) && pred.size(1) == ids_masked.size(1) &&
            pred.size(2) == values,
        "masked_mse expects predictions of shape (batch * masks, masked, ", values,
        ") for ids_masked of shape ", shape(ids_masked), ", got ", shape(pred), ".");
  check(!normalize || values > 1,
        "masked_mse expects patches of more than one value to normalise: one value has no variance.");
  e.values = values;
  e.pred = static_cast<const char*>(pred.const_data_ptr());
  e.row_step = byte_step(pred, 0);
  e.token_step = byte_step(pred, 1);
  e.pred_bfloat16 = is_bfloat16(pred);
  e.spectrogram_bfloat16 = is_bfloat16(spectrogram);
  e.normalize = normalize;
  e.block = kTokensPerBlock;
  return e;
}

Tensor masked_mse(const Tensor& pred, const Tensor& spectrogram, const Tensor& ids_masked, int64_t patch_t,
                  int64_t patch_f, int64_t stride_t, int64_t stride_f, bool normalize) {
  const Tensor rows = rows_in_one_piece(pred);
  MaskedMse e = problem(rows, spectrogram, ids_masked, patch_t, patch_f, stride_t, stride_f, normalize);
  const int64_t values = patch_t * patch_f, blocks = (e.patches.count + e.block - 1) / e.block;
  std::vector<double> partial(blocks);
  e.partial = partial.data();
  static const auto forward = AUDIOMAE_SELECT(masked_mse_forward);
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / (values * e.block));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(values);
    forward(e, begin, end, scratch.data());
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  const float loss = float(sum / double(std::max<int64_t>(1, e.patches.count * values)));
  Tensor out = torch::stable::new_empty(pred, {}, ScalarType::Float);
  std::memcpy(out.mutable_data_ptr(), &loss, sizeof(loss));
  return out;
}

Tensor masked_mse_backward(const Tensor& grad, const Tensor& pred, const Tensor& spectrogram,
                           const Tensor& ids_masked, int64_t patch_t, int64_t patch_f, int64_t stride_t,
                           int64_t stride_f, bool normalize) {
  check(grad.is_cpu() && grad.numel() == 1 && grad.scalar_type() == ScalarType::Float,
        "masked_mse expects the loss's gradient as one float32 value, got ", dtype_name(grad), " of shape ",
        shape(grad), ".");
  const Tensor rows = rows_in_one_piece(pred);
  MaskedMse e = problem(rows, spectrogram, ids_masked, patch_t, patch_f, stride_t, stride_f, normalize);
  const int64_t values = patch_t * patch_f;
  Tensor d_pred = torch::stable::new_empty(pred, {pred.size(0), pred.size(1), pred.size(2)});
  if (e.patches.count == 0) return d_pred;
  float upstream;
  std::memcpy(&upstream, grad.const_data_ptr(), sizeof(upstream));
  e.scale = upstream * float(2.0 / double(e.patches.count * values));
  e.d_pred = static_cast<char*>(d_pred.mutable_data_ptr());
  static const auto backward = AUDIOMAE_SELECT(masked_mse_backward);
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / values);
  torch::stable::parallel_for(0, e.patches.count, grain, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(values);
    backward(e, begin, end, scratch.data());
  });
  return d_pred;
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("masked_mse", TORCH_BOX(&audiomae::masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&audiomae::masked_mse_backward));
}

#endif  // AUDIOMAE_ENTRY
