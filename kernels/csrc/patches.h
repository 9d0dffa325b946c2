// Patches of a spectrogram by token id, as patch_gather and masked_mse read them.
//
// B spectrograms, m masks of each, K ids per mask, T time frames, F mel bands, (pt, pf) patch.
#pragma once

#include <cstdint>

namespace audiomae {

struct Patches {
  const char* spectrogram;                  // (B, T, F)
  const char* ids;                          // (B*m, K) int64
  int64_t batch_step, time_step, mel_step;  // bytes from one spectrogram, frame, band to the next
  int64_t ids_row_step, ids_step;           // bytes
  int64_t masks, kept;                      // m, K
  int64_t count;                            // B*m*K
  int64_t grid_t, grid_f;                   // patches along time and mel; ids are time-major on this grid
  int64_t patch_step_t, patch_step_f;       // bytes from one patch to the next
  int64_t rows, columns;                    // of a patch, in elements
  int64_t element;                          // bytes: 2, 4 or 8
};

namespace AUDIOMAE_TIER {
namespace {

// Walks the patches [begin, end) of the flattened (B*m, K), a few ahead of the caller: patches are short rows
// far apart, which the machine does not foresee, so that they are asked for early.
class PatchWalk {
 public:
  PatchWalk(const Patches& patches, int64_t begin, int64_t end)
      : p_(patches), mask_(begin / p_.kept), k_(begin % p_.kept), left_(end - begin) {
    for (const char*& patch : ahead_) patch = ask();
  }

  // The first byte of the next patch, or null: its id names no patch.
  const char* next() {
    const char* patch = ahead_[at_];
    ahead_[at_] = ask();
    at_ = (at_ + 1) % kAhead;
    return patch;
  }

 private:
  static constexpr int kAhead = 4;

  const char* ask() {
    if (left_ == 0) return nullptr;
    const char* patch = find();
    --left_;
    if (++k_ == p_.kept) {
      k_ = 0;
      ++mask_;
    }
    const char* row = patch;
    for (int64_t r = 0; row != nullptr && r < p_.rows; ++r, row += p_.time_step) __builtin_prefetch(row);
    return patch;
  }

  const char* find() const {
    int64_t id;
    __builtin_memcpy(&id, p_.ids + mask_ * p_.ids_row_step + k_ * p_.ids_step, sizeof(id));
    if (id < 0 || id >= p_.grid_t * p_.grid_f) return nullptr;
    const int64_t t = id / p_.grid_f, f = id - t * p_.grid_f, clip = p_.masks == 1 ? mask_ : mask_ / p_.masks;
    return p_.spectrogram + clip * p_.batch_step + t * p_.patch_step_t + f * p_.patch_step_f;
  }

  const Patches& p_;
  int64_t mask_, k_, left_;
  const char* ahead_[kAhead];
  int at_ = 0;
};

}  // namespace
}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>

#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace audiomae {

// Checks everything but the spectrogram's dtype; `op` and `ids_name` are for the messages. The patches refer
// to the tensors' memory.
inline Patches find_patches(const char* op, const char* ids_name, const torch::stable::Tensor& spectrogram,
                            const torch::stable::Tensor& ids, int64_t patch_t, int64_t patch_f,
                            int64_t stride_t, int64_t stride_f) {
  check(spectrogram.dim() == 3, op, " expects a spectrogram of shape (batch, time, mel), got ",
        shape(spectrogram), ".");
  check(ids.dim() == 2, op, " expects ", ids_name, " of shape (batch * masks, kept), got ", shape(ids), ".");
  check(spectrogram.is_cpu() && ids.is_cpu(), op, " of the native library expects CPU tensors.");
  check(ids.scalar_type() == torch::headeronly::ScalarType::Long, op, " expects int64 ", ids_name, ", got ",
        dtype_name(ids), ".");

  const int64_t batch = spectrogram.size(0), time = spectrogram.size(1), mel = spectrogram.size(2);
  check(patch_t >= 1 && patch_f >= 1 && stride_t >= 1 && stride_f >= 1, op,
        " expects patch and stride of at least 1, got patch (", patch_t, ", ", patch_f, ") and stride (",
        stride_t, ", ", stride_f, ").");
  check(patch_t <= time && patch_f <= mel, op, " expects a patch that fits the spectrogram's ", time, " x ",
        mel, " (time, mel), got ", patch_t, " x ", patch_f, ".");
  const int64_t rows = ids.size(0), kept = ids.size(1);
  check(batch == 0 ? rows == 0 : rows % batch == 0, op, " expects ", ids_name,
        " of shape (batch * masks, kept) for a batch of ", batch, ", got ", shape(ids), ".");

  const int64_t element = spectrogram.element_size();
  const int64_t time_step = byte_step(spectrogram, 1), mel_step = byte_step(spectrogram, 2);
  Patches p{
      static_cast<const char*>(spectrogram.const_data_ptr()),
      static_cast<const char*>(ids.const_data_ptr()),
      byte_step(spectrogram, 0), time_step, mel_step,
      byte_step(ids, 0), byte_step(ids, 1),
      batch == 0 ? 0 : rows / batch, kept, rows * kept,
      (time - patch_t) / stride_t + 1, (mel - patch_f) / stride_f + 1,
      // A stride past the end leads to no second patch.
      std::min(stride_t, time) * time_step, std::min(stride_f, mel) * mel_step,
      patch_t, patch_f,
      element,
  };
  if (mel_step == element && time_step == patch_f * element) {  // whole frames: the patch is one run of bytes
    p.columns *= p.rows;
    p.rows = 1;
  }
  return p;
}

}  // namespace audiomae

#endif  // AUDIOMAE_ENTRY
