#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 4;
#include "rounding.h"
#include "search.h"
#include "columns.h"
#include "tuning.h"
}
extern const Kernels scalar_kernels{"scalar", search, pick, visit, sweep, tune};
}  // namespace bitwright
