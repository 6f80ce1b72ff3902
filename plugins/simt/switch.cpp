// Stacks and the switch between them: a dozen instructions that save what a function call must preserve.
#include <sys/mman.h>

#include <cstring>

#include "plugins/simt/block.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch,%function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the emulator knows x86-64 and aarch64"
#endif

namespace simt {
namespace {

void* scheduler_stack_pointer;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_asan_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#endif

}  // namespace

void prepare_stack(Fiber& fiber, void (*start)()) {
  if (!fiber.stack)
    fiber.stack = static_cast<char*>(
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, STACK_BYTES);
#endif
  fiber.asan_stack = nullptr;
  // Staggered: at equal offsets the stacks of all threads would share a few sets of the cache.
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES - fiber.index * 1216 % 65536 / 64 * 64);
#if defined(__x86_64__)
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(start);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = reinterpret_cast<void*>(start);  // x30, the return address
#endif
  fiber.stack_pointer = top;
}

void switch_to(Fiber* from, Fiber* to) {
  void** save = from ? &from->stack_pointer : &scheduler_stack_pointer;
  void* load = to ? to->stack_pointer : scheduler_stack_pointer;
#if defined(__SANITIZE_ADDRESS__)
  void** fake = !from ? &scheduler_asan_stack : from->state == State::finished ? nullptr : &from->asan_stack;
  __sanitizer_start_switch_fiber(fake, to ? to->stack : scheduler_stack, to ? STACK_BYTES : scheduler_stack_bytes);
#endif
  simt_switch(save, load);
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(from ? from->asan_stack : scheduler_asan_stack, &bottom, &bytes);
#endif
}

void started([[maybe_unused]] bool by_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (by_scheduler) scheduler_stack = bottom, scheduler_stack_bytes = bytes;
#endif
}

}  // namespace simt
