// What the three kernels of sparse attention share. Positions lie in a grid of STRIDE columns. A query at i sees near keys, contiguous,
// and far keys, which are numbered f = 0, 1, ...: SUMMARY columns of every row, from `first` on. Far keys lie more than GAP rows before
// i, near keys do not. The tail of a strided pattern is the same with one column, `first`, for queries that lie in that column too.
//
// A threadgroup holds 16 rows (queries, or keys) a simdgroup in registers and walks over tiles of the others in threadgroup memory, whose
// rows are TILE_STRIDE apart: no two in the same banks.

// How one head sees: its KV head, the first of its summary columns, whether it takes the near and the far step.
struct Head {
  int owner;
  int first;
  bool near;
  bool far;
};

METAL_FUNC Head head_of(const device int* plan, int head, int lane) {
  Head mine;
  mine.owner = plan[head * 4];
  mine.first = plan[head * 4 + 1];
  mine.near = plan[head * 4 + 2] != 0;
  mine.far = plan[head * 4 + 3] != 0;
#ifdef LANES
  mine.first = lane;
#endif
  return mine;
}

METAL_FUNC bool near_visible(Head head, int i, int j) {
#ifdef WINDOW
  return j <= i && i - j < STRIDE && (head.near || i == j);
#endif
#ifdef BLOCKS
  const int column = j % STRIDE - head.first;
  return j <= i && i / STRIDE - j / STRIDE <= GAP && (head.near || i == j || (head.far && column >= 0 && column < SUMMARY));
#endif
#ifdef LANES
  return false;
#endif
}

// Whether no query from `low` on sees a near key up to `last`.
METAL_FUNC bool near_none(int low, int last) {
#ifdef WINDOW
  return low - last >= STRIDE;
#endif
#ifdef BLOCKS
  return low / STRIDE - last / STRIDE > GAP;
#endif
#ifdef LANES
  return true;
#endif
}

// Whether all of the near keys begin ... last are visible to all queries low ... high.
METAL_FUNC bool near_all(Head head, int low, int high, int begin, int last) {
#ifdef WINDOW
  return head.near && last <= low && high - begin < STRIDE;
#endif
#ifdef BLOCKS
  return head.near && last <= low && high / STRIDE - begin / STRIDE <= GAP;
#endif
#ifdef LANES
  return false;
#endif
}

METAL_FUNC bool far_visible(int i, int f) { return f / SUMMARY < i / STRIDE - GAP; }

METAL_FUNC int far_position(Head head, int f) { return f / SUMMARY * STRIDE + head.first + f % SUMMARY; }

METAL_FUNC int key_position(Head head, int local, bool is_far) { return is_far ? far_position(head, local) : local; }

// Queries are numbered by position, or, where only one column's are meant, by row.
METAL_FUNC int query_position(Head head, int local) {
#ifdef LANES
  return local * STRIDE + head.first;
#endif
#ifdef CONTIGUOUS
  return local;
#endif
}

// The first query that is at `position` or behind it.
METAL_FUNC int query_from(Head head, int position) {
#ifdef LANES
  return metal::max(0, position - head.first + STRIDE - 1) / STRIDE;
#endif
#ifdef CONTIGUOUS
  return position;
#endif
}

METAL_FUNC float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ROW_MASK_A));
  return metal::max(x, simd_shuffle_xor(x, ROW_MASK_B));
}

METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ROW_MASK_A);
  return x + simd_shuffle_xor(x, ROW_MASK_B);
}

// 16 columns of two rows, eight apart.
METAL_FUNC Left left_of(const device Element* upper, const device Element* lower, int column) {
  Left left;
  left.words[0] = *reinterpret_cast<const device uint*>(upper + column);
  left.words[1] = *reinterpret_cast<const device uint*>(lower + column);
  left.words[2] = *reinterpret_cast<const device uint*>(upper + column + 8);
  left.words[3] = *reinterpret_cast<const device uint*>(lower + column + 8);
  return left;
}

// Left operands that are used in every round, PARTS of them: in registers, or, where those are too few, in threadgroup memory.
METAL_FUNC void keep(thread Left* parts, int d, int lane_index, Left left) { parts[d] = left; }
METAL_FUNC Left kept(thread const Left* parts, int d, int lane_index) { return parts[d]; }

METAL_FUNC void keep(threadgroup uint4* parts, int d, int lane_index, Left left) {
  uint4 words;
  words.x = left.words[0];
  words.y = left.words[1];
  words.z = left.words[2];
  words.w = left.words[3];
  parts[d * 32 + lane_index] = words;
}
METAL_FUNC Left kept(const threadgroup uint4* parts, int d, int lane_index) {
  const uint4 words = parts[d * 32 + lane_index];
  Left left;
  left.words[0] = words.x;
  left.words[1] = words.y;
  left.words[2] = words.z;
  left.words[3] = words.w;
  return left;
}

METAL_FUNC Left narrow(thread const float* x) {
  Left left;
  #pragma unroll
  for (int at = 0; at < 4; ++at) {
    left.words[at] = pack(x[at * 2], x[at * 2 + 1]);
  }
  return left;
}

// 16 bytes of one row of a tile; zeros for a row that does not exist.
METAL_FUNC void put(threadgroup uint4* tile, int row, int piece, const device Element* from, bool exists) {
  uint4 x;
  x.x = x.y = x.z = x.w = 0u;
  if (exists) {
    x = reinterpret_cast<const device uint4*>(from)[piece];
  }
  tile[row * (PIECES + 1) + piece] = x;
}

METAL_FUNC const threadgroup Element* tile_rows(const threadgroup uint4* tile, int row) {
  return reinterpret_cast<const threadgroup Element*>(tile) + row * TILE_STRIDE;
}

// The queries of a lane: two rows of its simdgroup's 16. What lies behind the last query is held as the last, and never written.
struct Rows {
  int at[2];        // positions
  bool has[2];
  size_t place[2];  // in [B, H, T]
  int low;          // positions of the simdgroup's first and last
  int high;
};

METAL_FUNC Rows rows_of(Head head, int first_row, int end, int offset, size_t of_head, int lane_index) {
  Rows rows;
  rows.low = query_position(head, metal::min(first_row, end - 1));
  rows.high = query_position(head, metal::min(first_row + 15, end - 1));
  #pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + tile_row(lane_index) + r * 8;
    rows.has[r] = row < end;
    rows.at[r] = query_position(head, metal::min(row, end - 1));
    rows.place[r] = of_head + static_cast<size_t>(rows.at[r] - offset);
  }
  return rows;
}

// The keys that queries at positions `first` ... `last` may see, in tiles: near ones, then far ones.
struct Span {
  int near_begin;
  int near_end;
  int far_end;
  int near_tiles;
  int tiles;
};

METAL_FUNC Span span_of(Head head, int first, int last) {
  Span span;
  span.far_end = head.far ? metal::max(0, last / STRIDE - GAP) * SUMMARY : 0;
  span.near_end = last + 1;
  span.near_begin = 0;
#ifdef WINDOW
  span.near_begin = metal::max(0, first - STRIDE + 1);
  span.far_end = 0;
#endif
#ifdef BLOCKS
  span.near_begin = metal::max(0, first / STRIDE - GAP) * STRIDE;
#endif
#ifdef LANES
  span.near_end = 0;
#endif
  span.near_tiles = (span.near_end - span.near_begin + COLUMNS - 1) / COLUMNS;
  span.tiles = span.near_tiles + (span.far_end + COLUMNS - 1) / COLUMNS;
  return span;
}

// One tile of keys and values; `begin`: the number of its first key.
METAL_FUNC void load_tile(
    threadgroup uint4* key_tile, threadgroup uint4* value_tile, const device Element* keys, const device Element* values,
    Head head, int begin, int end, bool is_far, int thread_index) {
  for (int item = thread_index; item < COLUMNS * PIECES; item += 32 * SIMDGROUPS) {
    const int local = begin + item / PIECES;
    const bool exists = local < end;
    const size_t from = static_cast<size_t>(exists ? key_position(head, local, is_far) : 0) * HEAD_DIM;
    put(key_tile, item / PIECES, item % PIECES, keys + from, exists);
    put(value_tile, item / PIECES, item % PIECES, values + from, exists);
  }
}

// Which of some keys a simdgroup's queries see: none, all, or it has to be asked key by key.
METAL_FUNC bool sees_none(int low, int high, int begin, int last, bool is_far) {
  return is_far ? !far_visible(high, begin) : begin > high || near_none(low, last);
}

METAL_FUNC bool sees_all(Head head, int low, int high, int begin, int last, bool is_far) {
  return is_far ? far_visible(low, last) : near_all(head, low, high, begin, last);
}

METAL_FUNC bool sees(Head head, int i, int key, bool is_far) { return is_far ? far_visible(i, key) : near_visible(head, i, key); }

// The pairs of `sum`, to two rows, where those exist.
METAL_FUNC void write(device float* upper, device float* lower, thread const float* sum, int column, bool has_upper, bool has_lower) {
  #pragma unroll
  for (int at = 0; at < 4; ++at) {
    device float* to = (at % 2 == 0 ? upper : lower) + column + at / 2 * 8;
    if (at % 2 == 0 ? has_upper : has_lower) {
      to[0] = sum[at * 2];
      to[1] = sum[at * 2 + 1];
    }
  }
}
