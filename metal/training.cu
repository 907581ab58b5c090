// The kernels of kernels/training.py, which says what each one computes. They include nothing, so that NVRTC compiles them in a
// tenth of a second; half precision is converted by the two instructions below. Rows of half-precision numbers start at multiples
// of 16 bytes.
typedef unsigned short half;

__device__ __forceinline__ float widen(half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ half narrow(float x) {
  half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ void eight(uint4 raw, float* x) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = widen(static_cast<half>(words[i] & 0xffffu));
    x[2 * i + 1] = widen(static_cast<half>(words[i] >> 16));
  }
}
__device__ __forceinline__ unsigned pair(float low, float high) {
  return static_cast<unsigned>(narrow(low)) | (static_cast<unsigned>(narrow(high)) << 16);
}
__device__ __forceinline__ float sum_of(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) { x += __shfl_xor_sync(0xffffffffu, x, step); }
  return x;
}
__device__ __forceinline__ float max_of(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) { x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step)); }
  return x;
}
__device__ __forceinline__ float clip(float x) { return fmaxf(-LIMIT, fminf(LIMIT, x)); }

// A row of scores [rows, columns] is a warp's, or, where `each` is 1, a whole block's of WARPS warps.
extern "C" __global__ void nectar_softmax(
    const half* scores, const int* valid, half* probabilities, float* log_normalizer, int rows, int columns, int each) {
  __shared__ float tops[WARPS];
  __shared__ float totals[WARPS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const bool whole = each == 1;
  const int first = whole ? threadIdx.x : lane, step = whole ? 32 * WARPS : 32;
  const int mine = blockIdx.x * each + (whole ? 0 : warp), row = min(mine, rows - 1);
  const uint4* from = reinterpret_cast<const uint4*>(scores + static_cast<size_t>(row) * columns);
  uint4* to = reinterpret_cast<uint4*>(probabilities + static_cast<size_t>(row) * columns);
  const int known = valid[0];
  const float low = -3.0e38f;
  float x[8], top = low, total = 0.0f;
  for (int i = first; i * 8 < columns; i += step) {
    eight(from[i], x);
    float here = low, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      x[j] = i * 8 + j < known ? x[j] : low;
      here = fmaxf(here, x[j]);
    }
    const float higher = fmaxf(top, here);
#pragma unroll
    for (int j = 0; j < 8; j++) { sum += __expf(x[j] - higher); }
    total = total * __expf(top - higher) + sum;
    top = higher;
  }
  float all = max_of(top);
  total = sum_of(total * __expf(top - all));
  if (whole) {
    if (lane == 0) {
      tops[warp] = all;
      totals[warp] = total;
    }
    __syncthreads();
    for (int i = 0; i < WARPS; i++) { all = fmaxf(all, tops[i]); }
    total = 0.0f;
    for (int i = 0; i < WARPS; i++) { total += totals[i] * __expf(tops[i] - all); }
  }
  if (mine >= rows) { return; }
  const float share = 1.0f / total;
  for (int i = first; i * 8 < columns; i += step) {
    eight(from[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) { x[j] = i * 8 + j < known ? __expf(x[j] - all) * share : 0.0f; }
    uint4 raw;
    raw.x = pair(x[0], x[1]);
    raw.y = pair(x[2], x[3]);
    raw.z = pair(x[4], x[5]);
    raw.w = pair(x[6], x[7]);
    to[i] = raw;
  }
  if (first == 0) { log_normalizer[row] = all + logf(total); }
}

// errors, change, live [heads, samples, D], gain, gap [heads, samples], ratio [heads] -> slopes [heads, samples, D + TAIL]. A row
// is a warp's; D is at most 256.
extern "C" __global__ void nectar_slopes(
    const half* errors, const half* change, const half* live, const float* gain, const float* gap, const float* ratio, half* slopes,
    int rows, int samples, int D) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= rows) { return; }
  const size_t at = static_cast<size_t>(row) * D, to = static_cast<size_t>(row) * (D + TAIL);
  float u[8], a[8], uu = 0.0f, ua = 0.0f, ul = 0.0f, al = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int column = i * 32 + lane;
    const bool inside = column < D;
    u[i] = inside ? widen(errors[at + column]) : 0.0f;
    a[i] = inside ? widen(change[at + column]) : 0.0f;
    const float l = inside ? widen(live[at + column]) : 0.0f;
    uu += u[i] * u[i];
    ua += u[i] * a[i];
    ul += u[i] * l;
    al += a[i] * l;
  }
  uu = sum_of(uu);
  ua = sum_of(ua);
  ul = sum_of(ul);
  al = sum_of(al);
  const float d = gain[row];
  const float gate = 1.0f / (1.0f + __expf(fminf(-(d + gap[row]), 80.0f))), exact = 1.0f / (1.0f + __expf(fminf(-gap[row], 80.0f)));
  const float alpha = gate * gate + PLAIN, beta = gate * exact + PLAIN;
  const float by_log = gate * (1.0f - gate) * (gate * uu - exact * ua) + ratio[row / samples] * d;
  const float rest = clip(SLOPE * (by_log - (alpha * (uu + ul) - beta * (ua + al))));
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int column = i * 32 + lane;
    if (column < D) { slopes[to + column] = narrow(clip(SLOPE * (alpha * u[i] - beta * a[i]))); }
  }
  if (lane < TAIL) {
    const half high = narrow(rest);
    slopes[to + D + lane] = lane == 0 ? high : lane == 1 ? narrow(rest - widen(high)) : narrow(0.0f);
  }
}

// values, first, second, gradient [heads, rows, columns], by_column [heads, columns] and by_row [heads, rows] of the rate, now [3].
// One number a thread.
extern "C" __global__ void nectar_adam(
    const float* values, const float* first, const float* second, const half* gradient, const float* by_column, const float* by_row,
    const float* now, float* following, float* following_first, float* following_second, half* wide, int count, int rows, int columns,
    int keys) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) { return; }
  const int column = at % columns, row = at / columns, D = columns - TAIL;
  float g = clip(widen(gradient[at]));
  const float m = BETA1 * first[at] + (1.0f - BETA1) * g, v = BETA2 * second[at] + (1.0f - BETA2) * g * g;
  const float rate = now[0] * by_column[row / rows * columns + column] * by_row[row];
  const float x = values[at] - rate * (m * now[1]) / (sqrtf(v * now[2]) + EPSILON);
  following[at] = x;
  following_first[at] = m;
  following_second[at] = v;
  if (column < D) { wide[at] = narrow(x); }
  if (column == D) {
    const float bias = fmaxf(x, -LIMIT);
    const half high = narrow(keys ? bias : 1.0f);
    wide[at] = high;
    wide[at + 1] = keys ? narrow(bias - widen(high)) : high;
  }
  if (column > D + 1) { wide[at] = narrow(keys && column < D + 4 ? -1.0f : 0.0f); }
}
