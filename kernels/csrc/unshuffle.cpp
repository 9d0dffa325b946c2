// unshuffle: (B, K, D), (B, K), (D,), (L, D) -> (B, L, D). Kept tokens at their places, the mask token at all
// others, plus positions; and its gradients.
//
// A block is a run of tokens [l0, l1), the same in every clip. Blocks depend on L alone: sums over them have
// the same order for any number of threads.
#include "tier.h"

#include <cstdint>

#include "simd.h"

namespace audiomae {

struct Unshuffle {
  int64_t clips, length, width;            // B, L, D
  int64_t block;                           // tokens
  const int32_t* inverse;                  // (B, L): which kept token is here, -1 for none
  bool bfloat16;                           // tokens and grid; else float32
  const char* tokens;                      // (B, K, D), forward only
  int64_t tokens_clip_step, tokens_step;   // bytes
  const float* mask_token;                 // (D,), forward only
  const float* pos;                        // (L, D), forward only
  const char* grid;                        // (B, L, D): the gradient, backward only
  int64_t grid_clip_step, grid_step;       // bytes
  char* out;                               // (B, L, D) forward; (B, K, D) backward, or null: not wanted
  int64_t kept;                            // K, backward only
  float* d_pos;                            // (L, D) or null
  float* d_mask_token;                     // (blocks, D) partial sums, or null
};

namespace AUDIOMAE_TIER {
namespace {

// Units are (block, clip). `masked` holds a block of rows as they are where nothing is kept, which is the same
// for all clips: made for the first, it is copied from the cache for the others.
template <class Element>
AUDIOMAE_FLATTEN void forward(const Unshuffle& u, int64_t begin, int64_t end, char* masked) {
  const int64_t row_bytes = u.width * sizeof(Element);
  for (int64_t unit = begin, l0 = 0, l1 = 0; unit < end; ++unit) {
    const int64_t b = unit % u.clips;
    if (unit == begin || b == 0) {
      l0 = unit / u.clips * u.block;
      l1 = l0 + u.block < u.length ? l0 + u.block : u.length;
      for (int64_t l = l0; l < l1; ++l) {
        const float* pos = u.pos + l * u.width;
        char* row = masked + (l - l0) * row_bytes;
        for_each_vector(u.width, [&](int64_t i, int, auto lanes) {
          const Floats x = load<float>(u.mask_token + i, lanes) + load<float>(pos + i, lanes);
          store<Element>(row + i * sizeof(Element), x, lanes);
        });
      }
    }
    char* out = u.out + (b * u.length + l0) * row_bytes;
    for (int64_t l = l0; l < l1; ++l, out += row_bytes) {
      const int32_t k = u.inverse[b * u.length + l];
      if (k < 0) {
        __builtin_memcpy(out, masked + (l - l0) * row_bytes, row_bytes);
        continue;
      }
      const char* token = u.tokens + b * u.tokens_clip_step + k * u.tokens_step;
      const float* pos = u.pos + l * u.width;
      for_each_vector(u.width, [&](int64_t i, int, auto lanes) {
        const int64_t at = i * sizeof(Element);
        store<Element>(out + at, load<Element>(token + at, lanes) + load<float>(pos + i, lanes), lanes);
      });
    }
  }
}

// The rows of up to kGroup clips at one place of the grid, the masked ones apart.
constexpr int kGroup = 8;

struct Group {
  const char *masked[kGroup], *kept[kGroup];
  int masked_count = 0, kept_count = 0;
};

// d_mask_token += the masked rows; d_pos += all rows: kWide vectors from value i on. Either may be null.
template <class Element, int kWide, class Lanes>
inline void add(const Group& group, int64_t i, Lanes lanes, float* d_mask_token, float* d_pos) {
  Floats sum[kWide] = {};
  const auto add_rows = [&](const char* const* rows, int count) {
    for (int row = 0; row < count; ++row) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        sum[j] += load<Element>(rows[row] + (i + j * kLanes) * sizeof(Element), lanes);
      }
    }
  };
  const auto add_to = [&](float* total) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      float* at = total + i + j * kLanes;
      store<float>(at, load<float>(at, lanes) + sum[j], lanes);
    }
  };
  add_rows(group.masked, group.masked_count);
  if (d_mask_token) add_to(d_mask_token);
  if (!d_pos) return;
  add_rows(group.kept, group.kept_count);
  add_to(d_pos);
}

template <class Element>
AUDIOMAE_FLATTEN void backward(const Unshuffle& u, int64_t begin, int64_t end) {
  const int64_t row_bytes = u.width * sizeof(Element);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t l0 = block * u.block, l1 = l0 + u.block < u.length ? l0 + u.block : u.length;
    float* d_mask_token = u.d_mask_token ? u.d_mask_token + block * u.width : nullptr;
    if (d_mask_token) __builtin_memset(d_mask_token, 0, u.width * sizeof(float));
    if (u.d_pos) __builtin_memset(u.d_pos + l0 * u.width, 0, (l1 - l0) * u.width * sizeof(float));
    for (int64_t b0 = 0; b0 < u.clips; b0 += kGroup) {
      for (int64_t l = l0; l < l1; ++l) {
        float* d_pos = u.d_pos ? u.d_pos + l * u.width : nullptr;
        Group group;
        for (int64_t b = b0; b < b0 + kGroup && b < u.clips; ++b) {
          const char* row = u.grid + b * u.grid_clip_step + l * u.grid_step;
          const int32_t k = u.inverse[b * u.length + l];
          if (k < 0) {
            group.masked[group.masked_count++] = row;
          } else {
            group.kept[group.kept_count++] = row;
            if (u.out) __builtin_memcpy(u.out + (b * u.kept + k) * row_bytes, row, row_bytes);
          }
        }
        const int64_t width = u.width;
        int64_t i = 0;
        for (; i + 4 * kLanes <= width; i += 4 * kLanes) add<Element, 4>(group, i, All{}, d_mask_token, d_pos);
        for (; i + kLanes <= width; i += kLanes) add<Element, 1>(group, i, All{}, d_mask_token, d_pos);
        if (i < width) add<Element, 1>(group, i, width - i, d_mask_token, d_pos);
      }
    }
  }
}

}  // namespace

// Units [begin, end) of blocks x clips; `scratch` holds a block of rows.
void unshuffle_forward(const Unshuffle& u, int64_t begin, int64_t end, char* scratch) {
  return u.bfloat16 ? forward<BFloat16>(u, begin, end, scratch) : forward<float>(u, begin, end, scratch);
}

// Blocks [begin, end).
void unshuffle_backward(const Unshuffle& u, int64_t begin, int64_t end) {
  return u.bfloat16 ? backward<BFloat16>(u, begin, end) : backward<float>(u, begin, end);
}

}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "scratch.h"

namespace audiomae {

AUDIOMAE_DECLARE(void unshuffle_forward(const Unshuffle& u, int64_t begin, int64_t end, char* scratch))
AUDIOMAE_DECLARE(void unshuffle_backward(const Unshuffle& u, int64_t begin, int64_t end))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Forward, a block and its positions stay in the L2 cache. Backward, it is the unit of the sum over masked
// tokens.
constexpr int64_t kForwardBlock = 64, kBackwardBlock = 8, kMaxBlocks = 64, kBytesPerTask = 65536;

// What both directions share. `values` is tokens or the gradient of the grid.
Unshuffle problem(const Tensor& values, const char* name, const Tensor& ids_keep, const Tensor& mask_token,
                  const Tensor& pos, int64_t block) {
  check(values.dim() == 3 && ids_keep.dim() == 2 && mask_token.dim() == 1 && pos.dim() == 2,
        "unshuffle expects ", name, " of shape (batch, tokens, width), ids_keep of shape (batch, kept), a "
        "mask token of shape (width,) and positions of shape (length, width), got ", shape(values), ", ",
        shape(ids_keep), ", ", shape(mask_token), " and ", shape(pos), ".");
  check(values.is_cpu() && ids_keep.is_cpu() && mask_token.is_cpu() && pos.is_cpu(),
        "unshuffle of the native library expects CPU tensors.");
  check(ids_keep.size(0) == values.size(0) && mask_token.size(0) == values.size(2) &&
            pos.size(1) == values.size(2),
        "unshuffle expects ids_keep of ", values.size(0), " clips, and a mask token and positions of width ",
        values.size(2), ", got ", shape(ids_keep), ", ", shape(mask_token), " and ", shape(pos), ".");
  check(is_float32_or_bfloat16(values), "unshuffle expects float32 or bfloat16 ", name, ", got ",
        dtype_name(values), ".");
  check(ids_keep.scalar_type() == ScalarType::Long, "unshuffle expects int64 ids_keep, got ",
        dtype_name(ids_keep), ".");
  Unshuffle u{};
  u.clips = values.size(0);
  u.length = pos.size(0);
  u.width = values.size(2);
  u.kept = ids_keep.size(1);
  u.block = block;
  u.bfloat16 = values.scalar_type() == ScalarType::BFloat16;
  return u;
}

int64_t blocks_of(const Unshuffle& u) { return (u.length + u.block - 1) / u.block; }

// How many blocks of `clips` clips make a task.
int64_t grain_of(const Unshuffle& u, int64_t clips) {
  const int64_t bytes = clips * u.block * u.width * (u.bfloat16 ? 2 : 4);
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes));
}

struct Ids {
  const char* data;
  int64_t clip_step, step;

  explicit Ids(const Tensor& ids)
      : data(static_cast<const char*>(ids.const_data_ptr())),
        clip_step(byte_step(ids, 0)),
        step(byte_step(ids, 1)) {}

  int64_t operator()(int64_t b, int64_t k) const {
    int64_t id;
    std::memcpy(&id, data + b * clip_step + k * step, sizeof(id));
    return id;
  }
};

// (B, L): which kept token stands at each place. Of duplicates the last wins; ids out of range are left out.
std::vector<int32_t> invert(const Unshuffle& u, const Ids& ids) {
  std::vector<int32_t> inverse(u.clips * u.length, -1);
  for (int64_t b = 0; b < u.clips; ++b) {
    for (int64_t k = 0; k < u.kept; ++k) {
      const int64_t id = ids(b, k);
      if (id >= 0 && id < u.length) inverse[b * u.length + id] = int32_t(k);
    }
  }
  return inverse;
}

Tensor unshuffle(const Tensor& tokens, const Tensor& ids_keep, const Tensor& mask_token, const Tensor& pos) {
  Unshuffle u = problem(tokens, "tokens", ids_keep, mask_token, pos, kForwardBlock);
  check(tokens.size(1) == u.kept, "unshuffle expects an id for each of ", tokens.size(1),
        " kept tokens, got ids_keep of shape ", shape(ids_keep), ".");
  Tensor out = torch::stable::new_empty(tokens, {u.clips, u.length, u.width});
  if (out.numel() == 0) return out;

  const Tensor rows = rows_in_one_piece(tokens);
  const Tensor mask_values = float32_in_one_piece(mask_token), pos_values = float32_in_one_piece(pos);
  const std::vector<int32_t> inverse = invert(u, Ids(ids_keep));
  u.inverse = inverse.data();
  u.tokens = static_cast<const char*>(rows.const_data_ptr());
  u.tokens_clip_step = byte_step(rows, 0);
  u.tokens_step = byte_step(rows, 1);
  u.mask_token = static_cast<const float*>(mask_values.const_data_ptr());
  u.pos = static_cast<const float*>(pos_values.const_data_ptr());
  u.out = static_cast<char*>(out.mutable_data_ptr());
  static const auto forward = AUDIOMAE_SELECT(unshuffle_forward);
  torch::stable::parallel_for(0, blocks_of(u) * u.clips, grain_of(u, 1), [&](int64_t begin, int64_t end) {
    Scratch<char> scratch(u.block * u.width * out.element_size());
    forward(u, begin, end, scratch.data());
  });
  return out;
}

// Gradients of tokens, mask_token and pos, an empty tensor for one that is not wanted.
std::tuple<Tensor, Tensor, Tensor> unshuffle_backward(const Tensor& grad, const Tensor& ids_keep,
                                                      const Tensor& mask_token, const Tensor& pos,
                                                      bool wants_tokens, bool wants_mask_token,
                                                      bool wants_pos) {
  const int64_t block = std::max(kBackwardBlock, (pos.size(0) + kMaxBlocks - 1) / kMaxBlocks);
  Unshuffle u = problem(grad, "gradients", ids_keep, mask_token, pos, block);
  check(grad.size(1) == u.length, "unshuffle expects gradients of ", u.length, " tokens a clip, got ",
        shape(grad), ".");
  const int64_t blocks = blocks_of(u), row_bytes = u.width * int64_t(grad.element_size());
  const auto unwanted = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor d_tokens =
      wants_tokens ? torch::stable::new_empty(grad, {u.clips, u.kept, u.width}) : unwanted(grad);
  Tensor partial =
      torch::stable::new_empty(grad, {wants_mask_token ? blocks : 0, u.width}, ScalarType::Float);
  Tensor d_mask_token =
      wants_mask_token ? torch::stable::new_empty(grad, {u.width}, ScalarType::Float) : unwanted(mask_token);
  Tensor d_pos =
      wants_pos ? torch::stable::new_empty(grad, {u.length, u.width}, ScalarType::Float) : unwanted(pos);

  const Tensor rows = rows_in_one_piece(grad);
  const Ids ids(ids_keep);
  const std::vector<int32_t> inverse = invert(u, ids);
  u.inverse = inverse.data();
  u.grid = static_cast<const char*>(rows.const_data_ptr());
  u.grid_clip_step = byte_step(rows, 0);
  u.grid_step = byte_step(rows, 1);
  char* out = wants_tokens ? static_cast<char*>(d_tokens.mutable_data_ptr()) : nullptr;
  const bool sums = wants_mask_token || wants_pos;
  if (sums) {
    u.out = out;
    u.d_mask_token = wants_mask_token ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
    u.d_pos = wants_pos ? static_cast<float*>(d_pos.mutable_data_ptr()) : nullptr;
    static const auto backward = AUDIOMAE_SELECT(unshuffle_backward);
    torch::stable::parallel_for(0, blocks, grain_of(u, u.clips),
                                [&](int64_t begin, int64_t end) { backward(u, begin, end); });
  }
  // Kept tokens that no place of the grid names: duplicates, ids out of range; all of them without sums.
  const auto gather = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t k = 0; k < u.kept; ++k) {
        const int64_t id = ids(b, k);
        const bool inside = id >= 0 && id < u.length;
        if (sums && inside && inverse[b * u.length + id] == k) continue;
        char* to = out + (b * u.kept + k) * row_bytes;
        if (inside) {
          std::memcpy(to, u.grid + b * u.grid_clip_step + id * u.grid_step, row_bytes);
        } else {
          std::memset(to, 0, row_bytes);
        }
      }
    }
  };
  if (wants_tokens && sums) gather(0, u.clips);
  if (wants_tokens && !sums) {
    const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, u.kept * row_bytes));
    torch::stable::parallel_for(0, u.clips, grain, gather);
  }
  if (wants_mask_token) {
    float* sum = static_cast<float*>(d_mask_token.mutable_data_ptr());
    const float* part = static_cast<const float*>(partial.const_data_ptr());
    std::fill_n(sum, u.width, 0.0f);
    for (int64_t block = 0; block < blocks; ++block, part += u.width) {
      for (int64_t i = 0; i < u.width; ++i) sum[i] += part[i];
    }
    d_mask_token = torch::stable::to(d_mask_token, mask_token.scalar_type());
  }
  if (wants_pos) d_pos = torch::stable::to(d_pos, pos.scalar_type());
  return {d_tokens, d_mask_token, d_pos};
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("unshuffle", TORCH_BOX(&audiomae::unshuffle));
  m.impl("unshuffle_backward", TORCH_BOX(&audiomae::unshuffle_backward));
}

#endif  // AUDIOMAE_ENTRY
