// How a kernel spreads work: a plain callback, so that kernels know nothing of ONNX Runtime.
#pragma once
#include <cstddef>

namespace edge {

// Runs body(state, i) for i in [0, n), in any order, on any threads; returns when all are done.
struct Parallel {
  void (*run)(void* context, void (*body)(void* state, size_t i), size_t n, void* state);
  void* context;

  // On the caller's thread: for work too small to wake others.
  static Parallel serial() {
    return {[](void*, void (*body)(void*, size_t), size_t n, void* state) {
              for (size_t i = 0; i < n; ++i) body(state, i);
            },
            nullptr};
  }

  template <class F>
  void operator()(size_t n, F&& f) const {
    if (n == 1) return f(0);
    run(context, [](void* state, size_t i) { (*static_cast<F*>(state))(i); }, n, &f);
  }
};

}  // namespace edge
