#include "kernels.h"

namespace bitwright {
namespace {
#include "rounding.h"
}
extern const Kernels avx512_kernels{"avx512", search, visit, sweep};
}  // namespace bitwright
