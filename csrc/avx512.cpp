#include "kernels.h"

namespace bitwright {
namespace {
#include "rounding.h"
#include "search.h"
#include "columns.h"
}
extern const Kernels avx512_kernels{"avx512", search, visit, sweep};
}  // namespace bitwright
