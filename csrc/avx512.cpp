#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 16;
#include "rounding.h"
#include "search.h"
#include "columns.h"
#include "tuning.h"
}
extern const Kernels avx512_kernels{"avx512", search, pick, visit, sweep, tune};
}  // namespace bitwright
