// What the files of the Python face share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "runtime/pool.h"

namespace nb = nanobind;

namespace bitwright {

extern const Kernels *chosen;  // the instruction set in force

using Values = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32 or bfloat16

// ValueError with this message, unless the condition holds.
void require(bool condition, const char *message);

// Whether the numbers are bfloat16; they are float32 otherwise.
bool is_half(const Values &values);

void bind_blocks(nb::module_ &m);
void bind_products(nb::module_ &m);
void bind_layers(nb::module_ &m);

}  // namespace bitwright
