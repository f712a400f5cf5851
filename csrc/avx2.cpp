#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 8;
#include "rounding.h"
#include "search.h"
#include "columns.h"
#include "tuning.h"
}
extern const Kernels avx2_kernels{"avx2", search, pick, visit, sweep, tune};
}  // namespace bitwright
