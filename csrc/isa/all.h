// Every kernel, written once in vectors of LANES floats. A file of this folder includes it in a namespace of its own, and the
// compiler's flags for that file say which instructions it becomes.
#include "rounding/rounding.h"
#include "rounding/search.h"
#include "rounding/superblocks.h"
#include "rounding/lattice.h"
#include "rounding/encode.h"
#include "rounding/columns.h"
#include "rounding/tuning.h"
#include "simd/dot.h"
#include "simd/tiles.h"
#include "products/matmul.h"
#include "products/one_row.h"
#include "products/few_rows.h"
#include "products/many_rows.h"
#include "products/decode.h"
#include "products/inputs.h"
#include "products/dense.h"
#include "products/key_values.h"
#include "products/attention.h"
#include "products/integer.h"
#include "products/pooling.h"
#include "products/recurrent.h"

constexpr Kernels table(const char *name) {
    return {name, search, refine, nearest_runs, encode, missed, widen, round_columns, sweep, tune, round_inputs, multiply, decode, dense, attend,
            keep, gate, normalize, enter_codes, round_samples, place_codes, multiply_codes, pool_codes, add_codes, gates};
}
