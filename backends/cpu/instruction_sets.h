// Which of the compiled kernels this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace selfextend {

// The names of the instruction sets that this machine runs, best first.
std::vector<std::string> instruction_sets();

// The kernel for one of them; any other name is an error.
const Kernel& find_kernel(const std::string& instruction_set);

}  // namespace selfextend
