// patch_gather: (B, T, F), (B*m, K) -> (B*m, K, pt*pf). Copies the patches that ids name, bit for bit.
//
// B spectrograms, m masks of each, K ids per mask, T time frames, F mel bands, (pt, pf) patch.
#include "tier.h"

#include <cstdint>
#include <cstring>

namespace audiomae {

struct PatchGather {
  const char* spectrogram;                 // (B, T, F)
  const char* ids;                         // (B*m, K) int64
  char* out;                               // (B*m, K, rows, columns), contiguous
  int64_t batch_step, time_step, mel_step; // bytes from one spectrogram, frame, band to the next
  int64_t ids_row_step, ids_step;          // bytes
  int64_t masks, kept;                     // m, K
  int64_t grid_t, grid_f;                  // patches along time and mel; ids are time-major on this grid
  int64_t patch_step_t, patch_step_f;      // bytes from one patch to the next
  int64_t rows, columns;                   // of a patch, in elements
  int64_t element;                         // bytes: 2, 4 or 8
};

namespace AUDIOMAE_TIER {
namespace {

// Pieces of constant size become vector moves of the tier's width.
inline void copy_bytes(char* out, const char* in, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) std::memcpy(out + i, in + i, 64);
  for (; i + 16 <= bytes; i += 16) std::memcpy(out + i, in + i, 16);
  for (; i + 2 <= bytes; i += 2) std::memcpy(out + i, in + i, 2);
}

// memcpy and not a load, since a tensor over foreign memory need not be aligned to its element.
template <int64_t kElement>
inline void copy_strided(char* out, const char* in, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * kElement, in + i * step, kElement);
}

template <int64_t kElement>
void gather(const PatchGather& g, int64_t begin, int64_t end) {
  const int64_t tokens = g.grid_t * g.grid_f;
  const int64_t row_bytes = g.columns * kElement, patch_bytes = g.rows * row_bytes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t mask = i / g.kept, k = i % g.kept;
    char* out = g.out + i * patch_bytes;
    int64_t id;
    std::memcpy(&id, g.ids + mask * g.ids_row_step + k * g.ids_step, sizeof(id));
    if (id < 0 || id >= tokens) {
      std::memset(out, 0, patch_bytes);
      continue;
    }
    const char* in = g.spectrogram + mask / g.masks * g.batch_step + id / g.grid_f * g.patch_step_t +
                     id % g.grid_f * g.patch_step_f;
    for (int64_t row = 0; row < g.rows; ++row, in += g.time_step, out += row_bytes) {
      if (g.mel_step == kElement) {
        copy_bytes(out, in, row_bytes);
      } else {
        copy_strided<kElement>(out, in, g.columns, g.mel_step);
      }
    }
  }
}

}  // namespace

// Patches [begin, end) of the flattened (B*m, K).
void gather_patches(const PatchGather& g, int64_t begin, int64_t end) {
  switch (g.element) {
    case 2: return gather<2>(g, begin, end);
    case 4: return gather<4>(g, begin, end);
    case 8: return gather<8>(g, begin, end);
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

AUDIOMAE_DECLARE(void gather_patches(const PatchGather& g, int64_t begin, int64_t end))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor patch_gather(const Tensor& spectrogram, const Tensor& ids, int64_t patch_t, int64_t patch_f,
                    int64_t stride_t, int64_t stride_f) {
  check(spectrogram.dim() == 3, "patch_gather expects a spectrogram of shape (batch, time, mel), got ",
        shape(spectrogram), ".");
  check(ids.dim() == 2, "patch_gather expects ids of shape (batch * masks, kept), got ", shape(ids), ".");
  check(spectrogram.is_cpu() && ids.is_cpu(), "patch_gather of the native library expects CPU tensors.");
  const ScalarType dtype = spectrogram.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        "patch_gather expects a float32, float64, bfloat16 or float16 spectrogram, got ",
        torch::headeronly::toString(dtype), ".");
  check(ids.scalar_type() == ScalarType::Long, "patch_gather expects int64 ids, got ",
        torch::headeronly::toString(ids.scalar_type()), ".");

  const int64_t batch = spectrogram.size(0), time = spectrogram.size(1), mel = spectrogram.size(2);
  check(patch_t >= 1 && patch_f >= 1 && stride_t >= 1 && stride_f >= 1,
        "patch_gather expects patch and stride of at least 1, got patch (", patch_t, ", ", patch_f,
        ") and stride (", stride_t, ", ", stride_f, ").");
  check(patch_t <= time && patch_f <= mel, "patch_gather expects a patch that fits the spectrogram's ", time,
        " x ", mel, " (time, mel), got ", patch_t, " x ", patch_f, ".");
  const int64_t rows = ids.size(0), kept = ids.size(1);
  check(batch == 0 ? rows == 0 : rows % batch == 0,
        "patch_gather expects ids of shape (batch * masks, kept) for a batch of ", batch, ", got ",
        shape(ids), ".");

  Tensor out = torch::stable::new_empty(spectrogram, {rows, kept, patch_t * patch_f});
  const int64_t patches = rows * kept;
  if (patches == 0) return out;

  const int64_t element = spectrogram.element_size();
  const int64_t time_step = spectrogram.stride(1) * element, mel_step = spectrogram.stride(2) * element;
  PatchGather g{
      static_cast<const char*>(spectrogram.const_data_ptr()),
      static_cast<const char*>(ids.const_data_ptr()),
      static_cast<char*>(out.mutable_data_ptr()),
      spectrogram.stride(0) * element, time_step, mel_step,
      ids.stride(0) * int64_t(sizeof(int64_t)), ids.stride(1) * int64_t(sizeof(int64_t)),
      rows / batch, kept,
      (time - patch_t) / stride_t + 1, (mel - patch_f) / stride_f + 1,
      stride_t * time_step, stride_f * mel_step,
      patch_t, patch_f,
      element,
  };
  if (mel_step == element && time_step == patch_f * element) {  // whole frames: the patch is one run of bytes
    g.columns *= g.rows;
    g.rows = 1;
  }
  static const auto gather = AUDIOMAE_SELECT(gather_patches);
  constexpr int64_t kBytesPerTask = 32768;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / (patch_t * patch_f * element));
  torch::stable::parallel_for(0, patches, grain, [&](int64_t begin, int64_t end) { gather(g, begin, end); });
  return out;
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("patch_gather", TORCH_BOX(&audiomae::patch_gather));
}

#endif  // AUDIOMAE_ENTRY
