// ISA tiers. An op's source is compiled once per tier, into the namespace audiomae::<tier>; CPUID and
// XCR0 choose one tier per process.
//
// The part of a source above `#ifdef AUDIOMAE_ENTRY` sees every tier's flags, the part below it only the
// portable ones. Above it, use no inline function or template of any library: the linker keeps a single
// copy of such a function, and if that is the AVX-512 one, an older CPU dies in it.
#pragma once

#ifdef AUDIOMAE_BF16_TIER  // the compiler knows it
#define AUDIOMAE_FOR_THE_BF16_TIER(X, ...) X(avx512_bf16, __VA_ARGS__)
#else
#define AUDIOMAE_FOR_THE_BF16_TIER(X, ...)
#endif

#ifdef AUDIOMAE_X86_TIERS
#define AUDIOMAE_FOR_EACH_TIER(X, ...) \
  X(portable, __VA_ARGS__)             \
  X(avx2, __VA_ARGS__)                 \
  X(avx512, __VA_ARGS__)               \
  AUDIOMAE_FOR_THE_BF16_TIER(X, __VA_ARGS__)
#else
#define AUDIOMAE_FOR_EACH_TIER(X, ...) X(portable, __VA_ARGS__)
#endif

// The highest tier, which few ops have a version for; the others run their next lower one there.
#ifdef AUDIOMAE_AMX_TIER
#define AUDIOMAE_FOR_THE_AMX_TIER(X, ...) X(amx, __VA_ARGS__)
#else
#define AUDIOMAE_FOR_THE_AMX_TIER(X, ...)
#endif

#ifdef AUDIOMAE_ENTRY

#include <algorithm>
#include <initializer_list>
#include <string>

namespace audiomae {

#define AUDIOMAE_TIER_ENUMERATOR(tier, ...) tier,
enum class Tier {
  AUDIOMAE_FOR_EACH_TIER(AUDIOMAE_TIER_ENUMERATOR, ) AUDIOMAE_FOR_THE_AMX_TIER(AUDIOMAE_TIER_ENUMERATOR, )
};
#undef AUDIOMAE_TIER_ENUMERATOR

// The tier of this process: the highest that the machine runs, or the one that AUDIOMAE_CPU_TIER names.
// Throws std::runtime_error if that name is unknown or the machine lacks something for it.
Tier cpu_tier();

// One line per tier, "name<TAB>0 or 1 (chosen)<TAB>reason", lowest tier first.
std::string describe_cpu_tiers();

template <class Function>
Function select(std::initializer_list<Function> by_tier) {
  return by_tier.begin()[std::min<size_t>(static_cast<size_t>(cpu_tier()), by_tier.size() - 1)];
}

}  // namespace audiomae

// AUDIOMAE_DECLARE(void f(int x)) declares f in every tier's namespace; AUDIOMAE_SELECT(f) is a pointer to
// the one to call, AUDIOMAE_SELECT_WITH_AMX(f) if there is one for AMX.
#define AUDIOMAE_DECLARE_IN(tier, ...) \
  namespace tier {                     \
  __VA_ARGS__;                         \
  }
#define AUDIOMAE_DECLARE(...)                              \
  AUDIOMAE_FOR_EACH_TIER(AUDIOMAE_DECLARE_IN, __VA_ARGS__) \
  AUDIOMAE_FOR_THE_AMX_TIER(AUDIOMAE_DECLARE_IN, __VA_ARGS__)
#define AUDIOMAE_POINTER_IN(tier, function) &tier::function,
#define AUDIOMAE_SELECT(function) ::audiomae::select({AUDIOMAE_FOR_EACH_TIER(AUDIOMAE_POINTER_IN, function)})
#define AUDIOMAE_SELECT_WITH_AMX(function)                                  \
  ::audiomae::select({AUDIOMAE_FOR_EACH_TIER(AUDIOMAE_POINTER_IN, function) \
                          AUDIOMAE_FOR_THE_AMX_TIER(AUDIOMAE_POINTER_IN, function)})

#endif  // AUDIOMAE_ENTRY
