// Metal's words with its address spaces as types, for `clang++ -std=c++14 -fsyntax-only`: a pointer that changes its address
// space does not compile. Nothing here is ever run.
#pragma once
#include <stddef.h>
#include <stdint.h>
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat16_t;
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define THREADGROUP_ARRAY(type, name, n) threadgroup type(&name)[n] = *(threadgroup type(*)[n])16

namespace metal {
#define VECTOR(type, n) typedef type type##n __attribute__((ext_vector_type(n)));
VECTOR(half, 2) VECTOR(uint, 2) VECTOR(uint, 3) VECTOR(uint, 4) VECTOR(float, 4)
typedef signed char char4 __attribute__((ext_vector_type(4)));
template <typename To, typename From> To as_type(From);
float fma(float, float, float);
float log(float);
float sqrt(float);
float max(float, float);
float min(float, float);
int max(int, int);
int min(int, int);
namespace fast { float exp(float); }
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <typename T> T simd_shuffle(T, ushort);
template <typename T> T simd_shuffle_xor(T, ushort);
float simd_sum(float);
float simd_max(float);
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <typename T, int R, int C>
struct simdgroup_matrix {
  vec<T, 2> pair;
  thread vec<T, 2>& thread_elements() { return pair; }
};
typedef simdgroup_matrix<float, 8, 8> Matrix8;
void simdgroup_multiply_accumulate(thread Matrix8&, thread const Matrix8&, thread const Matrix8&, thread const Matrix8&);
}
using namespace metal;
