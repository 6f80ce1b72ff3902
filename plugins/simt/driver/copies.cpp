// Copies and fills. They read and write when they run, but for pageable memory, which an asynchronous copy to the
// device reads at once and one to the host waits for.
#include <algorithm>
#include <cstring>

#include "plugins/simt/driver/driver.h"

namespace driver {
namespace {

const void* pointer(CUdeviceptr address) { return reinterpret_cast<const void*>(address); }
CUdeviceptr number(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

bool is_known(CUdeviceptr address, size_t bytes) { return find(address, bytes); }
// Pageable memory cannot be told from none.
bool is_host(CUdeviceptr address, size_t bytes) { return !is_known(address, 1) || is_pinned(pointer(address), bytes); }

// What was device memory when the copy was queued must still be.
void require_alive(CUdeviceptr address, size_t bytes, const char* what) {
  if (is_known(address, bytes)) return;
  explain("a copy %s %s", what, describe(address).c_str());
  throw CUDA_ERROR_ILLEGAL_ADDRESS;
}

void move(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  memmove(const_cast<void*>(pointer(target)), pointer(source), bytes);
}

// -> whether the host waits for it.
bool queue_copy(Stream& stream, CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  const bool from_pageable = !is_known(source, bytes), to_pageable = !is_known(target, bytes);
  if (from_pageable || to_pageable) require_no_capture(stream);
  if (from_pageable) {
    const auto* start = static_cast<const char*>(pointer(source));
    auto snapshot = std::make_shared<std::vector<char>>(start, start + bytes);
    enqueue(stream, CU_GRAPH_NODE_TYPE_MEMCPY, [=] {
      if (!to_pageable) require_alive(target, bytes, "to");
      move(target, number(snapshot->data()), bytes);
    });
  } else {
    enqueue(stream, CU_GRAPH_NODE_TYPE_MEMCPY, [=] {
      require_alive(source, bytes, "from");
      if (!to_pageable) require_alive(target, bytes, "to");
      move(target, source, bytes);
    });
  }
  return to_pageable;
}

void finish(Stream& stream) {
  ++waits;
  drain(stream);
  require(stream.context->failure == CUDA_SUCCESS, stream.context->failure);
}

enum class Side { device, host, any };

void require_side(CUdeviceptr address, size_t bytes, Side side) {
  const bool on_device = is_device(address, bytes), on_host = is_host(address, bytes);
  // Unified addresses: what is called device memory may be pinned memory.
  const bool pinned = is_pinned(pointer(address), bytes);
  const bool fits = side == Side::device ? on_device || pinned : side == Side::host ? on_host : on_device || on_host;
  require(fits, CUDA_ERROR_INVALID_VALUE);
}

CUresult copy_async(CUdeviceptr target, Side to, CUdeviceptr source, Side from, size_t bytes, CUstream handle) {
  return call(Needs::context, [=] {
    const auto stream = find_stream(handle);
    require_side(target, bytes, to);
    require_side(source, bytes, from);
    if (queue_copy(*stream, target, source, bytes)) finish(*stream);
  });
}

// In the default stream's order; between places of the device it does not wait.
CUresult copy(CUdeviceptr target, Side to, CUdeviceptr source, Side from, size_t bytes) {
  return call(Needs::no_capture, [=] {
    Stream& stream = legacy_stream();
    require_side(target, bytes, to);
    require_side(source, bytes, from);
    queue_copy(stream, target, source, bytes);
    if (!is_device(target, bytes) || !is_device(source, bytes)) finish(stream);
  });
}

template <class T>
void queue_fill(Stream& stream, CUdeviceptr target, T value, size_t count) {
  require_side(target, count * sizeof(T), Side::device);
  require(target % sizeof(T) == 0, CUDA_ERROR_INVALID_VALUE);
  enqueue(stream, CU_GRAPH_NODE_TYPE_MEMSET, [=] {
    require_alive(target, count * sizeof(T), "to");
    std::fill_n(reinterpret_cast<T*>(target), count, value);
  });
}

template <class T>
CUresult fill_async(CUdeviceptr target, T value, size_t count, CUstream handle) {
  return call(Needs::context, [=] { queue_fill(*find_stream(handle), target, value, count); });
}

template <class T>
CUresult fill(CUdeviceptr target, T value, size_t count) {
  return call(Needs::no_capture, [=] { queue_fill(legacy_stream(), target, value, count); });
}

}  // namespace
}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuMemcpyHtoD(CUdeviceptr target, const void* source, size_t bytes) {
  return copy(target, Side::device, number(source), Side::host, bytes);
}

CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, size_t bytes) {
  return copy(number(target), Side::host, source, Side::device, bytes);
}

CUresult cuMemcpyDtoD(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  return copy(target, Side::device, source, Side::device, bytes);
}

CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  return copy(target, Side::any, source, Side::any, bytes);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
  return copy_async(target, Side::device, number(source), Side::host, bytes, stream);
}

CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
  return copy_async(number(target), Side::host, source, Side::device, bytes, stream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
  return copy_async(target, Side::device, source, Side::device, bytes, stream);
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
  return copy_async(target, Side::any, source, Side::any, bytes, stream);
}

CUresult cuMemsetD8(CUdeviceptr target, unsigned char value, size_t count) { return fill(target, value, count); }
CUresult cuMemsetD16(CUdeviceptr target, unsigned short value, size_t count) { return fill(target, value, count); }
CUresult cuMemsetD32(CUdeviceptr target, unsigned value, size_t count) { return fill(target, value, count); }

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
  return fill_async(target, value, count, stream);
}
CUresult cuMemsetD16Async(CUdeviceptr target, unsigned short value, size_t count, CUstream stream) {
  return fill_async(target, value, count, stream);
}
CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream) {
  return fill_async(target, value, count, stream);
}

}  // extern "C"
