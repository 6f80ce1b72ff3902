// The scheduler: the threads of a block as fibers that run until they wait, one block after another.
#include "plugins/simt/block.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace simt {

Thread* current;
Dim3 block_index, grid_size;
unsigned block_size, barrier_epoch, block_number;
const char* kernel_name = "";
uint64_t seed;
std::vector<Fiber> fibers;
Statistics statistics;

namespace {

Buffer shared;
std::vector<unsigned> ready;  // indices; in order, the last is next
unsigned waiting, finished;
bool from_scheduler;  // the fiber that starts now was not started by another
bool on_fiber;
std::string failure;  // of a fiber, for the scheduler to throw
uint64_t random_state;
Entry entry;
const void* entry_arguments;

Fiber* take_ready() {
  if (ready.empty()) return nullptr;
  if (seed) std::swap(ready[random_number() % ready.size()], ready.back());
  const unsigned index = ready.back();
  ready.pop_back();
  return &fibers[index];
}

void run_thread() {
  started(std::exchange(from_scheduler, false));
  entry(entry_arguments);
  Fiber& fiber = self();
  for (const auto& group : fiber.groups)
    if (!group.empty()) fail("the thread ends with asynchronous copies still in flight");
  if (!fiber.open_group.empty()) fail("the thread ends with asynchronous copies that it never committed");
  fiber.state = State::finished;
  ++finished;
  if (waiting) {
    for (unsigned i = 0; i < block_size; ++i)
      if (fibers[i].state == State::at_barrier)
        fail("the thread leaves the kernel while others wait at the barrier at %s", fibers[i].where);
  }
  wait();
  abort();
}

void release_barrier() {
  ++barrier_epoch;
  waiting = 0;
  for (unsigned i = block_size; i-- > 0;)
    if (fibers[i].state == State::at_barrier) make_ready(fibers[i]);
}

[[noreturn]] void fail_deadlocked() {
  unsigned i = 0;
  while (fibers[i].state == State::finished) ++i;
  const Fiber& fiber = fibers[i];
  current = &fibers[i];
  const unsigned stuck = block_size - finished;
  if (fiber.state == State::at_barrier)
    fail("deadlock: %u of %u threads wait for ever, this one at the barrier at %s", stuck, block_size, fiber.where);
  fail("deadlock: %u of %u threads wait for ever, this one in a %s for lanes %08x of its warp", stuck, block_size,
       fiber.where, missing_lanes(fiber));
}

void run_block() {
  memset(shared.start, 0xff, shared.bytes);  // NaN
  reset_shadow(shared);
  waiting = finished = 0;
  barrier_epoch = 1;
  ready.clear();
  reset_warps();
  for (unsigned i = block_size; i-- > 0;) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.warp_epoch = 1;
    fiber.groups.clear();
    fiber.open_group.clear();
    prepare_stack(fiber, run_thread);
    make_ready(fiber);
  }
  Fiber* first = take_ready();
  current = first;
  from_scheduler = on_fiber = true;
  switch_to(nullptr, first);
  on_fiber = false;
  current = nullptr;
  if (!failure.empty()) throw Failure{std::exchange(failure, {})};
  if (finished != block_size) fail_deadlocked();
  check_guards(shared);
}

}  // namespace

Fiber& self() { return *static_cast<Fiber*>(current); }

uint64_t random_number() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

unsigned char* shared_memory() { return shared.start; }

void make_ready(Fiber& fiber) {
  fiber.state = State::ready;
  ready.push_back(fiber.index);
}

void wait() {
  Fiber& me = self();
  Fiber* next = take_ready();
  if (next == &me) return;
  current = next;
  switch_to(&me, next);
}

bool in_kernel() { return on_fiber; }

std::string place(const void* code) {
  Dl_info library;
  if (!code || !dladdr(code, &library)) return "";
  char text[32];  // the call before the return address
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase);
  snprintf(text, sizeof text, "+0x%tx>", offset - 1);
  return std::string(" at <") + library.dli_fname + text;
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string message = std::string(text) + " [" + kernel_name;
  if (current) {
    snprintf(text, sizeof text, ", block (%u, %u, %u), thread %u", block_index.x, block_index.y, block_index.z,
             current->index);
    message += text + place(self().code);
  }
  message += "]";
  if (!on_fiber) throw Failure{message};
  failure = message;
  switch_to(&self(), nullptr);  // for good: the stack is prepared anew before its next use
  abort();
}

void sync_block(const char* where) {
  SIMT_NOTE_CALLER();
  Fiber& me = self();
  if (finished) fail("%u threads have left the kernel before the barrier at %s", finished, where);
  me.where = where;
  me.state = State::at_barrier;
  if (++waiting == block_size) {
    for (unsigned i = 0; i < block_size; ++i)
      if (strcmp(fibers[i].where, where))
        fail("barriers diverge: thread %u waits at %s, this one at %s", i, fibers[i].where, where);
    release_barrier();
  }
  wait();
}

void run_grid(Entry kernel, const void* arguments, Dim3 grid, unsigned threads, size_t shared_bytes) {
  entry = kernel;
  entry_arguments = arguments;
  grid_size = grid;
  block_size = threads;
  block_number = 0;
  random_state = seed * 0x9E3779B97F4A7C15ull | 1;
  if (fibers.size() < threads) fibers.resize(threads);
  if (!shared.start || shared.bytes != shared_bytes) {
    release(shared);
    shared = allocate("shared memory", shared_bytes);
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x, ++block_number) {
        block_index = {x, y, z};
        run_block();
      }
}

}  // namespace simt
