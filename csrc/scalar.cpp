#include "kernels.h"

namespace bitwright {
namespace {
#include "rounding.h"
#include "search.h"
#include "columns.h"
}
extern const Kernels scalar_kernels{"scalar", search, visit, sweep};
}  // namespace bitwright
