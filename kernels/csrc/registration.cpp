// The schemas of all ops. Each op's implementation is registered at the end of its own file.
#include <string>

#include <torch/csrc/stable/library.h>

#include "tier.h"

namespace {

constexpr const char* kSchemas[] = {
    "patch_gather(Tensor spectrogram, Tensor ids, int patch_t, int patch_f, int stride_t, int stride_f)"
    " -> Tensor",
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
