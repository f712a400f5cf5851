#include "kernels.h"

namespace bitwright {
namespace {
#include "rounding.h"
#include "search.h"
#include "columns.h"
}
extern const Kernels avx2_kernels{"avx2", search, visit, sweep};
}  // namespace bitwright
