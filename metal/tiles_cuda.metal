// What tiles.metal has, on NVIDIA's matrix units (compute capability 8.0 and later). Pairs lie where mma.m16n8k16 wants them.

struct Left { uint words[4]; };
struct Right { uint words[4]; };  // for columns 0 to 7: k from 0 and from 8; for columns 8 to 15 the same

constant constexpr ushort ROW_MASK_A = 1;
constant constexpr ushort ROW_MASK_B = 2;

METAL_FUNC int tile_row(int lane_index) { return lane_index / 4; }
METAL_FUNC int tile_column(int lane_index) { return lane_index % 4 * 2; }

METAL_FUNC uint pack(float low, float high) {
#ifdef BFLOAT
  return as_type<uint>(__floats2bfloat162_rn(low, high));
#endif
#ifdef HALF
  return as_type<uint>(__floats2half2_rn(low, high));
#endif
}

METAL_FUNC void multiply(thread float* sum, Left left, Right right) {
  #pragma unroll
  for (int n = 0; n < 2; ++n) {
    thread float* x = sum + n * 4;
#ifdef BFLOAT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
#ifdef HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
        : "r"(left.words[0]), "r"(left.words[1]), "r"(left.words[2]), "r"(left.words[3]), "r"(right.words[n * 2]), "r"(right.words[n * 2 + 1]));
  }
}

METAL_FUNC uint shared_address(const void* at) { return static_cast<uint>(__cvta_generic_to_shared(at)); }

METAL_FUNC Right right_of_rows(const threadgroup Element* tile, int lane_index) {
  const threadgroup Element* from = tile + (lane_index % 8 + lane_index / 16 * 8) * TILE_STRIDE + lane_index / 8 % 2 * 8;
  Right right;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(right.words[0]), "=r"(right.words[1]), "=r"(right.words[2]), "=r"(right.words[3])
               : "r"(shared_address(from)) : "memory");
  return right;
}

METAL_FUNC Right right_of_columns(const threadgroup Element* tile, int lane_index) {
  const threadgroup Element* from = tile + lane_index % 16 * TILE_STRIDE + lane_index / 16 * 8;
  Right right;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(right.words[0]), "=r"(right.words[1]), "=r"(right.words[2]), "=r"(right.words[3])
               : "r"(shared_address(from)) : "memory");
  return right;
}
