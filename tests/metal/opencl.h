// Metal's words for clang's C++ for OpenCL, in which address spaces belong to the types as they do in Metal: the second front end that reads
// the kernels (front_end.py). What is not declared here may not be used; nothing is ever run.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;

struct bfloat16_t {
  ushort bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float);
  operator float() const;
};
typedef half float16_t;

namespace metal {
#define VECTOR(type, n) typedef type type##n __attribute__((ext_vector_type(n)));
VECTOR(half, 2) VECTOR(float, 2) VECTOR(float, 4) VECTOR(uint, 2) VECTOR(uint, 3) VECTOR(uint, 4) VECTOR(char, 4)
#undef VECTOR
template <typename T, int N>
struct vector_of {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <typename T, int N>
using vec = typename vector_of<T, N>::type;

// The functions that kernels may call: BUILTINS in front_end.py.
float fma(float, float, float);
float log(float);
float sqrt(float);
namespace fast {
float exp(float);
}
#define ORDERED(type) type max(type, type); type min(type, type);
ORDERED(float) ORDERED(half) ORDERED(int) ORDERED(uint) ORDERED(short) ORDERED(ushort) ORDERED(long) ORDERED(ulong)
#undef ORDERED
template <typename T> T simd_shuffle(T, ushort);
template <typename T> T simd_shuffle_xor(T, ushort);
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  vec<T, 2> elements;
  thread vec<T, 2>& thread_elements() thread;
};
template <typename T, int C, int R>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, C, R>&, simdgroup_matrix<T, C, R>, simdgroup_matrix<T, C, R>, simdgroup_matrix<T, C, R>);

// Names of Metal's library: to give them to something else that is called or constructed is an ambiguity here as there.
float length(float4); float distance(float4, float4); float dot(float4, float4); float mix(float, float, float); float step(float, float);
float sign(float); float select(float, float, bool); float round(float); float clamp(float, float, float); float fract(float);
float4 cross(float4, float4); float4 normalize(float4); bool all(uint4); bool any(uint4);
template <typename T, int C, int R> struct matrix;
template <typename T, size_t N> struct array;
template <typename T> struct atomic;
}
template <typename To, typename From> To as_type(From);
using namespace metal;
