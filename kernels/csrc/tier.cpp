#include "tier.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#ifdef AUDIOMAE_X86_TIERS
#include <cpuid.h>
#endif
#if defined(AUDIOMAE_AMX_TIER) && !defined(AUDIOMAE_EMULATED_TILES)
#define AUDIOMAE_ASKS_FOR_TILES
#include <cerrno>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace audiomae {
namespace {

#define AUDIOMAE_TIER_NAME(tier, ...) #tier,
constexpr const char* kNames[] = {AUDIOMAE_FOR_EACH_TIER(AUDIOMAE_TIER_NAME, )
                                      AUDIOMAE_FOR_THE_AMX_TIER(AUDIOMAE_TIER_NAME, )};
constexpr int kTiers = sizeof(kNames) / sizeof(kNames[0]);

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

#ifdef AUDIOMAE_X86_TIERS

// XCR0: which registers the operating system saves. A CPU flag alone does not make its instructions legal.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

#ifdef AUDIOMAE_ASKS_FOR_TILES

// Linux keeps the tiles, 8 KiB a thread, from processes that do not ask. Empty if they are granted.
std::string tiles_refused() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("the permission of the operating system to use AMX (") + std::strerror(errno) + ")";
}

#endif

// What this machine lacks for a tier; empty if it runs there.
std::vector<std::string> missing(Tier tier) {
  uint32_t eax, ebx = 0, ecx = 0, edx, eax7 = 0, ebx7 = 0, ecx7, edx7 = 0, eax71 = 0, other;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  __get_cpuid_count(7, 0, &eax7, &ebx7, &ecx7, &edx7);
  if (eax7 >= 1) __get_cpuid_count(7, 1, &eax71, &other, &other, &other);
  const uint64_t saved = ecx & bit_OSXSAVE ? xcr0() : 0;
  constexpr uint64_t ymm = 0x06, zmm = 0xe6;
  [[maybe_unused]] constexpr uint64_t tiles = 0x60000;

  const struct {
    Tier tier;
    bool present;
    const char* name;
  } needs[] = {
      {Tier::avx2, (ecx & bit_AVX) != 0, "avx"},
      {Tier::avx2, (ebx7 & bit_AVX2) != 0, "avx2"},
      {Tier::avx2, (ecx & bit_FMA) != 0, "fma"},
      {Tier::avx2, (ecx & bit_F16C) != 0, "f16c"},
      {Tier::avx2, (saved & ymm) == ymm, "256-bit registers saved by the operating system"},
      {Tier::avx512, (ebx7 & bit_AVX512F) != 0, "avx512f"},
      {Tier::avx512, (ebx7 & bit_AVX512BW) != 0, "avx512bw"},
      {Tier::avx512, (ebx7 & bit_AVX512DQ) != 0, "avx512dq"},
      {Tier::avx512, (ebx7 & bit_AVX512VL) != 0, "avx512vl"},
#ifdef AUDIOMAE_BF16_TIER
      {Tier::avx512_bf16, (eax71 & (1u << 5)) != 0, "avx512_bf16"},
#endif
      {Tier::avx512, (saved & zmm) == zmm, "512-bit registers saved by the operating system"},
#ifdef AUDIOMAE_ASKS_FOR_TILES
      {Tier::amx, (edx7 & (1u << 24)) != 0, "amx_tile"},
      {Tier::amx, (edx7 & (1u << 22)) != 0, "amx_bf16"},
      {Tier::amx, (saved & tiles) == tiles, "AMX tiles saved by the operating system"},
#endif
  };
  std::vector<std::string> names;
  for (const auto& need : needs) {
    if (need.tier <= tier && !need.present) names.push_back(need.name);
  }
#ifdef AUDIOMAE_ASKS_FOR_TILES
  if (tier == Tier::amx && names.empty()) {
    if (const std::string refused = tiles_refused(); !refused.empty()) names.push_back(refused);
  }
#endif
  return names;
}

#else

std::vector<std::string> missing(Tier) { return {}; }

#endif

const char* forced_tier() {
  const char* name = std::getenv("AUDIOMAE_CPU_TIER");
  return name && *name ? name : nullptr;
}

Tier choose() {
  if (const char* name = forced_tier()) {
    const std::string setting = std::string("AUDIOMAE_CPU_TIER=") + name;
    for (int i = 0; i < kTiers; ++i) {
      if (name != std::string(kNames[i])) continue;
      const auto lacks = missing(Tier(i));
      if (lacks.empty()) return Tier(i);
      throw std::runtime_error(setting + " cannot run on this machine: it lacks " + join(lacks) +
                               ". Unset the variable or name a lower tier.");
    }
    throw std::runtime_error(setting + " is not a tier of this build, which has " +
                             join({kNames, kNames + kTiers}) + ".");
  }
  int best = kTiers - 1;
  while (best > 0 && !missing(Tier(best)).empty()) --best;
  return Tier(best);
}

}  // namespace

Tier cpu_tier() {
  static const Tier tier = choose();
  return tier;
}

std::string describe_cpu_tiers() {
  int chosen = -1;
  std::string error, text;
  try {
    chosen = int(cpu_tier());
  } catch (const std::runtime_error& e) {
    error = e.what();
  }
  for (int i = 0; i < kTiers; ++i) {
    const auto lacks = missing(Tier(i));
    std::string reason;
    if (!lacks.empty()) {
      reason = "this machine lacks " + join(lacks);
    } else if (chosen < 0) {
      reason = error;
    } else if (i == chosen) {
      reason = forced_tier() ? "named by AUDIOMAE_CPU_TIER" : "the highest that this machine runs";
    } else {
      reason = forced_tier() ? "AUDIOMAE_CPU_TIER names another" : "a higher one runs here";
    }
    text += std::string(kNames[i]) + '\t' + (i == chosen ? '1' : '0') + '\t' + reason + '\n';
  }
  return text;
}

}  // namespace audiomae
