// edge.SwiGLU (plugins/swiglu/meaning.py): block (x, y) computes 8 * THREADS columns of row x, a thread 8 of them from
// 16 bytes of gate and 16 of up. Bound by memory.
#include "plugins/simt/device.h"

struct SwigluArguments {
  const void* gate_up;  // [rows, 16 vectors], gate first
  void* y;              // [rows, 8 vectors]
  int32_t vectors;
};

namespace swiglu_kernel {

DEVICE float silu(float x) { return x / (1.0f + ptx::exp2(-1.44269504f * x)); }

// round(silu(gate)) * up
template <class T>
DEVICE uint32_t gated(uint32_t gate, uint32_t up) {
  const float2 g = unpack<T>(gate);
  return multiply<T>(pack<T>(silu(g.x), silu(g.y)), up);
}

}  // namespace swiglu_kernel

template <class T, int THREADS>
DEVICE void swiglu(const SwigluArguments& a) {
  const int v = blockIdx.y * THREADS + threadIdx.x;
  if (v >= a.vectors) return;
  const int64_t row = blockIdx.x;
  const uint4* gates = static_cast<const uint4*>(a.gate_up) + 2 * row * a.vectors;
  const uint4 g = ptx::load_once(gates + v);
  const uint4 u = ptx::load_once(gates + a.vectors + v);
  static_cast<uint4*>(a.y)[row * a.vectors + v] =
      make_uint4(swiglu_kernel::gated<T>(g.x, u.x), swiglu_kernel::gated<T>(g.y, u.y),
                 swiglu_kernel::gated<T>(g.z, u.z), swiglu_kernel::gated<T>(g.w, u.w));
}
