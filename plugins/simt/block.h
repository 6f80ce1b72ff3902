// The engine's own state: the fibers of the block that runs. Shared by the engine's files, not by kernels.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "plugins/simt/engine.h"

namespace simt {

struct Copy {
  void* shared;
  const void* global;
  int source_bytes;
  bool done;
};

enum class State { ready, at_barrier, at_collective, finished };

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  State state = State::ready;
  const char* where = "";      // what it waits at
  const void* code = nullptr;  // where the kernel called the engine last
  unsigned warp_epoch = 0;     // __syncwarps passed
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open_group;

  unsigned warp() const { return index / 32; }
  unsigned lane() const { return index % 32; }
};
extern std::vector<Fiber> fibers;  // those of the block are the first block_size
extern unsigned barrier_epoch, block_number;
extern const char* kernel_name;
extern uint64_t seed;  // 0: threads run in order; else whenever one waits, a random other goes on

Fiber& self();
void make_ready(Fiber& fiber);
// Runs another thread; the current one has been put into a waiting state.
void wait();
uint64_t random_number();
void reset_warps();
unsigned missing_lanes(const Fiber& fiber);  // that it waits for at a collective
// First act of every function that kernels call: messages then name the line.
#define SIMT_NOTE_CALLER() (simt::self().code = __builtin_return_address(0))

// What a kernel did wrong. Thrown on the scheduler's stack, that is out of run_grid.
struct Failure {
  std::string message;
};
bool in_kernel();  // on a thread's stack

using Entry = void (*)(const void* arguments);
void run_grid(Entry entry, const void* arguments, Dim3 grid, unsigned threads, size_t shared_bytes);

// ' at <library+offset>' of a code address; emulator.py makes file:line of it.
std::string place(const void* code);

// switch.cpp
extern "C" void simt_switch(void** save_stack_pointer, void* load_stack_pointer);
constexpr size_t STACK_BYTES = 256 << 10;
void prepare_stack(Fiber& fiber, void (*start)());
void switch_to(Fiber* from, Fiber* to);  // null: the scheduler's own stack
void started(bool by_scheduler);         // a fiber's first act

// buffers.cpp
struct Buffer {
  std::string name;
  unsigned char* start;
  size_t bytes;
  uint64_t read = 0, written = 0;  // bytes; counted in the race build
  bool is_checked = false;         // for races
};
// Bytes on both sides of a buffer that nobody may touch; the address build has its own red zones instead.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GUARD_BYTES = 0;
#else
constexpr size_t GUARD_BYTES = 256;
#endif
Buffer allocate(const std::string& name, size_t bytes);
void release(Buffer& buffer);
void check_guards(const Buffer& buffer);

// race.cpp
enum class Access { read, write, atomic };
void reset_shadow(const Buffer& shared);
void note_access(const void* p, size_t bytes, Access kind);
// Counts accesses of a launch's buffers, and finds races in those that have been written before this call. What
// happened before a launch is ordered.
void watch(std::vector<Buffer>& buffers);

struct Statistics {
  uint64_t mma = 0, bank_conflicts = 0, races = 0;
};
extern Statistics statistics;

}  // namespace simt
