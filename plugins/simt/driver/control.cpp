// What the emulating side asks of the library, and how programs find functions and the errors' names.
#include <dlfcn.h>

#include <cstring>
#include <iterator>

#include "plugins/simt/driver/driver.h"

namespace driver {

// Tables that library.py makes from the headers. `version`: of CUDA, that brought this form of `name`.
struct Symbol {
  const char* name;
  int version;
  const char* exported;
};
extern const Symbol SYMBOLS[];
extern const size_t SYMBOL_COUNT;
struct ErrorName {
  CUresult error;
  const char* name;
};
extern const ErrorName ERROR_NAMES[];
extern const size_t ERROR_COUNT;

namespace {

// As library.py reads it.
struct Counts {
  uint64_t allocations, bytes, peak_bytes, pinned_allocations, pinned_bytes;
  uint64_t streams, events, graphs, graph_execs, modules;
  uint64_t pending, launches, graph_launches, waits;
};

void* exported(const char* symbol) {
  static void* const self = [] {
    Dl_info library;
    dladdr(&device, &library);
    return dlopen(library.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  return dlsym(self, symbol);
}

}  // namespace
}  // namespace driver

using namespace driver;

extern "C" {

void emulated_configure(const Properties* properties);
void emulated_add_kernel(const char* symbol, const char* library);
void emulated_reset();
void emulated_counts(Counts* counts);

// `properties` and its text stay where they are.
void emulated_configure(const Properties* properties) {
  call(Needs::nothing, [=] { device = *properties; });
}

void emulated_add_kernel(const char* symbol, const char* library) {
  call(Needs::nothing, [=] { add_kernel(symbol, library); });
}

// As after a new start of the process.
void emulated_reset() {
  call(Needs::nothing, [] {
    reset_contexts();
    forget_kernels();
    usage = {};
    launches = graph_launches = waits = 0;
  });
}

void emulated_counts(Counts* counts) {
  call(Needs::nothing, [=] {
    *counts = {count_allocations(Memory::device), usage.device, usage.peak, count_allocations(Memory::pinned),
               usage.pinned,                      streams.size(), events.size(), graphs.size(),
               graph_execs.size(),                modules.size(), count_pending(), launches,
               graph_launches,                    waits};
  });
}

CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t,
                          CUdriverProcAddressQueryResult* status) {
  *function = nullptr;
  bool exists = false;
  for (size_t i = 0; i < SYMBOL_COUNT; ++i) {  // later versions of a name come later
    if (strcmp(SYMBOLS[i].name, name)) continue;
    exists = true;
    if (SYMBOLS[i].version <= version) *function = exported(SYMBOLS[i].exported);
  }
  if (status)
    *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS
              : exists  ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                        : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  for (size_t i = 0; i < ERROR_COUNT; ++i)
    if (ERROR_NAMES[i].error == error) return *name = ERROR_NAMES[i].name, CUDA_SUCCESS;
  *name = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }

}  // extern "C"
