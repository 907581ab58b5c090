// The words that the kernels share with Metal, in CUDA C++ (NVRTC, as mx.fast.cuda_kernel compiles them). kernels.py takes the
// address spaces out of the text and puts this in front of it.
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef __nv_bfloat16 bfloat16_t;
#define METAL_FUNC __device__ __forceinline__

namespace metal {
METAL_FUNC float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
METAL_FUNC float max(float a, float b) { return ::fmaxf(a, b); }
METAL_FUNC float min(float a, float b) { return ::fminf(a, b); }
METAL_FUNC int max(int a, int b) { return a > b ? a : b; }
METAL_FUNC int min(int a, int b) { return a < b ? a : b; }
METAL_FUNC float log(float x) { return ::logf(x); }
namespace fast {
METAL_FUNC float exp(float x) { return ::__expf(x); }
}
}

template <typename To, typename From>
METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

template <typename T>
METAL_FUNC T simd_shuffle(T x, ushort lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <typename T>
METAL_FUNC T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
METAL_FUNC float simd_sum(float x) {
  for (int step = 16; step > 0; step /= 2) { x += simd_shuffle_xor(x, step); }
  return x;
}
METAL_FUNC float simd_max(float x) {
  for (int step = 16; step > 0; step /= 2) { x = metal::max(x, simd_shuffle_xor(x, step)); }
  return x;
}

enum class mem_flags { mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }

// True for the threads of one threadgroup: the last of `arrivals` to come, when it sees what all the others wrote. The counter
// is left at zero for the next launch. (The barrier orders the threadgroup's writes before its first thread's fence.)
METAL_FUNC bool arrives_last(const int* ticket, int arrivals, int thread_index, int* is_last) {
  __syncthreads();
  if (thread_index == 0) {
    int* counter = const_cast<int*>(ticket);
    __threadfence();
    is_last[0] = atomicAdd(counter, 1) == arrivals - 1;
    __threadfence();
    if (is_last[0]) { *counter = 0; }
  }
  __syncthreads();
  return is_last[0];
}

METAL_FUNC void prefetch(const uint* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

#define KERNEL_ATTRIBUTES \
  const uint3 threadgroup_position_in_grid = blockIdx; \
  const dim3 threadgroups_per_grid = gridDim; \
  const uint thread_index_in_threadgroup = threadIdx.x; \
  const uint thread_index_in_simdgroup = threadIdx.x & 31u; \
  const uint simdgroup_index_in_threadgroup = threadIdx.x >> 5;
