// Runs a Metal kernel on a CPU: every thread of a threadgroup is a fiber, barriers and simdgroup functions really wait.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace simulator {

constexpr unsigned kSimdWidth = 32;
constexpr unsigned kSlotBytes = 16;  // the largest value that lanes can exchange

struct Where {
  const char* file;
  unsigned line;
};

// What the kernel's attributes say to one thread.
struct Position {
  uint32_t threadgroup[3], threadgroups[3];
  uint32_t thread, lane, simdgroup;
};

enum class Schedule : int32_t { forward, reverse, random };

struct Launch {
  void (*kernel)(void** buffers, const Position&);
  void** buffers;
  uint32_t grid[3], threadgroup[3];  // both in threads
  Schedule schedule;
  size_t threadgroup_memory;
};

void run(const Launch&);  // ends the process with a message when the kernel breaks a rule

// Called by the running thread.
void threadgroup_barrier(Where);
void simdgroup_barrier(Where);
// Leaves a value and waits for the other lanes; returns what the 32 lanes left, kSlotBytes apart.
const unsigned char* exchange(const char* function, const void* value, unsigned bytes, Where);
unsigned lane();
// A threadgroup array comes into being: filled with NaN, and counted.
void declare(void* array, size_t bytes, Where);
[[noreturn]] void fail(const char* rule, const char* detail, Where);

}  // namespace simulator
