// Asks the processor which instruction sets it has.
#include "instruction_sets.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace selfextend {
namespace {

// Best first.
const std::vector<const Kernel*>& runnable_kernels() {
  static const std::vector<const Kernel*> kernels = [] {
    std::vector<const Kernel*> found;
#ifdef SELFEXTEND_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16);
      found.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernel* kernel : runnable_kernels()) names.emplace_back(kernel->name);
  return names;
}

const Kernel& find_kernel(const std::string& instruction_set) {
  for (const Kernel* kernel : runnable_kernels()) {
    if (instruction_set == kernel->name) return *kernel;
  }
  TORCH_CHECK_VALUE(false, "instruction_set is '", instruction_set, "'; this machine runs ",
                    c10::Join(", ", instruction_sets()));
}

}  // namespace selfextend
