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
#include "tiles.h"
#include "matmul.h"
#include "inputs.h"
#include "dense.h"
#include "attention.h"
#include "integer.h"
#include "between.h"
#include "recurrent.h"
}
extern const Kernels scalar_kernels{"scalar", search, refine, encode, missed, widen, visit, sweep, tune, round_inputs,
                                    multiply, dense, attend, halve, gate, enter_codes, round_samples, place_codes,
                                    multiply_codes, pool_codes, add_codes, gates};
}  // namespace bitwright
