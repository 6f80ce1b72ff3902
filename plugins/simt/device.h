// The device language of this project's kernels: CUDA C++ for NVRTC, its emulation (cpu.h) for any C++17 compiler.
// Kernels include nothing else, contain no inline PTX (that is ptx.h's) and keep to the rules in README.md.
#pragma once
#ifdef __CUDACC_RTC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
using bf16 = __nv_bfloat16;
using bf162 = __nv_bfloat162;

#define DEVICE __device__ __forceinline__
// The block's dynamic shared memory; a kernel has no other.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
// An entry point: `body` is a device function of one struct.
#define KERNEL(symbol, threads, min_blocks, Arguments, body)                                     \
  extern "C" __global__ void __launch_bounds__(threads, min_blocks) symbol(Arguments arguments) { \
    EXPAND body(arguments);                                                                       \
  }
#define EXPAND(...) __VA_ARGS__
#define INFINITY __int_as_float(0x7f800000)

#else
#include "plugins/simt/cpu.h"
#endif

#include "plugins/simt/ptx.h"
#include "plugins/simt/numbers.h"
