#include <immintrin.h>

#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 8;
#include "isa/all.h"
}
extern const Kernels avx2_kernels = table("avx2");
}  // namespace bitwright
