  // The gradients of keys and values [B, H, S, D], a copy for each query head: of far keys (FAR_KEYS), where they lie, or of all others,
  // which then take in what was found for the far ones. grid = (32 * SIMDGROUPS * blocks of keys, H, B), or so many blocks a column.
  using namespace nectar;
  const int H = queries_shape[1];
  const int T = queries_shape[2];
  const int S = keys_shape[2];
  const int thread_index = static_cast<int>(thread_index_in_threadgroup);
  const int lane_index = static_cast<int>(thread_index_in_simdgroup);
  const int head_index = static_cast<int>(threadgroup_position_in_grid.y);
  const int sequence = static_cast<int>(threadgroup_position_in_grid.z);
  int block = static_cast<int>(threadgroup_position_in_grid.x);
  int column_of_grid = 0;
#ifdef LANES
  column_of_grid = block % STRIDE;
  block = block / STRIDE;
#endif
  const Head head = head_of(plan, head_index, column_of_grid);
#ifdef FAR_KEYS
  const bool is_far = true;
  const int keys_end = (S - head.first + STRIDE - 1) / STRIDE * SUMMARY;  // the last row's may lie behind the end
#endif
#ifdef NEAR_KEYS
  const bool is_far = false;
  const int keys_end = S;
#endif
  const int keys_begin = block * ROWS;
  if (keys_begin >= keys_end) {
    return;
  }

  const int first_row = keys_begin + static_cast<int>(simdgroup_index_in_threadgroup) * 16;
  const int rows[2] = {first_row + tile_row(lane_index), first_row + tile_row(lane_index) + 8};
  const int column = tile_column(lane_index);
  int at[2];
  bool has[2];
  #pragma unroll
  for (int r = 0; r < 2; ++r) {
    at[r] = key_position(head, metal::min(rows[r], keys_end - 1), is_far);
    has[r] = rows[r] < keys_end && at[r] < S;
    at[r] = metal::min(at[r], S - 1);
  }
  const size_t of_owner = static_cast<size_t>(sequence * keys_shape[1] + head.owner) * static_cast<size_t>(S);
  const size_t from_upper = (of_owner + static_cast<size_t>(at[0])) * HEAD_DIM;
  const size_t from_lower = (of_owner + static_cast<size_t>(at[1])) * HEAD_DIM;
  const size_t of_head = static_cast<size_t>(sequence * H + head_index);

  Left key[PARTS];
  Left value[PARTS];
  float d_key[PARTS * 8];
  float d_value[PARTS * 8];
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    key[d] = left_of(keys + from_upper, keys + from_lower, d * 16 + column);
    value[d] = left_of(values + from_upper, values + from_lower, d * 16 + column);
  }
  #pragma unroll
  for (int d = 0; d < PARTS * 8; ++d) {
    d_key[d] = 0.0f;
    d_value[d] = 0.0f;
  }

  const int last = metal::min(keys_begin + ROWS, keys_end) - 1;
  int begin = query_from(head, S - T);
  int end = query_from(head, S);
#ifdef FAR_KEYS
  begin = metal::max(begin, query_from(head, (keys_begin / SUMMARY + GAP + 1) * STRIDE));
  end = head.far ? end : begin;
#endif
#ifdef NEAR_KEYS
  begin = metal::max(begin, keys_begin);
#ifdef WINDOW
  end = metal::min(end, last + STRIDE);
#endif
#ifdef BLOCKS
  end = metal::min(end, (last / STRIDE + GAP + 1) * STRIDE);
#endif
#endif
  threadgroup uint4 query_tile[COLUMNS * (PIECES + 1)];
  threadgroup uint4 d_output_tile[COLUMNS * (PIECES + 1)];
  threadgroup float logs[COLUMNS];
  threadgroup float terms[COLUMNS];
  for (int start = begin; start < end; start += COLUMNS) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int item = thread_index; item < COLUMNS * PIECES; item += 32 * SIMDGROUPS) {
      const int local = start + item / PIECES;
      const bool exists = local < end;
      const size_t row = of_head * static_cast<size_t>(T) + static_cast<size_t>(exists ? query_position(head, local) - (S - T) : 0);
      put(query_tile, item / PIECES, item % PIECES, queries + row * HEAD_DIM, exists);
      put(d_output_tile, item / PIECES, item % PIECES, d_output + row * HEAD_DIM, exists);
      if (item % PIECES == 0) {
        logs[item / PIECES] = exists ? log_normalizer[row] : 0.0f;
        terms[item / PIECES] = exists ? constants[row] : 0.0f;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int n = 0; n < COLUMNS / 16; ++n) {
      const int slice = start + n * 16;
      const int low = query_position(head, slice);
      const int high = query_position(head, slice + 15);
      if (slice >= end || sees_none(low, high, first_row, first_row + 15, is_far)) {
        continue;
      }
      const bool whole = slice + 16 <= end && sees_all(head, low, high, first_row, first_row + 15, is_far);
      const threadgroup Element* query_rows = tile_rows(query_tile, n * 16);
      const threadgroup Element* d_output_rows = tile_rows(d_output_tile, n * 16);
      float score[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      float d_weight[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      #pragma unroll
      for (int d = 0; d < PARTS; ++d) {
        multiply(score, key[d], right_of_rows(query_rows + d * 16, lane_index));
        multiply(d_weight, value[d], right_of_rows(d_output_rows + d * 16, lane_index));
      }
      #pragma unroll
      for (int x = 0; x < 8; ++x) {
        const int r = x / 2 % 2;
        const int c = n * 16 + x / 4 * 8 + column + x % 2;
        bool visible = true;
        if (!whole) {
          const int local = start + c;
          visible = local < end && sees(head, query_position(head, local), is_far ? rows[r] : at[r], is_far);
        }
        score[x] = metal::fast::exp(visible ? metal::fma(score[x], SCALE, -logs[c]) : NEVER);
        d_weight[x] = score[x] * (d_weight[x] + terms[c]) * SCALE;
      }
      const Left weights = narrow(score);
      const Left d_score = narrow(d_weight);
      #pragma unroll
      for (int d = 0; d < PARTS; ++d) {
        multiply(d_value + d * 8, weights, right_of_columns(d_output_rows + d * 16, lane_index));
        multiply(d_key + d * 8, d_score, right_of_columns(query_rows + d * 16, lane_index));
      }
    }
  }

  const size_t to[2] = {(of_head * static_cast<size_t>(S) + static_cast<size_t>(at[0])) * HEAD_DIM, (of_head * static_cast<size_t>(S) + static_cast<size_t>(at[1])) * HEAD_DIM};
#ifdef JOIN
  #pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int of_column = at[r] % STRIDE - head.first;
    if (head.far && of_column >= 0 && of_column < SUMMARY) {
      #pragma unroll
      for (int d = 0; d < PARTS * 4; ++d) {
        const size_t from = to[r] + static_cast<size_t>(d / 4 * 16 + d / 2 % 2 * 8 + column + d % 2);
        d_key[d / 2 * 4 + r * 2 + d % 2] += far_d_keys[from];
        d_value[d / 2 * 4 + r * 2 + d % 2] += far_d_values[from];
      }
    }
  }
#endif
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    write(d_keys + to[0], d_keys + to[1], d_key + d * 8, d * 16 + column, has[0], has[1]);
    write(d_values + to[0], d_values + to[1], d_value + d * 8, d * 16 + column, has[0], has[1]);
  }
