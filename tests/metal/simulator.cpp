// Compiled without a sanitizer, so that only the kernel is observed; WITH_ASAN and WITH_TSAN announce the fibers to one.
#include "simulator.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <vector>

#ifdef WITH_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef WITH_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifdef __x86_64__
// Swapping stacks by hand: swapcontext makes a system call each time, and a run switches millions of times.
extern "C" void swap_stack(void** save, void* load);
asm(R"(
.text
.globl swap_stack
swap_stack:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
)");
struct Context {
  void* stack_pointer;
  void prepare(char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + size) - 2;  // the entry finds its stack 8 bytes off a multiple of 16
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    stack_pointer = top - 6;
    memset(stack_pointer, 0, 6 * sizeof(void*));
  }
  void leave_for(Context& other) { swap_stack(&stack_pointer, other.stack_pointer); }
};
#else
#include <ucontext.h>
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void leave_for(Context& other) { swapcontext(&context, &other.context); }
};
#endif

namespace simulator {
namespace {

constexpr size_t kStack = 256 * 1024;

enum class State { ready, in_simdgroup, in_threadgroup, done };

struct Thread {
  Context context;
  char* stack;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  State state;
  const char* function;  // what it waits in
  Where where;
  unsigned exchanges;
  Position position;
};

struct Simdgroup {
  alignas(16) unsigned char slots[2][kSimdWidth][kSlotBytes];
  int token;
};

std::vector<Thread> threads;
std::vector<Simdgroup> simdgroups;
std::map<void*, std::pair<uint64_t, size_t>> arrays;  // threadgroup when last declared, bytes
Context scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_fiber = nullptr;
Thread* current = nullptr;
const Launch* launch = nullptr;
uint64_t threadgroup_count = 0;
uint64_t random_state = 88172645463325252ull;
int start_token, end_token, barrier_token;  // addresses that stand for an order of events

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 32);
}

void acquire(void* token) {
#ifdef WITH_TSAN
  __tsan_acquire(token);
#else
  (void)token;
#endif
}

void release(void* token) {
#ifdef WITH_TSAN
  __tsan_release(token);
#else
  (void)token;
#endif
}

void yield() {
  Thread* me = current;
#ifdef WITH_ASAN
  __sanitizer_start_switch_fiber(&me->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef WITH_TSAN
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  me->context.leave_for(scheduler);
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(me->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void resume(Thread& thread) {
  current = &thread;
#ifdef WITH_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStack);
#endif
#ifdef WITH_TSAN
  __tsan_switch_to_fiber(thread.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  scheduler.leave_for(thread.context);
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void live() {  // the life of a fiber: one thread of every threadgroup
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  for (;;) {
    acquire(&start_token);
    launch->kernel(launch->buffers, current->position);
    release(&end_token);
    current->state = State::done;
    current->function = "return";
    yield();
  }
}

void make_threads(size_t n) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (threads.size() < n) {
    Thread thread{};
    void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) {  // a guard page under the stack
      perror("stack");
      exit(90);
    }
    thread.stack = static_cast<char*>(memory) + page;
    thread.context.prepare(thread.stack, kStack, live);
#ifdef WITH_TSAN
    thread.tsan_fiber = __tsan_create_fiber(0);
#endif
    threads.push_back(thread);
  }
}

[[noreturn]] void diverged(const char* rule, const Thread& a, const Thread& b) {
  char detail[512];
  snprintf(detail, sizeof detail, "thread %u is in %s at %s:%u, thread %u in %s at %s:%u", a.position.thread, a.function,
           a.where.file, a.where.line, b.position.thread, b.function, b.where.file, b.where.line);
  fail(rule, detail, a.where);
}

void shuffle(std::vector<unsigned>& order) {
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
}

// Runs the ready lanes of a simdgroup once; true while the simdgroup can go on by itself.
bool step(unsigned simdgroup, unsigned n_threads) {
  const unsigned begin = simdgroup * kSimdWidth, end = std::min(begin + kSimdWidth, n_threads);
  std::vector<unsigned> order;
  for (unsigned i = begin; i < end; i++) order.push_back(launch->schedule == Schedule::reverse ? begin + end - 1 - i : i);
  if (launch->schedule == Schedule::random) shuffle(order);
  for (unsigned i : order)
    if (threads[i].state == State::ready) resume(threads[i]);
  bool waiting = false;
  for (unsigned i = begin; i < end; i++) waiting |= threads[i].state == State::in_simdgroup;
  if (!waiting) return false;
  const Thread& first = threads[begin];
  for (unsigned i = begin; i < end; i++) {
    const Thread& other = threads[i];
    if (other.state != State::in_simdgroup || other.function != first.function || other.where.line != first.where.line)
      diverged("simdgroup-divergence", first, other);
  }
  for (unsigned i = begin; i < end; i++) threads[i].state = State::ready;
  return true;
}

void run_threadgroup(const uint32_t at[3], const uint32_t of[3]) {
  const unsigned n = launch->threadgroup[0] * launch->threadgroup[1] * launch->threadgroup[2];
  const unsigned n_simdgroups = (n + kSimdWidth - 1) / kSimdWidth;
  simdgroups.resize(n_simdgroups);
  threadgroup_count++;
  for (unsigned i = 0; i < n; i++) {
    Thread& thread = threads[i];
    thread.state = State::ready;
    thread.exchanges = 0;
    for (int d = 0; d < 3; d++) thread.position.threadgroup[d] = at[d], thread.position.threadgroups[d] = of[d];
    thread.position.thread = i;
    thread.position.lane = i % kSimdWidth;
    thread.position.simdgroup = i / kSimdWidth;
  }
  release(&start_token);
  std::vector<unsigned> order(n_simdgroups);
  for (unsigned i = 0; i < n_simdgroups; i++) order[i] = launch->schedule == Schedule::reverse ? n_simdgroups - 1 - i : i;
  for (;;) {
    if (launch->schedule == Schedule::random) {
      for (bool any = true; any;) {
        any = false;
        shuffle(order);
        for (unsigned s : order)
          for (unsigned k = random_number() % 3 + 1; k > 0; k--) any |= step(s, n);
      }
    } else {
      for (unsigned s : order)
        while (step(s, n)) {
        }
    }
    const Thread& first = threads[0];
    bool done = true;
    for (unsigned i = 0; i < n; i++) {
      const Thread& other = threads[i];
      done &= other.state == State::done;
      if (other.state != first.state || (other.state != State::done && other.where.line != first.where.line))
        diverged("barrier-divergence", first, other);
    }
    if (done) break;
    for (unsigned i = 0; i < n; i++) threads[i].state = State::ready;
  }
  acquire(&end_token);
}

}  // namespace

unsigned lane() { return current->position.lane; }

void threadgroup_barrier(Where where) {
  current->state = State::in_threadgroup;
  current->function = "threadgroup_barrier";
  current->where = where;
  release(&barrier_token);
  yield();
  acquire(&barrier_token);
}

void simdgroup_barrier(Where where) {
  current->state = State::in_simdgroup;
  current->function = "simdgroup_barrier";
  current->where = where;
  void* token = &simdgroups[current->position.simdgroup].token;
  release(token);
  yield();
  acquire(token);
}

const unsigned char* exchange(const char* function, const void* value, unsigned bytes, Where where) {
  // Two tables in turn: a lane may leave its next value before another has read this one.
  auto& slots = simdgroups[current->position.simdgroup].slots[current->exchanges++ % 2];
  for (unsigned i = 0; i < bytes; i++) slots[current->position.lane][i] = static_cast<const volatile unsigned char*>(value)[i];
  current->state = State::in_simdgroup;
  current->function = function;
  current->where = where;
  yield();
  return slots[0];
}

void declare(void* array, size_t bytes, Where where) {
  auto& seen = arrays[array];
  if (seen.first == threadgroup_count) return;
  seen = {threadgroup_count, bytes};
  // Byte by byte: ThreadSanitizer watches memset, wherever it is called.
  for (size_t i = 0; i < bytes; i++) static_cast<volatile unsigned char*>(array)[i] = 0xff;
  size_t total = 0;
  for (const auto& entry : arrays)
    if (entry.second.first == threadgroup_count) total += (entry.second.second + 15) / 16 * 16;
  if (total > launch->threadgroup_memory) fail("threadgroup-memory", "more than the limit", where);
}

void fail(const char* rule, const char* detail, Where where) {
  fprintf(stderr, "SIMULATOR %s: %s (%s:%u)\n", rule, detail, where.file, where.line);
  fflush(stderr);
  _exit(91);
}

void run(const Launch& what) {
  launch = &what;
  const uint32_t *grid = what.grid, *size = what.threadgroup;
  const unsigned n = size[0] * size[1] * size[2];
  if (n == 0 || n > 1024 || grid[0] % size[0] || grid[1] % size[1] || grid[2] % size[2])
    fail("launch", "a threadgroup has 1 to 1024 threads and divides the grid", Where{"launch", 0});
  make_threads(n);
#ifdef WITH_TSAN
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  const uint32_t of[3] = {grid[0] / size[0], grid[1] / size[1], grid[2] / size[2]};
  std::vector<unsigned> order(of[0] * of[1] * of[2]);
  for (unsigned i = 0; i < order.size(); i++) order[i] = what.schedule == Schedule::reverse ? order.size() - 1 - i : i;
  if (what.schedule == Schedule::random) shuffle(order);
  for (unsigned i : order) {
    const uint32_t at[3] = {i % of[0], i / of[0] % of[1], i / of[0] / of[1]};
    run_threadgroup(at, of);
  }
}

}  // namespace simulator

// usage: program kernel jobs results. kernel: a library that defines kernel_entry.
// A job: 8 int32 (grid, threadgroup, schedule, number of buffers), then for each buffer int64
// bytes, int32 (1 for an output, 2 for an input that is written) and an input's bytes. Outputs start as NaN; what outputs and
// written inputs hold at the end goes to `results`.
template <typename T>
static bool read(FILE* file, T* to, size_t n) { return fread(to, sizeof(T), n, file) == n; }

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) {
    fprintf(stderr, "error: %s\n", dlerror());
    return 2;
  }
  const auto kernel = reinterpret_cast<void (*)(void**, const simulator::Position&)>(dlsym(library, "kernel_entry"));
  FILE* jobs = fopen(argv[2], "rb");
  FILE* results = fopen(argv[3], "wb");
  if (!kernel || !jobs || !results) return 2;
  int32_t head[8];
  while (read(jobs, head, 8)) {
    simulator::Launch what{};
    what.kernel = kernel;
    for (int d = 0; d < 3; d++) what.grid[d] = head[d], what.threadgroup[d] = head[3 + d];
    what.schedule = static_cast<simulator::Schedule>(head[6]);
    what.threadgroup_memory = 32768;
    std::vector<void*> buffers;
    std::vector<std::pair<int64_t, int32_t>> kinds;
    for (int i = 0; i < head[7]; i++) {
      int64_t bytes;
      int32_t role;
      if (!read(jobs, &bytes, 1) || !read(jobs, &role, 1)) return 3;
      void* memory = malloc(static_cast<size_t>(bytes));  // of exactly this size: AddressSanitizer watches both ends
      memset(memory, 0xff, static_cast<size_t>(bytes));
      if (role != 1 && !read(jobs, static_cast<char*>(memory), static_cast<size_t>(bytes))) return 3;
      buffers.push_back(memory);
      kinds.push_back({bytes, role});
    }
    what.buffers = buffers.data();
    simulator::run(what);
    for (size_t i = 0; i < buffers.size(); i++) {
      if (kinds[i].second) fwrite(buffers[i], 1, static_cast<size_t>(kinds[i].first), results);
      free(buffers[i]);
    }
  }
  fclose(results);
  return 0;
}
