#include <arm_neon.h>

#include "kernels.h"

namespace bitwright {
namespace {
constexpr int LANES = 4;
#include "rounding.h"
#include "search.h"
#include "superblocks.h"
#include "encode.h"
#include "columns.h"
#include "tuning.h"
#include "dot.h"
#include "matmul.h"
#include "inputs.h"
#include "dense.h"
#include "attention.h"
}
extern const Kernels neon_kernels{"neon", search, refine, encode, missed, visit, sweep, tune, round_inputs, multiply,
                                   dense, attend, halve, gate};
}  // namespace bitwright
