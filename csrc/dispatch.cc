// Which instruction set this process runs: the best one compiled in that the processor has, chosen once.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace normscope {

extern const Kernels kernels_baseline[kDTypes];
#if defined(NORMSCOPE_X86)
extern const Kernels kernels_avx2[kDTypes];
extern const Kernels kernels_avx512[kDTypes];
#endif

namespace {

struct InstructionSet {
  const Kernels* table;
  bool (*runs_here)();
};

// Most preferred first.
const InstructionSet kInstructionSets[] = {
#if defined(NORMSCOPE_X86)
    {kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
    {kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {kernels_baseline, [] { return true; }},
};

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table = [] {
    for (const InstructionSet& set : kInstructionSets) {
      if (set.runs_here()) return set.table;
    }
    return kernels_baseline;
  }();
  return table;
}

}  // namespace

const Kernels& kernels(DType dtype) {
  return chosen().load(std::memory_order_relaxed)[static_cast<std::size_t>(dtype)];
}

std::size_t instruction_sets(const char** names, std::size_t capacity) {
  std::size_t count = 0;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here() && count < capacity) names[count++] = set.table->name;
  }
  return count;
}

const char* instruction_set() { return kernels(DType::float64).name; }

bool use_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here() && std::strcmp(set.table->name, name) == 0) {
      chosen().store(set.table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace normscope
