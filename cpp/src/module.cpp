// The `halfbyte._C` extension: capability and build information for Python. Operators register themselves (torch/).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "halfbyte/dispatch.h"

PYBIND11_MODULE(_C, m) {
  halfbyte::kernels();  // resolve now, so that a bad HALFBYTE_CPU_CAPABILITY fails at import and not in a layer
  m.def("cpu_capability", &halfbyte::active_level);
  m.def("set_cpu_capability", &halfbyte::set_active_level);
  m.def("available_capabilities", &halfbyte::supported_levels);
  m.def("compiled_capabilities", &halfbyte::compiled_levels);
  // Rows of int8 and of float x, and outputs, that one inner tile of the active level's matrix products computes.
  m.def("matmul_tile", [] {
    const halfbyte::MatmulKernels& kernel = halfbyte::kernels().matmul;
    return std::make_tuple(kernel.rows_per_tile, kernel.float_rows_per_tile, kernel.panels_per_tile * halfbyte::kPanel);
  });
  m.attr("torch_version") = HALFBYTE_TORCH_VERSION;
  m.attr("compiler") = HALFBYTE_COMPILER;
}
