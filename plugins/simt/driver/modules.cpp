// Modules: real cubins go in, and say which kernels there are and how they may be launched.
#include "plugins/simt/driver/driver.h"

namespace driver {

Table<Module> modules;
Table<Function> functions;

namespace {

constexpr unsigned DEFAULT_SHARED = 48 << 10;
constexpr int ORIN = 87;

// Machine code runs on later devices of its generation, but not across desktop and Jetson.
bool runs_here(int architecture) {
  const int here = device.major * 10 + device.minor;
  if (architecture == ORIN || here == ORIN) return architecture == here;
  return architecture / 10 == device.major && architecture <= here;
}

template <class Handle>
void load(Handle* handle, const void* image) {
  require(image, CUDA_ERROR_INVALID_VALUE);
  auto module = std::make_shared<Module>(Module{&current_context(), read_cubin(image)});
  require(runs_here(module->cubin.architecture), CUDA_ERROR_NO_BINARY_FOR_GPU);
  *handle = modules.add<Handle>(module);
}

template <class Handle>
void get_function(Handle* handle, std::shared_ptr<Module> module, const char* name) {
  const auto kernel = module->cubin.kernels.find(name);
  require(kernel != module->cubin.kernels.end(), CUDA_ERROR_NOT_FOUND);
  const KernelFacts& facts = kernel->second;
  *handle = functions.add<Handle>(
      std::make_shared<Function>(Function{module->context, module, name, facts, DEFAULT_SHARED - facts.shared_bytes}));
}

int attribute(const Function& function, CUfunction_attribute which) {
  const int architecture = function.module.lock() ? function.module.lock()->cubin.architecture : 0;
  switch (which) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return static_cast<int>(function.facts.threads);
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: return static_cast<int>(function.facts.shared_bytes);
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: return static_cast<int>(function.facts.stack_bytes);
    case CU_FUNC_ATTRIBUTE_NUM_REGS: return static_cast<int>(function.facts.registers);
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: return architecture;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: return static_cast<int>(function.dynamic_shared);
    default: return 0;
  }
}

void set_attribute(Function& function, CUfunction_attribute which, int value) {
  require(value >= -1, CUDA_ERROR_INVALID_VALUE);
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return;  // others are hints
  const auto bytes = static_cast<unsigned>(value), most = static_cast<unsigned>(device.shared_memory) - SYSTEM_SHARED;
  require(value >= 0 && bytes + function.facts.shared_bytes <= most, CUDA_ERROR_INVALID_VALUE);
  function.dynamic_shared = bytes;
}

template <class Handle>
CUresult unload(Handle handle) {
  return call(Needs::no_capture, [=] { modules.take(handle); });
}

}  // namespace
}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuModuleLoadData(CUmodule* handle, const void* image) {
  return call(Needs::no_capture, [=] { load(handle, image); });
}

CUresult cuModuleLoadDataEx(CUmodule* handle, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(handle, image);
}

CUresult cuModuleUnload(CUmodule handle) { return unload(handle); }

CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
  return call(Needs::context, [=] { get_function(handle, modules.at(module), name); });
}

CUresult cuModuleGetFunctionCount(unsigned* count, CUmodule module) {
  return call(Needs::context, [=] { *count = static_cast<unsigned>(modules.at(module)->cubin.kernels.size()); });
}

CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  *mode = CU_MODULE_EAGER_LOADING;
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* handle, const void* image, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
  return call(Needs::no_capture, [=] { load(handle, image); });
}

CUresult cuLibraryUnload(CUlibrary handle) { return unload(handle); }

CUresult cuLibraryGetModule(CUmodule* module, CUlibrary handle) {
  return call(Needs::context, [=] {
    modules.at(handle);
    *module = reinterpret_cast<CUmodule>(handle);
  });
}

CUresult cuLibraryGetKernel(CUkernel* handle, CUlibrary library, const char* name) {
  return call(Needs::context, [=] { get_function(handle, modules.at(library), name); });
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  return call(Needs::context, [=] {
    functions.at(kernel);
    *function = reinterpret_cast<CUfunction>(kernel);
  });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction handle) {
  return call(Needs::context, [=] { *value = attribute(*functions.at(handle), which); });
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
  return call(Needs::context, [=] { set_attribute(*functions.at(handle), which, value); });
}

CUresult cuKernelGetAttribute(int* value, CUfunction_attribute which, CUkernel handle, CUdevice) {
  return call(Needs::context, [=] { *value = attribute(*functions.at(handle), which); });
}

CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel handle, CUdevice) {
  return call(Needs::context, [=] { set_attribute(*functions.at(handle), which, value); });
}

CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache) {
  return call(Needs::context, [=] { functions.at(handle); });
}

}  // extern "C"
