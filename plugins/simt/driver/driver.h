// The emulated driver's state: one device whose memory is the host's. Functions of the API run one at a time (`call`).
#pragma once
#include <cuda.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace driver {

// Errors are thrown as CUresult: out of a call of the API, or into the context when queued work fails.
inline void require(bool holds, CUresult otherwise) {
  if (!holds) throw otherwise;
}
// A sentence on standard error for whoever emulates: what a device would not survive, or what cannot be emulated.
void explain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// device.cpp
struct Properties {
  const char* name = "Emulated GPU (sm_86)";
  int major = 8, minor = 6, multiprocessors = 28, integrated = 0;
  int shared_memory = 100 << 10;  // of a multiprocessor; each block takes SYSTEM_SHARED of it besides its own
  size_t memory = size_t{12} << 30;
};
extern Properties device;
constexpr unsigned SYSTEM_SHARED = 1 << 10;

struct Context {
  CUcontext handle = nullptr;
  bool active = false;
  unsigned references = 0, flags = 0;
  CUresult failure = CUDA_SUCCESS;  // of queued work: every later call says it
};
Context& current_context();  // throws CUDA_ERROR_INVALID_CONTEXT
void reset_contexts();            // with all that is in them

enum class Needs {
  nothing,
  context,
  no_capture,  // and a context: the call may wait for the device or change what captured work relies on
};
CUresult guarded(Needs needs, const std::function<void()>& body);
// The frame of every function of the API: one at a time, errors become its result.
template <class Body>
CUresult call(Needs needs, Body body) {
  return guarded(needs, [&] { body(); });
}

// Handles are numbers that are never used twice: one that was destroyed is an error and not a surprise.
uintptr_t new_handle();
template <class T>
class Table {
 public:
  template <class Handle>
  Handle add(std::shared_ptr<T> object) {
    const uintptr_t handle = new_handle();
    objects_[handle] = std::move(object);
    return reinterpret_cast<Handle>(handle);
  }
  template <class Handle>
  std::shared_ptr<T> at(Handle handle) const {
    const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
    require(found != objects_.end(), CUDA_ERROR_INVALID_HANDLE);
    return found->second;
  }
  template <class Handle>
  std::shared_ptr<T> take(Handle handle) {
    auto object = at(handle);
    objects_.erase(reinterpret_cast<uintptr_t>(handle));
    return object;
  }
  void remove_of(const Context& context) {
    std::erase_if(objects_, [&](const auto& entry) { return entry.second->context == &context; });
  }
  template <class Visit>
  void for_each(Visit visit) const {
    for (const auto& entry : objects_) visit(*entry.second);
  }
  size_t size() const { return objects_.size(); }

 private:
  std::map<uintptr_t, std::shared_ptr<T>> objects_;
};

// arena.cpp: memory of the device, and host memory that it knows.
enum class Memory { device, pinned, registered };
struct Allocation {
  uintptr_t start;
  size_t bytes;
  Memory kind;
  Context* context;
};
struct Usage {
  size_t device = 0, peak = 0, pinned = 0;  // bytes
};
extern Usage usage;
// Full of NaN, and nothing around it can be touched. Device memory counts as used, and may not be had.
uintptr_t allocate(size_t bytes, Memory kind);
void add_registered(uintptr_t start, size_t bytes);
void release(uintptr_t start, Memory kind);   // throws CUDA_ERROR_INVALID_VALUE
void release_all(const Context& context);     // pinned memory stays readable: the host may still hold it
const Allocation* find(uintptr_t address, size_t bytes);  // that holds all of the range; null if none does
bool is_device(uintptr_t address, size_t bytes);
bool is_pinned(const void* address, size_t bytes);
size_t count_allocations(Memory kind);
void check_guards();                          // throws simt::Failure
std::string describe(uintptr_t address);

// streams.cpp
struct Stream;
struct Capture;
// When a piece of queued work is done.
struct Moment {
  Stream* stream;
  bool done = false;
  std::chrono::steady_clock::time_point when{};
};
using After = std::vector<std::shared_ptr<Moment>>;
struct Item {
  std::function<void()> run;  // may be empty
  std::shared_ptr<Moment> finished;
  After after;
};
struct Stream {
  Context* context;
  unsigned flags = 0;
  int priority = 0;
  bool legacy = false;
  std::deque<Item> queue;
  std::shared_ptr<Capture> capture;  // of what is queued
  std::vector<size_t> last;          // nodes of the capture that the next follows
  std::vector<CUgraphNode> asked;    // their handles, as cuStreamGetCaptureInfo last gave them out
  std::vector<CUgraphEdgeData> asked_edges;

  bool blocking() const { return !legacy && !(flags & CU_STREAM_NON_BLOCKING); }
};
extern Table<Stream> streams;
std::shared_ptr<Stream> find_stream(CUstream handle);
Stream& legacy_stream();
const std::vector<std::shared_ptr<Stream>>& all_streams();
void drop_streams(const Context& context);
void enqueue(Stream& stream, CUgraphNodeType kind, std::function<void()> run, After after = {});
void drain(Stream& stream);
void drain(const Context& context);
void advance(Stream& stream);  // runs one item that can be run
size_t count_pending();
extern size_t waits;  // calls that waited for the device
extern bool in_host_function;

// events.cpp
struct Event {
  Context* context;
  unsigned flags;
  std::shared_ptr<Moment> moment;    // null: never recorded
  std::shared_ptr<Capture> capture;  // it was recorded in
  std::vector<size_t> nodes;         // before it, in that capture
};
extern Table<Event> events;

// graphs.cpp
struct Node {
  CUgraphNodeType kind;
  std::function<void()> run;
  std::vector<size_t> after;
  CUgraphNode handle = nullptr;
};
struct Graph {
  Context* context;
  std::vector<Node> nodes;
};
struct GraphExec {
  Context* context;
  std::vector<Node> nodes;
};
struct Capture {
  Stream* origin;
  CUstreamCaptureMode mode;
  std::thread::id thread;
  cuuint64_t id;
  bool invalid = false;
  std::vector<Node> nodes;
};
extern Table<Graph> graphs;
extern Table<GraphExec> graph_execs;
extern size_t graph_launches;
void add_node(Stream& stream, CUgraphNodeType kind, std::function<void()> run);
// A call that this thread may not make now ends the captures that forbid it.
void forbid_in_capture();
[[noreturn]] void spoil(Capture& capture, CUresult error);
void require_no_capture(const Stream& stream);
void leave(const std::shared_ptr<Capture>& capture);  // it has ended; its streams go on
void drop_captures(const Context& context);

// cubin.cpp
struct KernelFacts {
  unsigned registers = 0, threads = 1024, struct_bytes = 0, shared_bytes = 0, stack_bytes = 0;
};
struct Cubin {
  int architecture;  // as 86
  std::map<std::string, KernelFacts> kernels;
};
Cubin read_cubin(const void* image);  // throws CUDA_ERROR_INVALID_IMAGE

// modules.cpp
struct Module {
  Context* context;
  Cubin cubin;
};
struct Function {
  Context* context;
  std::weak_ptr<Module> module;
  std::string symbol;
  KernelFacts facts;
  unsigned dynamic_shared;  // bytes that a launch may have
};
extern Table<Module> modules;
extern Table<Function> functions;

// launch.cpp
void add_kernel(const std::string& symbol, const std::string& library);
void forget_kernels();
extern size_t launches;

}  // namespace driver
