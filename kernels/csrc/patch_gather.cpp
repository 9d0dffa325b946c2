// patch_gather: (B, T, F), (B*m, K) -> (B*m, K, pt*pf). Copies the patches that ids name, bit for bit.
#include "tier.h"

#include <cstdint>
#include <cstring>

#include "patches.h"

namespace audiomae {
namespace AUDIOMAE_TIER {
namespace {

template <int kSize>
struct Bytes {
  char bytes[kSize];
};

// Pieces of constant size become vector moves of the tier's width. A row is short: no loop but the first.
inline void copy_bytes(char* out, const char* in, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) std::memcpy(out + i, in + i, 64);
  const auto piece = [&](auto size) {
    if (bytes & sizeof(size)) {
      std::memcpy(out + i, in + i, sizeof(size));
      i += sizeof(size);
    }
  };
  piece(Bytes<32>{});
  piece(Bytes<16>{});
  piece(Bytes<8>{});
  piece(Bytes<4>{});
  piece(Bytes<2>{});
}

// memcpy and not a load, since a tensor over foreign memory need not be aligned to its element.
template <int64_t kElement>
inline void copy_strided(char* out, const char* in, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * kElement, in + i * step, kElement);
}

template <int64_t kElement>
void gather(const Patches& p, char* out, int64_t begin, int64_t end) {
  const int64_t row_bytes = p.columns * kElement, patch_bytes = p.rows * row_bytes;
  out += begin * patch_bytes;
  PatchWalk walk(p, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    const char* in = walk.next();
    if (in == nullptr) {
      std::memset(out, 0, patch_bytes);
      out += patch_bytes;
      continue;
    }
    const auto for_each_row = [&](const auto& copy) {
      for (int64_t row = 0; row < p.rows; ++row, in += p.time_step, out += row_bytes) copy();
    };
    if (p.mel_step != kElement) {
      for_each_row([&] { copy_strided<kElement>(out, in, p.columns, p.mel_step); });
    } else if (row_bytes == 16 * kElement) {  // published patches: a row is one move
      for_each_row([&] { std::memcpy(out, in, 16 * kElement); });
    } else {
      for_each_row([&] { copy_bytes(out, in, row_bytes); });
    }
  }
}

}  // namespace

// Patches [begin, end) of the flattened (B*m, K); out is the whole, contiguous (B*m, K, pt*pf).
void gather_patches(const Patches& p, char* out, int64_t begin, int64_t end) {
  switch (p.element) {
    case 2: return gather<2>(p, out, begin, end);
    case 4: return gather<4>(p, out, begin, end);
    case 8: return gather<8>(p, out, begin, end);
  }
}

}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace audiomae {

AUDIOMAE_DECLARE(void gather_patches(const Patches& p, char* out, int64_t begin, int64_t end))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor patch_gather(const Tensor& spectrogram, const Tensor& ids, int64_t patch_t, int64_t patch_f,
                    int64_t stride_t, int64_t stride_f) {
  const ScalarType dtype = spectrogram.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        "patch_gather expects a float32, float64, bfloat16 or float16 spectrogram, got ",
        dtype_name(spectrogram), ".");
  const Patches patches =
      find_patches("patch_gather", "ids", spectrogram, ids, patch_t, patch_f, stride_t, stride_f);

  Tensor out = torch::stable::new_empty(spectrogram, {ids.size(0), ids.size(1), patch_t * patch_f});
  if (patches.count == 0) return out;
  char* data = static_cast<char*>(out.mutable_data_ptr());
  static const auto gather = AUDIOMAE_SELECT(gather_patches);
  constexpr int64_t kBytesPerTask = 32768;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / (patch_t * patch_f * patches.element));
  torch::stable::parallel_for(0, patches.count, grain,
                              [&](int64_t begin, int64_t end) { gather(patches, data, begin, end); });
  return out;
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("patch_gather", TORCH_BOX(&audiomae::patch_gather));
}

#endif  // AUDIOMAE_ENTRY
