#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 4;
#include "isa/all.h"
}
extern const Kernels scalar_kernels = table("scalar");
}  // namespace bitwright
