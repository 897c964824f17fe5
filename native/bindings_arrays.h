// Arrays as Python hands them over, and what they are checked for.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace nb = nanobind;

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<uint8_t>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids2 = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Copies = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline void require(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

// Far above any model, far below where sizes overflow.
inline void check_sizes(int64_t n, int64_t k) { require(n > 0 && k > 0 && n <= 1 << 26 && k <= 1 << 26, "matrix sizes must be in [1, 2^26]"); }

inline kvik::Layout layout_of(int32_t layout) {
    require(layout >= 0 && layout < kvik::kLayouts, "unknown layout");
    return kvik::Layout(layout);
}

inline kvik::Matrix matrix_of(const Bytes& data, int32_t layout, int32_t n, int32_t k) {
    check_sizes(n, k);
    kvik::Matrix m{layout_of(layout), data.data(), n, k};
    require(data.size() == m.bytes(), "packed bytes do not fit the matrix");
    return m;
}

inline kvik::Activation activation_of(int32_t activation) {
    require(activation >= 0 && activation < kvik::kActivations, "unknown activation");
    return kvik::Activation(activation);
}
