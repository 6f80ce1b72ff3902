// Launches: the CPU build of the kernel that the cubin names runs on the threads of plugins/simt.
#include <dlfcn.h>

#include <csignal>
#include <cstring>

#include "plugins/simt/block.h"
#include "plugins/simt/driver/driver.h"

namespace driver {

size_t launches;

namespace {

std::map<std::string, std::string> kernel_libraries;  // symbol -> file

struct Code {
  simt::Entry entry;
  size_t struct_bytes;
};

// A launch as it is queued; its struct is the caller's of that moment.
struct Launch {
  std::string symbol;
  Code code;
  simt::Dim3 grid;
  unsigned threads, shared_bytes;
  std::vector<unsigned char> arguments;
};

Code find_code(const std::string& symbol) {
  static std::map<std::string, Code> loaded;  // by file
  const auto library = kernel_libraries.find(symbol);
  if (library == kernel_libraries.end()) {
    explain("%s has no CPU build here; give its Kernel to the emulated driver (add_kernels)", symbol.c_str());
    throw CUDA_ERROR_NOT_SUPPORTED;
  }
  const auto known = loaded.find(library->second);
  if (known != loaded.end()) return known->second;
  void* handle = dlopen(library->second.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    explain("%s", dlerror());
    throw CUDA_ERROR_SHARED_OBJECT_INIT_FAILED;
  }
  const auto entry = reinterpret_cast<simt::Entry>(dlsym(handle, (symbol + "__run").c_str()));
  const auto bytes = static_cast<const size_t*>(dlsym(handle, (symbol + "__bytes").c_str()));
  require(entry && bytes, CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND);
  return loaded[library->second] = {entry, *bytes};
}

// The struct: the one parameter of every kernel here.
std::vector<unsigned char> arguments_of(size_t bytes, void** parameters, void** extra) {
  const void* start = parameters ? parameters[0] : nullptr;
  size_t given = bytes;
  for (void** pair = extra; pair && *pair != CU_LAUNCH_PARAM_END; pair += 2) {
    if (*pair == CU_LAUNCH_PARAM_BUFFER_POINTER) start = pair[1];
    if (*pair == CU_LAUNCH_PARAM_BUFFER_SIZE) given = *static_cast<size_t*>(pair[1]);
  }
  require(start && given == bytes, CUDA_ERROR_INVALID_VALUE);
  const auto* first = static_cast<const unsigned char*>(start);
  return {first, first + bytes};
}

void require_possible(const Function& function, const CUlaunchConfig& c) {
  const KernelFacts& facts = function.facts;
  require(c.gridDimX && c.gridDimX <= INT32_MAX && c.gridDimY && c.gridDimZ, CUDA_ERROR_INVALID_VALUE);
  require(c.gridDimY <= 65535 && c.gridDimZ <= 65535, CUDA_ERROR_INVALID_VALUE);
  require(c.blockDimX && c.blockDimX <= facts.threads && c.blockDimY && c.blockDimZ, CUDA_ERROR_INVALID_VALUE);
  require(c.sharedMemBytes <= function.dynamic_shared, CUDA_ERROR_INVALID_VALUE);
  if (c.blockDimY == 1 && c.blockDimZ == 1 && c.numAttrs == 0) return;
  explain("%s: only one-dimensional blocks without launch attributes are emulated", function.symbol.c_str());
  throw CUDA_ERROR_NOT_SUPPORTED;
}

struct sigaction former_segv, former_bus;
bool was_address;  // of the last failure

// Out of the kernel, back to the scheduler.
void on_bad_address(int signal, siginfo_t* info, void*) {
  if (!simt::in_kernel()) {  // not this library's: the access is tried again under the former handler
    sigaction(signal, signal == SIGSEGV ? &former_segv : &former_bus, nullptr);
    return;
  }
  was_address = true;
  simt::fail("read or write of %s", describe(reinterpret_cast<uintptr_t>(info->si_addr)).c_str());
}

// Turns faults of a kernel into failures as long as it lives.
struct FaultWatch {
  FaultWatch() {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &former_segv);
    sigaction(SIGBUS, &action, &former_bus);
  }
  ~FaultWatch() {
    sigaction(SIGSEGV, &former_segv, nullptr);
    sigaction(SIGBUS, &former_bus, nullptr);
  }
};

void run(const Launch& launch) {
  ++launches;
  was_address = false;
  simt::kernel_name = launch.symbol.c_str();
  try {
    {
      const FaultWatch watch;
      simt::run_grid(launch.code.entry, launch.arguments.data(), launch.grid, launch.threads, launch.shared_bytes);
    }
    was_address = true;
    check_guards();
  } catch (const simt::Failure& failure) {
    simt::current = nullptr;
    explain("%s", failure.message.c_str());
    throw was_address ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_ERROR_LAUNCH_FAILED;
  }
}

void launch(Function& function, const CUlaunchConfig& config, void** parameters, void** extra) {
  const auto stream = find_stream(config.hStream);
  require(function.module.lock().get(), CUDA_ERROR_INVALID_HANDLE);
  require_possible(function, config);
  const Code code = find_code(function.symbol);
  if (code.struct_bytes != function.facts.struct_bytes) {
    explain("%s takes a struct of %u bytes in the cubin and of %zu in its CPU build: they are of different sources",
            function.symbol.c_str(), function.facts.struct_bytes, code.struct_bytes);
    throw CUDA_ERROR_INVALID_SOURCE;
  }
  auto queued = std::make_shared<Launch>(Launch{function.symbol,
                                                code,
                                                {config.gridDimX, config.gridDimY, config.gridDimZ},
                                                config.blockDimX,
                                                config.sharedMemBytes,
                                                arguments_of(code.struct_bytes, parameters, extra)});
  enqueue(*stream, CU_GRAPH_NODE_TYPE_KERNEL, [queued] { run(*queued); });
}

}  // namespace

void add_kernel(const std::string& symbol, const std::string& library) { kernel_libraries[symbol] = library; }
void forget_kernels() { kernel_libraries.clear(); }

}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
  return call(Needs::context, [=] { launch(*functions.at(handle), *config, parameters, extra); });
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters,
                        void** extra) {
  const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream, nullptr, 0};
  return cuLaunchKernelEx(&config, handle, parameters, extra);
}

}  // extern "C"
