// The device, its contexts, and the frame that all calls share.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "plugins/simt/driver/driver.h"

namespace driver {

Properties device;
bool in_host_function;

namespace {

std::recursive_mutex lock;
bool initialized;
uintptr_t last_handle = 0x1000;
Context primary_context{.handle = reinterpret_cast<CUcontext>(0x1000)};
Table<Context> contexts;  // others
thread_local std::vector<CUcontext> current;

Context& context_of(CUcontext handle) {
  Context& context = handle == primary_context.handle ? primary_context : *contexts.at(handle);
  require(context.active, CUDA_ERROR_CONTEXT_IS_DESTROYED);
  return context;
}

// Work that is still queued is lost.
void destroy(Context& context) {
  drop_captures(context);
  drop_streams(context);
  events.remove_of(context);
  graphs.remove_of(context);
  graph_execs.remove_of(context);
  functions.remove_of(context);
  modules.remove_of(context);
  release_all(context);
  context.failure = CUDA_SUCCESS;
}

int attribute(CUdevice_attribute which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return INT32_MAX;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return device.shared_memory - static_cast<int>(SYSTEM_SHARED);
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return device.shared_memory;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return SYSTEM_SHARED;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return INT32_MAX;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 1536;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 16;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return device.multiprocessors;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return device.major;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return device.minor;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: return device.integrated;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    default: return 0;
  }
}

}  // namespace

void explain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("emulated CUDA driver: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
}

void reset_contexts() {
  destroy(primary_context);
  primary_context.active = false;  // its references stay counted: who holds them will give them back
  contexts.for_each([](Context& context) { destroy(context); });
  contexts = {};
  current.clear();
}

uintptr_t new_handle() { return last_handle += 16; }

Context& current_context() {
  require(!current.empty() && current.back(), CUDA_ERROR_INVALID_CONTEXT);
  return context_of(current.back());
}

CUresult guarded(Needs needs, const std::function<void()>& body) {
  const std::lock_guard hold(lock);
  try {
    require(!in_host_function, CUDA_ERROR_NOT_PERMITTED);
    if (needs != Needs::nothing) {
      require(initialized, CUDA_ERROR_NOT_INITIALIZED);
      require(current_context().failure == CUDA_SUCCESS, current_context().failure);
      if (needs == Needs::no_capture) forbid_in_capture();
    }
    body();
    return CUDA_SUCCESS;
  } catch (CUresult error) {
    return error;
  }
}

}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuInit(unsigned) {
  return call(Needs::nothing, [] { initialized = true; });
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  return call(Needs::nothing, [=] {
    require(initialized, CUDA_ERROR_NOT_INITIALIZED);
    *count = 1;
  });
}

CUresult cuDeviceGet(CUdevice* handle, int ordinal) {
  return call(Needs::nothing, [=] {
    require(initialized, CUDA_ERROR_NOT_INITIALIZED);
    require(ordinal == 0, CUDA_ERROR_INVALID_DEVICE);
    *handle = 0;
  });
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, static_cast<size_t>(size), "%s", device.name);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) {
  *bytes = device.memory;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice) {
  *major = device.major;
  *minor = device.minor;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice) {
  memcpy(uuid->bytes, "emulated device", 16);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char* id, int size, CUdevice) {
  snprintf(id, static_cast<size_t>(size), "0000:01:00.0");
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* handle, CUdevice) {
  return call(Needs::nothing, [=] {
    require(initialized, CUDA_ERROR_NOT_INITIALIZED);
    primary_context.active = true;
    ++primary_context.references;
    *handle = primary_context.handle;
  });
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) {
  return call(Needs::nothing, [] {
    require(primary_context.references > 0, CUDA_ERROR_INVALID_CONTEXT);
    if (--primary_context.references) return;
    destroy(primary_context);
    primary_context.active = false;
  });
}

CUresult cuDevicePrimaryCtxReset(CUdevice) {
  return call(Needs::nothing, [] { destroy(primary_context); });
}

CUresult cuDevicePrimaryCtxSetFlags(CUdevice, unsigned flags) {
  return call(Needs::nothing, [=] { primary_context.flags = flags; });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = primary_context.flags;
  *active = primary_context.active;
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate(CUcontext* handle, CUctxCreateParams*, unsigned flags, CUdevice) {
  return call(Needs::nothing, [=] {
    require(initialized, CUDA_ERROR_NOT_INITIALIZED);
    const auto context = std::make_shared<Context>(Context{.active = true, .flags = flags});
    *handle = context->handle = contexts.add<CUcontext>(context);
    current.push_back(*handle);
  });
}

CUresult cuCtxDestroy(CUcontext handle) {
  return call(Needs::nothing, [=] {
    destroy(context_of(handle));
    contexts.take(handle);
    if (!current.empty() && current.back() == handle) current.pop_back();
  });
}

CUresult cuCtxPushCurrent(CUcontext handle) {
  return call(Needs::nothing, [=] {
    context_of(handle);
    current.push_back(handle);
  });
}

CUresult cuCtxPopCurrent(CUcontext* handle) {
  return call(Needs::nothing, [=] {
    require(!current.empty(), CUDA_ERROR_INVALID_CONTEXT);
    if (handle) *handle = current.back();
    current.pop_back();
  });
}

CUresult cuCtxSetCurrent(CUcontext handle) {
  return call(Needs::nothing, [=] {
    if (handle) context_of(handle);
    if (!current.empty()) current.pop_back();
    if (handle) current.push_back(handle);
  });
}

CUresult cuCtxGetCurrent(CUcontext* handle) {
  *handle = current.empty() ? nullptr : current.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* handle) {
  return call(Needs::nothing, [=] {
    current_context();
    *handle = 0;
  });
}

CUresult cuCtxGetFlags(unsigned* flags) {
  return call(Needs::context, [=] { *flags = current_context().flags; });
}

CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  return call(Needs::no_capture, [] {
    Context& context = current_context();
    ++waits;
    drain(context);
    require(context.failure == CUDA_SUCCESS, context.failure);
  });
}

}  // extern "C"
