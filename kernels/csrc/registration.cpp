// The schemas of all ops. Each op's implementation is registered at the end of its own file.
#include <string>

#include <torch/csrc/stable/library.h>

#include "tier.h"

namespace {

constexpr const char* kSchemas[] = {
    "attention(Tensor qkv, Tensor? cu_seqlens, Tensor? seed, float dropout) -> (Tensor, Tensor)",
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor statistics, Tensor? cu_seqlens, Tensor? seed,"
    " float dropout) -> Tensor",
    "fbank(Tensor waveform, Tensor window, Tensor first, Tensor bins, Tensor weights, int fft_size, int shift,"
    " float preemphasis, bool remove_dc_offset) -> Tensor",
    "patch_gather(Tensor spectrogram, Tensor ids, int patch_t, int patch_f, int stride_t, int stride_f)"
    " -> Tensor",
    "unshuffle(Tensor tokens, Tensor ids_keep, Tensor mask_token, Tensor pos) -> Tensor",
    "unshuffle_backward(Tensor grad, Tensor ids_keep, Tensor mask_token, Tensor pos, bool wants_tokens,"
    " bool wants_mask_token, bool wants_pos) -> (Tensor, Tensor, Tensor)",
    "masked_mse(Tensor pred, Tensor spectrogram, Tensor ids_masked, int patch_t, int patch_f, int stride_t,"
    " int stride_f, bool normalize) -> Tensor",
    "masked_mse_backward(Tensor grad, Tensor pred, Tensor spectrogram, Tensor ids_masked, int patch_t,"
    " int patch_f, int stride_t, int stride_f, bool normalize) -> Tensor",
    "window_attention(Tensor qkv, Tensor? tau, Tensor? bias, int grid_t, int grid_f, int window_t, int window_f,"
    " int shift_t, int shift_f) -> Tensor",
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor? tau, Tensor? bias, int grid_t, int grid_f,"
    " int window_t, int window_f, int shift_t, int shift_f, bool wants_qkv, bool wants_tau, bool wants_bias)"
    " -> (Tensor, Tensor, Tensor)",
    "info_nce(Tensor pred, Tensor target, str over) -> (Tensor, Tensor)",
    "info_nce_backward(Tensor grad, Tensor pred, Tensor target, Tensor lse, str over, bool wants_pred,"
    " bool wants_target) -> (Tensor, Tensor)",
};

// One op name per line.
std::string ops() {
  std::string names;
  for (const std::string schema : kSchemas) names += schema.substr(0, schema.find('(')) + '\n';
  return names;
}

std::string cpu_tiers() { return audiomae::describe_cpu_tiers(); }

}  // namespace

// A digest of the sources. Python finds it in the file's bytes, so that a stale library is never loaded.
extern "C" __attribute__((visibility("default"), used)) const char audiomae_native_stamp[] =
    "audiomae_native_stamp=" AUDIOMAE_STAMP ";";

STABLE_TORCH_LIBRARY(audiomae_native, m) {
  m.def("ops() -> str");
  m.def("cpu_tiers() -> str");
  for (const char* schema : kSchemas) m.def(schema);
}

// No tensor among the arguments: the only key under which the dispatcher looks.
STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CompositeExplicitAutograd, m) {
  m.impl("ops", TORCH_BOX(&ops));
  m.impl("cpu_tiers", TORCH_BOX(&cpu_tiers));
}
