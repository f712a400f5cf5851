#include <immintrin.h>

#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 16;
#include "isa/all.h"
}
extern const Kernels avx512_vnni_kernels = table("avx512_vnni");
}  // namespace bitwright
