  // The gradient of the queries: Σ_j scale · w_j (d_output · v_j + constant) k_j, w_j = e^(score - L). Shapes and grid as forwards.
  using namespace nectar;
  const int H = queries_shape[1];
  const int T = queries_shape[2];
  const int S = keys_shape[2];
  const int thread_index = static_cast<int>(thread_index_in_threadgroup);
  const int lane_index = static_cast<int>(thread_index_in_simdgroup);
  const int head_index = static_cast<int>(threadgroup_position_in_grid.y);
  const int sequence = static_cast<int>(threadgroup_position_in_grid.z);
  int block = static_cast<int>(threadgroups_per_grid.x) - 1 - static_cast<int>(threadgroup_position_in_grid.x);
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

  const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
  const int first_row = queries_begin + simdgroup * 16;
  const int column = tile_column(lane_index);
  const size_t of_head = static_cast<size_t>(sequence * H + head_index) * static_cast<size_t>(T);
  const size_t of_owner = static_cast<size_t>(sequence * keys_shape[1] + head.owner) * static_cast<size_t>(S) * HEAD_DIM;
  const Rows rows = rows_of(head, first_row, queries_end, S - T, of_head, lane_index);
  const size_t upper = rows.place[0] * HEAD_DIM;
  const size_t lower = rows.place[1] * HEAD_DIM;

#ifdef IN_REGISTERS
  Left query[PARTS];
  Left d_out[PARTS];
#endif
#ifdef IN_THREADGROUP
  threadgroup uint4 parts[SIMDGROUPS * 2 * PARTS * 32];
  threadgroup uint4* query = parts + simdgroup * (2 * PARTS * 32);
  threadgroup uint4* d_out = query + PARTS * 32;
#endif
  float d_query[PARTS * 8];
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    keep(query, d, lane_index, left_of(queries + upper, queries + lower, d * 16 + column));
    keep(d_out, d, lane_index, left_of(d_output + upper, d_output + lower, d * 16 + column));
  }
  #pragma unroll
  for (int d = 0; d < PARTS * 8; ++d) {
    d_query[d] = 0.0f;
  }
  const float log_of[2] = {log_normalizer[rows.place[0]], log_normalizer[rows.place[1]]};
  const float constant_of[2] = {constants[rows.place[0]], constants[rows.place[1]]};

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
    for (int n = 0; n < COLUMNS / 16; ++n) {
      const int slice = begin + n * 16;
      if (sees_none(rows.low, rows.high, slice, slice + 15, is_far)) {
        continue;
      }
      const bool whole = slice + 16 <= end && sees_all(head, rows.low, rows.high, slice, slice + 15, is_far);
      const threadgroup Element* key_rows = tile_rows(key_tile, n * 16);
      const threadgroup Element* value_rows = tile_rows(value_tile, n * 16);
      float score[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      float d_weight[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      #pragma unroll
      for (int d = 0; d < PARTS; ++d) {
        multiply(score, kept(query, d, lane_index), right_of_rows(key_rows + d * 16, lane_index));
        multiply(d_weight, kept(d_out, d, lane_index), right_of_rows(value_rows + d * 16, lane_index));
      }
      #pragma unroll
      for (int x = 0; x < 8; ++x) {
        const int r = x / 2 % 2;
        bool visible = true;
        if (!whole) {
          const int local = slice + x / 4 * 8 + column + x % 2;
          visible = local < end && sees(head, rows.at[r], local, is_far);
        }
        const float weight = metal::fast::exp(visible ? metal::fma(score[x], SCALE, -log_of[r]) : NEVER);
        score[x] = weight * (d_weight[x] + constant_of[r]);
      }
      const Left d_score = narrow(score);
      #pragma unroll
      for (int d = 0; d < PARTS; ++d) {
        multiply(d_query + d * 8, d_score, right_of_columns(key_rows + d * 16, lane_index));
      }
    }
  }
  #pragma unroll
  for (int d = 0; d < PARTS * 8; ++d) {
    d_query[d] *= SCALE;
  }
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    write(d_queries + upper, d_queries + lower, d_query + d * 8, d * 16 + column, rows.has[0], rows.has[1]);
  }
