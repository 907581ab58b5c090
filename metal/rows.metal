// One row of a matrix, HEAD_DIM columns, is shared by LANES lanes of a simdgroup, eight neighbouring columns each. `fetch` only
// loads (so that several rows are in flight before the first is used), `widen` turns what was loaded into eight floats.
// Matrices start at multiples of 16 bytes.

struct Int8 {};
struct Int4 {};

struct Matrix {
  const device uint* words;
  size_t stride;               // words from row to row
  const device half* scales;   // quantized rows only: one a group of GROUP columns
};

template <typename Element>
struct Row;

#ifdef HALVES
template <>
struct Row<half> {
  typedef uint4 Raw;
  static METAL_FUNC Raw fetch(Matrix m, int row, int part) {
    return *reinterpret_cast<const device uint4*>(m.words + static_cast<size_t>(row) * m.stride + static_cast<size_t>(part * 4));
  }
  static METAL_FUNC void pair(uint word, thread float* x) {
    const half2 both = as_type<half2>(word);
    x[0] = static_cast<float>(both.x);
    x[1] = static_cast<float>(both.y);
  }
  static METAL_FUNC float widen(Raw raw, thread float* x) {
    pair(raw.x, x);
    pair(raw.y, x + 2);
    pair(raw.z, x + 4);
    pair(raw.w, x + 6);
    return 1.0f;
  }
};

template <>
struct Row<bfloat16_t> {
  typedef uint4 Raw;
  static METAL_FUNC Raw fetch(Matrix m, int row, int part) { return Row<half>::fetch(m, row, part); }
  static METAL_FUNC void pair(uint word, thread float* x) {  // a bfloat16 is the upper half of a float
    x[0] = as_type<float>(word << 16);
    x[1] = as_type<float>(word & 0xffff0000u);
  }
  static METAL_FUNC float widen(Raw raw, thread float* x) {
    pair(raw.x, x);
    pair(raw.y, x + 2);
    pair(raw.z, x + 4);
    pair(raw.w, x + 6);
    return 1.0f;
  }
};
#endif

#ifdef FLOATS
struct Eight {
  uint4 low;
  uint4 high;
};

template <>
struct Row<float> {
  typedef Eight Raw;
  static METAL_FUNC Raw fetch(Matrix m, int row, int part) {
    const device uint4* at = reinterpret_cast<const device uint4*>(m.words + static_cast<size_t>(row) * m.stride + static_cast<size_t>(part * 8));
    Raw raw;
    raw.low = at[0];
    raw.high = at[1];
    return raw;
  }
  static METAL_FUNC float widen(Raw raw, thread float* x) {
    x[0] = as_type<float>(raw.low.x);
    x[1] = as_type<float>(raw.low.y);
    x[2] = as_type<float>(raw.low.z);
    x[3] = as_type<float>(raw.low.w);
    x[4] = as_type<float>(raw.high.x);
    x[5] = as_type<float>(raw.high.y);
    x[6] = as_type<float>(raw.high.z);
    x[7] = as_type<float>(raw.high.w);
    return 1.0f;
  }
};
#endif

// Quantized rows widen to their integers; the scale of the group comes back as a factor, to be applied once to all eight.
#ifdef BYTES
struct Bytes {
  uint2 data;
  half scale;
};

template <>
struct Row<Int8> {
  typedef Bytes Raw;
  static METAL_FUNC Raw fetch(Matrix m, int row, int part) {
    Raw raw;
    raw.data = *reinterpret_cast<const device uint2*>(m.words + static_cast<size_t>(row) * m.stride + static_cast<size_t>(part * 2));
    raw.scale = m.scales[static_cast<size_t>(row) * (HEAD_DIM / GROUP) + static_cast<size_t>(part * 8 / GROUP)];
    return raw;
  }
  static METAL_FUNC void quad(uint word, thread float* x) {
    const char4 all = as_type<char4>(word);
    x[0] = static_cast<float>(all.x);
    x[1] = static_cast<float>(all.y);
    x[2] = static_cast<float>(all.z);
    x[3] = static_cast<float>(all.w);
  }
  static METAL_FUNC float widen(Raw raw, thread float* x) {
    quad(raw.data.x, x);
    quad(raw.data.y, x + 4);
    return static_cast<float>(raw.scale);
  }
};
#endif

#ifdef NIBBLES
struct Nibbles {
  uint data;
  half scale;
};

template <>
struct Row<Int4> {
  typedef Nibbles Raw;
  static METAL_FUNC Raw fetch(Matrix m, int row, int part) {
    Raw raw;
    raw.data = m.words[static_cast<size_t>(row) * m.stride + static_cast<size_t>(part)];
    raw.scale = m.scales[static_cast<size_t>(row) * (HEAD_DIM / GROUP) + static_cast<size_t>(part * 8 / GROUP)];
    return raw;
  }
  static METAL_FUNC float widen(Raw raw, thread float* x) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = static_cast<float>(static_cast<int>((raw.data >> (4 * i)) & 15u) - 8);
    }
    return static_cast<float>(raw.scale);
  }
};
#endif

METAL_FUNC float dot8(const thread float* x, const thread float* y) {
  float sum = x[0] * y[0];
  #pragma unroll
  for (int i = 1; i < 8; ++i) {
    sum = metal::fma(x[i], y[i], sum);
  }
  return sum;
}

// Sums over the lanes that share a row, of N values at once so that the shuffles overlap; every one of the lanes gets them.
template <int N>
METAL_FUNC void row_sums(thread float* x) {
  #pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    #pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] += simd_shuffle_xor(x[i], static_cast<ushort>(step));
    }
  }
}
