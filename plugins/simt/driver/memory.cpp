// The API of memory: allocation on the device and on the host, and what a pointer is.
#include <algorithm>

#include "plugins/simt/driver/driver.h"

namespace driver {
namespace {

// As a device does, freeing waits for all work, which may use the memory.
void free_memory(uintptr_t start, Memory kind) {
  drain(current_context());
  release(start, kind);
}

const Allocation& known(CUdeviceptr address) {
  const Allocation* allocation = find(address, 1);
  require(allocation, CUDA_ERROR_INVALID_VALUE);
  return *allocation;
}

void attribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  const Allocation& a = known(address);
  switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(value) = a.context->handle; return;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<CUmemorytype*>(value) = a.kind == Memory::device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *static_cast<CUdeviceptr*>(value) = address; return;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(value) = a.start; return;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(value) = a.bytes; return;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<int*>(value) = 0; return;
    default: throw CUDA_ERROR_NOT_SUPPORTED;
  }
}

}  // namespace
}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return call(Needs::context, [=] {
    *total = device.memory;
    *free = device.memory - usage.device;
  });
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  return call(Needs::no_capture, [=] { *address = allocate(bytes, Memory::device); });
}

CUresult cuMemAllocPitch(CUdeviceptr* address, size_t* pitch, size_t width, size_t height, unsigned) {
  *pitch = (width + 511) / 512 * 512;
  return cuMemAlloc(address, *pitch * height);
}

CUresult cuMemFree(CUdeviceptr address) {
  return call(Needs::no_capture, [=] {
    if (address) free_memory(address, Memory::device);
  });
}

// Of the order on the stream only the end is emulated.
CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream handle) {
  return call(Needs::context, [=] {
    require_no_capture(*find_stream(handle));
    *address = allocate(bytes, Memory::device);
  });
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  return call(Needs::context, [=] {
    const auto stream = find_stream(handle);
    require_no_capture(*stream);
    const Allocation& a = known(address);
    require(a.start == address && a.kind == Memory::device, CUDA_ERROR_INVALID_VALUE);
    enqueue(*stream, CU_GRAPH_NODE_TYPE_MEM_FREE, [=] { release(address, Memory::device); });
  });
}

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  return call(Needs::no_capture, [=] { *address = reinterpret_cast<void*>(allocate(bytes, Memory::pinned)); });
}

CUresult cuMemAllocHost(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

CUresult cuMemFreeHost(void* address) {
  return call(Needs::no_capture, [=] { free_memory(reinterpret_cast<uintptr_t>(address), Memory::pinned); });
}

CUresult cuMemHostRegister(void* address, size_t bytes, unsigned) {
  return call(Needs::no_capture, [=] { add_registered(reinterpret_cast<uintptr_t>(address), bytes); });
}

CUresult cuMemHostUnregister(void* address) {
  return call(Needs::no_capture, [=] {
    const auto start = reinterpret_cast<uintptr_t>(address);
    const Allocation* a = find(start, 1);
    require(a && a->start == start && a->kind == Memory::registered, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    free_memory(start, Memory::registered);
  });
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* on_device, void* address, unsigned) {
  return call(Needs::context, [=] {
    require(is_pinned(address, 1), CUDA_ERROR_INVALID_VALUE);
    *on_device = reinterpret_cast<CUdeviceptr>(address);
  });
}

CUresult cuMemHostGetFlags(unsigned* flags, void* address) {
  return call(Needs::context, [=] {
    require(is_pinned(address, 1), CUDA_ERROR_INVALID_VALUE);
    *flags = CU_MEMHOSTALLOC_DEVICEMAP;
  });
}

CUresult cuMemGetAddressRange(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
  return call(Needs::context, [=] {
    const Allocation* a = find(address, 1);
    require(a && a->kind == Memory::device, CUDA_ERROR_NOT_FOUND);
    if (start) *start = a->start;
    if (bytes) *bytes = a->bytes;
  });
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  return call(Needs::context, [=] { attribute(value, which, address); });
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** values, CUdeviceptr address) {
  return call(Needs::context, [=] {
    for (unsigned i = 0; i < count; ++i) attribute(values[i], which[i], address);
  });
}

}  // extern "C"
