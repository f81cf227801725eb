#pragma once
// In the place of CuPy's complex.cuh where g++ compiles a kernel: the emulator has no complex numbers on the device.
#include <cassert>
#include <cmath>
#include <complex>
#define __CUDACC_VER_MAJOR__ 13   // so that cupy/float16.cuh takes cuda_fp16.h, which cuda_cpu.h has included
using std::complex;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;
