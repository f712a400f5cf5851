#include <immintrin.h>

#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 8;
#include "isa/all.h"
}
extern const Kernels avx_vnni_kernels = table("avx_vnni");
}  // namespace bitwright
