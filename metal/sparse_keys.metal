  // The gradients of keys and values [B, H, S, D], a copy for each query head: of far keys (FAR_KEYS), where they lie, or of all others,
  // which then take in what was found for the far ones. grid = (32 * SIMDGROUPS * blocks of keys, H, B), or so many blocks a column.
  // A simdgroup sums both gradients of 16 keys (SUMS = 2), or, where registers are few, one of two simdgroups the values' and the other
  // the keys' (SUMS = 1).
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

  const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
  const int half_of = SUMS == 2 ? 0 : simdgroup % 2;
  const int first_row = keys_begin + simdgroup * SUMS / 2 * 16;
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

#ifdef IN_REGISTERS
  const bool keeps = true;
  Left key[PARTS];
  Left value[PARTS];
#endif
#ifdef IN_THREADGROUP
  const bool keeps = half_of == 0;  // both read what one of the two writes
  threadgroup uint4 parts[ROWS / 16 * 2 * PARTS * 32];
  threadgroup uint4* key = parts + simdgroup * SUMS / 2 * (2 * PARTS * 32);
  threadgroup uint4* value = key + PARTS * 32;
#endif
  float sums[SUMS * PARTS * 8];
  #pragma unroll
  for (int d = 0; d < PARTS; ++d) {
    if (keeps) {
      keep(key, d, lane_index, left_of(keys + from_upper, keys + from_lower, d * 16 + column));
      keep(value, d, lane_index, left_of(values + from_upper, values + from_lower, d * 16 + column));
    }
  }
  #pragma unroll
  for (int d = 0; d < SUMS * PARTS * 8; ++d) {
    sums[d] = 0.0f;
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
        multiply(score, kept(key, d, lane_index), right_of_rows(query_rows + d * 16, lane_index));
        if (SUMS == 2 || half_of == 1) {
          multiply(d_weight, kept(value, d, lane_index), right_of_rows(d_output_rows + d * 16, lane_index));
        }
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
      Left left[SUMS];
      #pragma unroll
      for (int n_sum = 0; n_sum < SUMS; ++n_sum) {
        #pragma unroll
        for (int x = 0; x < 8; ++x) {
          score[x] = n_sum + half_of == 1 ? d_weight[x] : score[x];
        }
        left[n_sum] = narrow(score);
      }
      #pragma unroll
      for (int d = 0; d < PARTS; ++d) {
        #pragma unroll
        for (int n_sum = 0; n_sum < SUMS; ++n_sum) {
          const threadgroup Element* right_rows = n_sum + half_of == 1 ? query_rows : d_output_rows;
          multiply(sums + (n_sum * PARTS + d) * 8, left[n_sum], right_of_columns(right_rows + d * 16, lane_index));
        }
      }
    }
  }

  const size_t to[2] = {(of_head * static_cast<size_t>(S) + static_cast<size_t>(at[0])) * HEAD_DIM, (of_head * static_cast<size_t>(S) + static_cast<size_t>(at[1])) * HEAD_DIM};
  #pragma unroll
  for (int n_sum = 0; n_sum < SUMS; ++n_sum) {
    const bool of_keys = n_sum + half_of == 1;
    thread float* sum = sums + n_sum * PARTS * 8;
#ifdef JOIN
    const device float* far_sums = of_keys ? far_d_keys : far_d_values;
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int of_column = at[r] % STRIDE - head.first;
      if (head.far && of_column >= 0 && of_column < SUMMARY) {
        #pragma unroll
        for (int d = 0; d < PARTS * 4; ++d) {
          sum[d / 2 * 4 + r * 2 + d % 2] += far_sums[to[r] + static_cast<size_t>(d / 4 * 16 + d / 2 % 2 * 8 + column + d % 2)];
        }
      }
    }
#endif
    device float* into = of_keys ? d_keys : d_values;
    #pragma unroll
    for (int d = 0; d < PARTS; ++d) {
      write(into + to[0], into + to[1], sum + d * 8, d * 16 + column, has[0], has[1]);
    }
  }
