// Takes the place of core/dispatch.cpp in the emulated tests: the scalar level, and levels that this CPU need not have.
#include "halfbyte/dispatch.h"

#include <stdexcept>

namespace halfbyte {
namespace {

const KernelTable* const kTables[] = {&scalar::kernel_table, &avxvnni::kernel_table, &avx512vnni::kernel_table,
                                      &amx::kernel_table};
const KernelTable* active = &scalar::kernel_table;

}  // namespace

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const KernelTable* table : kTables) names.emplace_back(table->name);
  return names;
}

std::vector<std::string> compiled_levels() { return supported_levels(); }
const KernelTable& kernels() { return *active; }
std::string active_level() { return active->name; }

void set_active_level(const std::string& name) {
  for (const KernelTable* table : kTables) {
    if (name == table->name) {
      active = table;
      return;
    }
  }
  throw std::invalid_argument("level '" + name + "' is not emulated");
}

}  // namespace halfbyte
