#include <arm_neon.h>

#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 4;
#include "isa/all.h"
}
extern const Kernels neon_kernels = table("neon");
}  // namespace bitwright
