// Arrays as the two files that round take them.
#pragma once
#include "python/bind.h"

namespace bitwright {

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CodeArray = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // int8 or uint8

template <class Array>
void shaped(const Array &array, size_t rows, size_t columns, const char *message) {
    require(array.shape(0) == rows && array.shape(1) == columns, message);
}

inline int8_t *bytes_of(CodeArray &codes) {
    require(codes.dtype().bits == 8, "codes must be int8 or uint8");
    return (int8_t *)codes.data();
}

template <class Array>
const float *data_of(std::optional<Array> &array) {
    return array ? array->data() : nullptr;
}

// For a group of g weights in MOST_LANES rows.
inline size_t room_of_group(ptrdiff_t g) { return (MOST_LANES + 1) * g; }

}  // namespace bitwright
