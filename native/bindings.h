// What the files that know Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"

// "" and "auto": KVIK_ISA where it is set, else the best this processor has. std::invalid_argument for one that is not here.
const kvik::Kernels& kernels_named(std::string name);

void bind_sampler(nanobind::module_&);
