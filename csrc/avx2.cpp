#include "kernels.h"

namespace bitwright {
namespace {
#include "rounding.h"
}
extern const Kernels avx2_kernels{"avx2", search, visit, sweep};
}  // namespace bitwright
