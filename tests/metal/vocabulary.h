// Metal's words in C++, for the kernels of this project (and MLX's sdpa_vector): included before the generated text.
#pragma once
#include "simulator.h"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef _Float16 half;

struct bfloat {  // converts to float by itself, from it on request, and has no arithmetic of its own
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, x);
    bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
};
typedef half float16_t;
typedef bfloat bfloat16_t;

#define METAL_FUNC inline __attribute__((always_inline))
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))
#endif
#endif
#ifndef UNSEEN
#define UNSEEN
#endif
#define HERE simulator::Where where = simulator::Where{__builtin_FILE(), static_cast<unsigned>(__builtin_LINE())}

namespace metal {

// Copy constructors are written out so that UndefinedBehaviorSanitizer checks the alignment of vector loads and stores.
template <typename T, int N>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  vec(const vec& v) : x(v.x), y(v.y) {}
  vec& operator=(const vec& v) { x = v.x, y = v.y; return *this; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(const vec& v) : x(v.x), y(v.y), z(v.z), w(v.w) {}
  vec& operator=(const vec& v) { x = v.x, y = v.y, z = v.z, w = v.w; return *this; }
};
typedef vec<half, 2> half2;
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;
typedef vec<float, 4> float4;
typedef vec<signed char, 4> char4;

// Names of Metal's library that a kernel must not reuse: an ambiguity here is one there.
template <typename T, int C, int R> struct matrix;
template <typename T, size_t N> struct array;
template <typename T> struct atomic;
float length(float4), distance(float4, float4), dot(float4, float4), mix(float, float, float), step(float, float), sign(float);
float select(float, float, bool), round(float), clamp(float, float, float), cross(float4, float4), normalize(float4), fract(float);

template <typename To, typename From>
METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type");
  To y;
  __builtin_memcpy(static_cast<void*>(&y), &x, sizeof(To));
  return y;
}

METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC float exp(float x) { return __builtin_expf(x); }
METAL_FUNC float log(float x) { return __builtin_logf(x); }
METAL_FUNC float sqrt(float x) { return __builtin_sqrtf(x); }
METAL_FUNC float max(float a, float b) { return a < b ? b : a; }
METAL_FUNC float min(float a, float b) { return b < a ? b : a; }
METAL_FUNC int max(int a, int b) { return a < b ? b : a; }
METAL_FUNC int min(int a, int b) { return b < a ? b : a; }
METAL_FUNC uint32_t min(uint32_t a, uint32_t b) { return b < a ? b : a; }
namespace fast {
METAL_FUNC float exp(float x) { return __builtin_expf(x); }
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags, HERE) { simulator::threadgroup_barrier(where); }
METAL_FUNC void simdgroup_barrier(mem_flags, HERE) { simulator::simdgroup_barrier(where); }

template <typename T>
UNSEEN inline T value_of(const unsigned char* table, unsigned lane) {
  T x;
  __builtin_memcpy(static_cast<void*>(&x), table + lane * simulator::kSlotBytes, sizeof(T));
  return x;
}
template <typename T>
UNSEEN inline T from_lane(const char* function, T x, unsigned lane, simulator::Where where) {
  const unsigned char* table = simulator::exchange(function, &x, sizeof(T), where);
  if (lane >= simulator::kSimdWidth) simulator::fail("lane", "reads from a lane that does not exist", where);
  return value_of<T>(table, lane);
}
template <typename T>
METAL_FUNC T simd_shuffle(T x, ushort lane, HERE) { return from_lane("simd_shuffle", x, lane, where); }
template <typename T>
METAL_FUNC T simd_shuffle_xor(T x, ushort mask, HERE) { return from_lane("simd_shuffle_xor", x, simulator::lane() ^ mask, where); }
template <typename T>
UNSEEN inline T simd_sum(T x, HERE) {
  const unsigned char* table = simulator::exchange("simd_sum", &x, sizeof(T), where);
  T parts[simulator::kSimdWidth];
  for (unsigned i = 0; i < simulator::kSimdWidth; i++) parts[i] = value_of<T>(table, i);
  for (unsigned n = simulator::kSimdWidth / 2; n > 0; n /= 2)
    for (unsigned i = 0; i < n; i++) parts[i] += parts[i + n];
  return parts[0];
}
template <typename T>
UNSEEN inline T simd_max(T x, HERE) {
  const unsigned char* table = simulator::exchange("simd_max", &x, sizeof(T), where);
  for (unsigned i = 0; i < simulator::kSimdWidth; i++) x = max(x, value_of<T>(table, i));
  return x;
}

// Rows and columns lie in lanes as MLX's own attention has it; Apple does not say.
template <typename T, int R, int C>
struct simdgroup_matrix {
  vec<T, 2> pair;
  vec<T, 2>& thread_elements() { return pair; }
};
struct Elements { float a[2], b[2]; };
UNSEEN inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& d, const simdgroup_matrix<float, 8, 8>& a, const simdgroup_matrix<float, 8, 8>& b,
    const simdgroup_matrix<float, 8, 8>& c, HERE) {
  const Elements mine = {{a.pair.x, a.pair.y}, {b.pair.x, b.pair.y}};
  const unsigned char* table = simulator::exchange("simdgroup_multiply_accumulate", &mine, sizeof(mine), where);
  const auto lane_of = [](unsigned row, unsigned column) { return column / 2 % 2 | row % 4 << 1 | column / 4 << 3 | row / 4 << 4; };
  const unsigned lane = simulator::lane();
  const unsigned row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  float sum[2] = {c.pair.x, c.pair.y};
  for (unsigned k = 0; k < 8; k++) {
    const float left = value_of<Elements>(table, lane_of(row, k)).a[k % 2];
    const Elements right = value_of<Elements>(table, lane_of(k, column));
    sum[0] += left * right.b[0];
    sum[1] += left * right.b[1];
  }
  d.pair.x = sum[0];
  d.pair.y = sum[1];
}

}  // namespace metal
using namespace metal;

// One launch: the threadgroups run one after the other here, so a plain count does.
inline bool arrives_last(const int32_t* ticket, int arrivals, int thread_index, int* is_last, HERE) {
  simulator::threadgroup_barrier(where);
  if (thread_index == 0) {
    int32_t* counter = const_cast<int32_t*>(ticket);
    is_last[0] = ++*counter == arrivals;
    if (is_last[0]) *counter = 0;
  }
  simulator::threadgroup_barrier(simulator::Where{where.file, where.line + 100000});
  return is_last[0] != 0;
}

// What metal/cuda.h adds: hints for the cache. AddressSanitizer watches that the bytes asked for exist.
inline uint4 load_kept(const uint4* at) { return *at; }
inline void prefetch(const uint32_t* from, uint32_t bytes, int thread_index, int threads) {
  const volatile unsigned char* at = reinterpret_cast<const unsigned char*>(from);
  for (uint32_t i = static_cast<uint32_t>(thread_index); i < bytes; i += static_cast<uint32_t>(threads)) static_cast<void>(at[i]);
}

// Address spaces mean nothing here (check.h types them). Definitions of threadgroup arrays are rewritten to this by harness.py.
#define THREADGROUP_ARRAY(type, name, n) \
  static type name[n];                   \
  simulator::declare(name, sizeof(name), simulator::Where{__FILE__, __LINE__})
#define device
#define constant
#define thread
#define threadgroup
