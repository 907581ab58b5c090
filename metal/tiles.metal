// Products of 16 × 16 matrices whose rows and columns lie in the lanes of a simdgroup, on Apple's 8 × 8 matrix units. Each lane holds
// four pairs of neighbours: of row `tile_row` and column `tile_column`, then eight rows below, eight columns on, and both. (Apple does
// not document which lane holds what; this is the layout that MLX's own attention relies on.)

struct Left { uint words[4]; };   // pairs in the order above
struct Right { uint words[4]; };  // at the pairs of (k, n): (0, 0), (8, 0), (0, 8), (8, 8)

constant constexpr ushort ROW_MASK_A = 1;  // lanes of one row differ in these bits
constant constexpr ushort ROW_MASK_B = 8;

METAL_FUNC int tile_row(int lane_index) { return (lane_index / 4 & 4) + lane_index / 2 % 4; }
METAL_FUNC int tile_column(int lane_index) { return (lane_index / 4 & 2) * 2 + lane_index % 2 * 2; }

METAL_FUNC uint bits_of(Element x) { return static_cast<uint>(as_type<ushort>(x)); }
METAL_FUNC uint pack(float low, float high) { return bits_of(static_cast<Element>(low)) | bits_of(static_cast<Element>(high)) << 16; }

typedef metal::simdgroup_matrix<float, 8, 8> Block;

METAL_FUNC void set(thread Block& block, float low, float high) {
  metal::vec<float, 2> pair;
  pair.x = low;
  pair.y = high;
  reinterpret_cast<thread metal::vec<float, 2>&>(block.thread_elements()) = pair;
}

METAL_FUNC void set(thread Block& block, uint word) {
#ifdef BFLOAT
  set(block, as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
#endif
#ifdef HALF
  const half2 pair = as_type<half2>(word);
  set(block, static_cast<float>(pair.x), static_cast<float>(pair.y));
#endif
}

// sum += left · right; sum holds its pairs in the order above.
METAL_FUNC void multiply(thread float* sum, Left left, Right right) {
  #pragma unroll
  for (int at = 0; at < 4; ++at) {
    Block total;
    set(total, sum[at * 2], sum[at * 2 + 1]);
    #pragma unroll
    for (int k = 0; k < 2; ++k) {
      Block a;
      Block b;
      set(a, left.words[at % 2 + k * 2]);
      set(b, right.words[k + at / 2 * 2]);
      metal::simdgroup_multiply_accumulate(total, a, b, total);
    }
    const metal::vec<float, 2> pair = reinterpret_cast<thread metal::vec<float, 2>&>(total.thread_elements());
    sum[at * 2] = pair.x;
    sum[at * 2 + 1] = pair.y;
  }
}

// The right operand whose column n is row n of a tile, from its k-th entry on.
METAL_FUNC Right right_of_rows(const threadgroup Element* tile, int lane_index) {
  Right right;
  #pragma unroll
  for (int at = 0; at < 4; ++at) {
    const threadgroup Element* from = tile + (at / 2 * 8 + tile_column(lane_index)) * TILE_STRIDE + at % 2 * 8 + tile_row(lane_index);
    right.words[at] = bits_of(from[0]) | bits_of(from[TILE_STRIDE]) << 16;
  }
  return right;
}

// The right operand whose row k is row k of a tile, from its n-th entry on.
METAL_FUNC Right right_of_columns(const threadgroup Element* tile, int lane_index) {
  Right right;
  #pragma unroll
  for (int at = 0; at < 4; ++at) {
    const threadgroup Element* from = tile + (at % 2 * 8 + tile_row(lane_index)) * TILE_STRIDE + at / 2 * 8 + tile_column(lane_index);
    right.words[at] = *reinterpret_cast<const threadgroup uint*>(from);
  }
  return right;
}
