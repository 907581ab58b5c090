// The words that the kernels share with Metal, in CUDA C++ (NVRTC, as mx.fast.cuda_kernel compiles them). kernels/source.py
// takes the address spaces out of the text and puts this in front of it.
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
METAL_FUNC uint min(uint a, uint b) { return a < b ? a : b; }
METAL_FUNC float log(float x) { return ::logf(x); }
METAL_FUNC float sqrt(float x) { return ::sqrtf(x); }
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
// is left at zero for the next launch. (The barriers order the other threads' writes before, and their reads after, the atomic.)
METAL_FUNC bool arrives_last(const int* counter, int arrivals, int thread_index, int* is_last) {
  __syncthreads();
  if (thread_index == 0) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    is_last[0] = before == arrivals - 1;
    if (is_last[0]) { *const_cast<int*>(counter) = 0; }
  }
  __syncthreads();
  return is_last[0];
}

// Asks for so many bytes to come to L2, without waiting for them.
METAL_FUNC void prefetch(const uint* from, uint bytes, int thread_index, int threads) {
#if __CUDA_ARCH__ >= 900
  if (thread_index == 0 && bytes > 0) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes)); }
#else
  for (uint at = thread_index * 32; at < bytes / 4; at += threads * 32) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
  }
#endif
}

// For what every step reads first and waits for: it stays in L2 while the parameters of other layers pass through.
METAL_FUNC uint4 load_kept(const uint4* at) {
#if __CUDA_ARCH__ >= 800
  unsigned long long policy;
  uint4 x;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at), "l"(policy));
  return x;
#else
  return *at;
#endif
}

#define KERNEL_ATTRIBUTES \
  const uint3 threadgroup_position_in_grid = blockIdx; \
  const dim3 threadgroups_per_grid = gridDim; \
  const uint thread_index_in_threadgroup = threadIdx.x; \
  const uint thread_index_in_simdgroup = threadIdx.x & 31u; \
  const uint simdgroup_index_in_threadgroup = threadIdx.x >> 5;
