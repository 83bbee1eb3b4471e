#include "halfbyte/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace halfbyte {
namespace {

#if defined(__x86_64__)
bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

// Tiles of int8, and the kernel's permission to use them, which a process asks for once. Refused (an old kernel, a
// sandbox, a signal stack that is too small for the tiles) means that there are none.
bool has_amx_int8() {
#if defined(__linux__)
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // CPUID leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = [] {
    unsigned eax, ebx, ecx, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (~edx & (kAmxTile | kAmxInt8)) != 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}
#endif

struct Level {
  const KernelTable* table;
  bool (*supported)();
};

// Slowest first. Each test names every extension its object library was compiled with.
const Level kLevels[] = {
    {&scalar::kernel_table, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kernel_table,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {&avxvnni::kernel_table,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
              __builtin_cpu_supports("avxvnni");
     }},
    {&avx512vnni::kernel_table, has_avx512vnni},
    {&amx::kernel_table, [] { return has_avx512vnni() && has_amx_int8(); }},
#endif
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

const KernelTable* find(const std::string& name) {
  for (const Level& level : kLevels) {
    if (name == level.table->name && level.supported()) return level.table;
  }
  throw std::invalid_argument("CPU capability '" + name +
                              "' is not available here; use one of: " + joined(supported_levels()));
}

const KernelTable* initial() {
  const char* forced = std::getenv("HALFBYTE_CPU_CAPABILITY");
  if (forced != nullptr && *forced != '\0') return find(forced);
  const KernelTable* best = &scalar::kernel_table;
  for (const Level& level : kLevels) {
    if (level.supported()) best = level.table;
  }
  return best;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{initial()};
  return table;
}

}  // namespace

std::vector<std::string> compiled_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) names.emplace_back(level.table->name);
  return names;
}

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.supported()) names.emplace_back(level.table->name);
  }
  return names;
}

const KernelTable& kernels() { return *active().load(std::memory_order_acquire); }
std::string active_level() { return kernels().name; }
void set_active_level(const std::string& name) { active().store(find(name), std::memory_order_release); }

}  // namespace halfbyte
