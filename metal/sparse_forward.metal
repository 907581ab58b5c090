  // (o, L) of queries [B, H, T, D], the last T of the S positions of keys and values [B, K, S, D].
  // grid = (32 * SIMDGROUPS * blocks of queries, H, B), threadgroup = (32 * SIMDGROUPS, 1, 1); under LANES so many blocks a column.
  using namespace nectar;
  const int H = queries_shape[1];
  const int T = queries_shape[2];
  const int S = keys_shape[2];
  const int thread_index = static_cast<int>(thread_index_in_threadgroup);
  const int lane_index = static_cast<int>(thread_index_in_simdgroup);
  const int head_index = static_cast<int>(threadgroup_position_in_grid.y);
  const int sequence = static_cast<int>(threadgroup_position_in_grid.z);
  int block = static_cast<int>(threadgroups_per_grid.x) - 1 - static_cast<int>(threadgroup_position_in_grid.x);  // the longest first
  int column_of_grid = 0;
#ifdef LANES
  column_of_grid = block % STRIDE;
  block = block / STRIDE;
#endif
  const Head head = head_of(plan, head_index, column_of_grid);
  const int queries_begin = query_from(head, S - T) + block * ROWS;
  const int queries_end = query_from(head, S);
  if (queries_begin >= queries_end) {
    return;
  }

  const int first_row = queries_begin + static_cast<int>(simdgroup_index_in_threadgroup) * 16;
  const int column = tile_column(lane_index);
  const size_t of_head = static_cast<size_t>(sequence * H + head_index) * static_cast<size_t>(T);
  const size_t of_owner = static_cast<size_t>(sequence * keys_shape[1] + head.owner) * static_cast<size_t>(S) * HEAD_DIM;
  const Rows rows = rows_of(head, first_row, queries_end, S - T, of_head, lane_index);
  const size_t upper = rows.place[0] * HEAD_DIM;
  const size_t lower = rows.place[1] * HEAD_DIM;

  Left query[PARTS];
  float out[PARTS * 8];
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    query[d] = left_of(queries + upper, queries + lower, d * 16 + column);
  }
  #pragma unroll
  for (int d = 0; d < PARTS * 8; ++d) {
    out[d] = 0.0f;
  }
  float top[2] = {NEVER, NEVER};
  float total[2] = {0.0f, 0.0f};

  threadgroup uint4 key_tile[COLUMNS * (PIECES + 1)];
  threadgroup uint4 value_tile[COLUMNS * (PIECES + 1)];
  const int last = query_position(head, metal::min(queries_begin + ROWS, queries_end) - 1);
  const Span span = span_of(head, query_position(head, queries_begin), last);
  for (int tile = 0; tile < span.tiles; ++tile) {
    const bool is_far = tile >= span.near_tiles;
    const int begin = is_far ? (tile - span.near_tiles) * COLUMNS : span.near_begin + tile * COLUMNS;
    const int end = is_far ? span.far_end : span.near_end;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_tile(key_tile, value_tile, keys + of_owner, values + of_owner, head, begin, end, is_far, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int slice = begin; slice < begin + COLUMNS; slice += SLICE) {
      if (sees_none(rows.low, rows.high, slice, slice + SLICE - 1, is_far)) {
        continue;
      }
      const bool whole = slice + SLICE <= end && sees_all(head, rows.low, rows.high, slice, slice + SLICE - 1, is_far);
      const threadgroup Element* key_rows = tile_rows(key_tile, slice - begin);
      const threadgroup Element* value_rows = tile_rows(value_tile, slice - begin);
      float score[SLICE / 2];
      #pragma unroll
      for (int n = 0; n < SLICE / 16; ++n) {
        #pragma unroll
        for (int x = 0; x < 8; ++x) {
          score[n * 8 + x] = 0.0f;
        }
        #pragma unroll
        for (int d = 0; d < PARTS; ++d) {
          multiply(score + n * 8, query[d], right_of_rows(key_rows + n * 16 * TILE_STRIDE + d * 16, lane_index));
        }
      }
      float highest[2] = {top[0], top[1]};
      #pragma unroll
      for (int x = 0; x < SLICE / 2; ++x) {
        const int r = x / 2 % 2;
        score[x] *= SCALE;
        if (!whole) {
          const int local = slice + x / 8 * 16 + x / 4 % 2 * 8 + column + x % 2;
          const bool visible = local < end && sees(head, rows.at[r], local, is_far);
          score[x] = visible ? score[x] : 2.0f * NEVER;
        }
        highest[r] = metal::max(highest[r], score[x]);
      }
      #pragma unroll
      for (int r = 0; r < 2; ++r) {
        highest[r] = row_max(highest[r]);
        const float factor = metal::fast::exp(top[r] - highest[r]);
        top[r] = highest[r];
        total[r] *= factor;
        #pragma unroll
        for (int d = 0; d < PARTS * 4; ++d) {
          out[d / 2 * 4 + r * 2 + d % 2] *= factor;
        }
      }
      #pragma unroll
      for (int x = 0; x < SLICE / 2; ++x) {
        score[x] = metal::fast::exp(score[x] - top[x / 2 % 2]);
        total[x / 2 % 2] += score[x];
      }
      #pragma unroll
      for (int n = 0; n < SLICE / 16; ++n) {
        const Left weights = narrow(score + n * 8);
        #pragma unroll
        for (int d = 0; d < PARTS; ++d) {
          multiply(out + d * 8, weights, right_of_columns(value_rows + n * 16 * TILE_STRIDE + d * 16, lane_index));
        }
      }
    }
  }

  #pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = row_sum(total[r]);
    const float share = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
    #pragma unroll
    for (int d = 0; d < PARTS * 4; ++d) {
      out[d / 2 * 4 + r * 2 + d % 2] *= share;
    }
    if (column == 0 && rows.has[r]) {
      log_normalizer[rows.place[r]] = total[r] > 0.0f ? top[r] + metal::log(total[r]) : NEVER;
    }
  }
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    write(output + upper, output + lower, out + d * 8, d * 16 + column, rows.has[0], rows.has[1]);
  }
