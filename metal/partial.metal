  // grid = (32 * SIMDGROUPS * blocks, rounds, 1), threadgroup = (32 * SIMDGROUPS, 1, 1). Blocks: n_kv_heads * slices of live
  // tokens, then those of the plan. live_tokens says by its shape how many tokens are live, and is not read.
  using namespace nectar;
  const int rows = static_cast<int>(queries_shape[0]) * SEQUENCE_ROWS;
  const int live = static_cast<int>(live_tokens_shape[0]);
  const int slices = slices_of(live);
  const int live_blocks = N_KV_HEADS * slices;
  const int block = static_cast<int>(threadgroup_position_in_grid.x) - live_blocks;
  const int round = static_cast<int>(threadgroup_position_in_grid.y);
  const int n_static = static_cast<int>(threadgroups_per_grid.x) - live_blocks;
  // Asked for first, since all else waits for it; what does not wait is computed meanwhile.
  const device uint4* line = reinterpret_cast<const device uint4*>(parameters + (N_KV_HEADS + metal::max(block, 0)) * 4);
#ifdef HINTS
  const uint4 entry = load_kept(line);
#endif
#ifdef NO_HINTS
  const uint4 entry = *line;
#endif
  const int thread_index = static_cast<int>(thread_index_in_threadgroup);
  const int lane_index = static_cast<int>(thread_index_in_simdgroup);
  const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);

#ifdef HINTS
  // Every threadgroup asks for its share of the parameters, about, before it knows which are its own.
  if (block >= 0) {
    const uint quads = static_cast<uint>(parameters_shape[0]) / 4u;
    const uint each = quads / static_cast<uint>(n_static) + 1u;
    const uint from = metal::min(each * static_cast<uint>(block), quads);
    prefetch(parameters + static_cast<size_t>(from) * 4, (metal::min(from + each, quads) - from) * 16u, thread_index, 32 * SIMDGROUPS);
  }
#endif

  Lane lane;
  lane.part = metal::min(lane_index % LANES, PARTS - 1);
  lane.step = (SIMDGROUPS / TILES) * (32 / LANES);
  lane.first = (simdgroup / TILES) * (32 / LANES) + lane_index / LANES;
  const int tile_row = (round * TILES + simdgroup % TILES) * TILE;

  Tile tile;
  size_t at[TILE];  // of the query of the first KV head
  #pragma unroll
  for (int n = 0; n < TILE; ++n) {
    const int row = metal::min(tile_row + n, rows - 1);
    at[n] = static_cast<size_t>(row / SEQUENCE_ROWS) * static_cast<size_t>(queries_strides[0])
        + static_cast<size_t>(row % SEQUENCE_ROWS / LENGTH) * static_cast<size_t>(queries_strides[1])
        + static_cast<size_t>(row % LENGTH) * static_cast<size_t>(queries_strides[2]);
    tile.sum[n] = 0.0f;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      tile.out[n * 8 + i] = 0.0f;
    }
  }

  int begin = 0;
  int end = static_cast<int>(entry.z);
  int unit = block;
  int head = static_cast<int>(entry.x);
  if (block < 0) {
    const int of = block + live_blocks;
    const int slice = of % slices;
    head = of / slices;
    const int each = (live + slices - 1) / slices;
    begin = metal::min(live, slice * each);
    end = metal::min(live, begin + each);
    unit = n_static + head * slices + slice;
  }
  const int kind = block < 0 ? LIVE : static_cast<int>(entry.y);
#ifdef ONE_LAUNCH
  const uint4 mine = *reinterpret_cast<const device uint4*>(parameters + head * 4);
#endif
  const bool scored = kind == NODES || kind == LIVE;
  const device Element* of_head = queries + static_cast<size_t>(head * QUERY_HEADS) * static_cast<size_t>(queries_strides[1]);
  #pragma unroll
  for (int n = 0; n < TILE; ++n) {
    Matrix query;
    query.words = reinterpret_cast<const device uint*>(of_head + at[n]);
    query.stride = 0;
    query.scales = reinterpret_cast<const device half*>(parameters);
    const bool valid = tile_row + n < rows && lane_index % LANES < PARTS;
    const float factor = !valid ? 0.0f : (scored ? SCALE : 1.0f);
#ifdef LATE_QUERIES
    tile.raw[n] = Row<Element>::fetch(query, 0, lane.part);
    tile.factor[n] = factor;
#endif
#ifdef EARLY_QUERIES
    widen_query(tile, n, Row<Element>::fetch(query, 0, lane.part), factor);
#endif
    tile.top[n] = scored ? NEVER : 0.0f;
    tile.end[n] = end;
  }

  if (kind == LIVE) {
#ifdef OFFSETS
    // Behind the plan. Without a look into the table of heads: it would have to be waited for.
    const device float* offset = reinterpret_cast<const device float*>(parameters + (N_KV_HEADS + n_static) * 4) + head * HEAD_DIM + lane.part * 8;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      tile.offset[i] = offset[i];
    }
#endif
    // A tile may hold rows of several sequences: each sees its own tokens only.
    const int last_row = metal::min(tile_row + TILE, rows) - 1;
    for (int sequence = tile_row / SEQUENCE_ROWS; sequence * SEQUENCE_ROWS <= last_row; ++sequence) {
      Matrix key;
      Matrix value;
      key.words = reinterpret_cast<const device uint*>(keys + static_cast<size_t>(sequence) * static_cast<size_t>(keys_strides[0]) + static_cast<size_t>(head) * static_cast<size_t>(keys_strides[1]));
      value.words = reinterpret_cast<const device uint*>(values + static_cast<size_t>(sequence) * static_cast<size_t>(values_strides[0]) + static_cast<size_t>(head) * static_cast<size_t>(values_strides[1]));
      key.stride = static_cast<size_t>(keys_strides[2]) * sizeof(Element) / 4;
      value.stride = static_cast<size_t>(values_strides[2]) * sizeof(Element) / 4;
      key.scales = reinterpret_cast<const device half*>(parameters);
      value.scales = key.scales;
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        const int row = tile_row + n;
        tile.end[n] = row / SEQUENCE_ROWS == sequence ? metal::min(end, live - LENGTH + row % LENGTH + 1) : 0;
      }
      int start = begin;
#ifdef PADDED
      start = metal::max(begin, left_padding[sequence]);
#endif
      attend<Element, LIVE_FLIGHT>(tile, lane, key, value, reinterpret_cast<const device float*>(parameters), false, start, end);
    }
  }
  const device uint* words = parameters + static_cast<size_t>(entry.w);
  if (HAS_NODES && kind == NODES) {
    const int each = matrix_words(end);
    attend<Weight, FLIGHT>(tile, lane, matrix_at(words, end), matrix_at(words + each, end), reinterpret_cast<const device float*>(words + 2 * each), true, 0, end);
  }
#ifdef GATED_UNITS
  if (kind == GATED) {
    units<Weight, GATED, (FLIGHT + 1) / 2>(tile, lane, words, end, reinterpret_cast<const device float*>(parameters), 0, tile_row, rows);
  }
#endif
#ifdef NETWORKS
  if (kind == PLAIN) {
    units<Weight, PLAIN, FLIGHT>(tile, lane, words, end, reinterpret_cast<const device float*>(parameters), 0, tile_row, rows);
  }
  if (kind == SCORE) {
    units<Weight, SCORE, FLIGHT>(tile, lane, words, end, reinterpret_cast<const device float*>(parameters), 0, tile_row, rows);
  }
#endif
#ifdef DEEP_NETWORKS
  const int n_activations = activations_shape[2];
  const device float* active = activations + static_cast<size_t>(head) * static_cast<size_t>(rows) * static_cast<size_t>(n_activations);
  if (kind == GIVEN) {
    units<Weight, GIVEN, FLIGHT>(tile, lane, words, end, active, n_activations, tile_row, rows);
  }
  if (kind == GIVEN_SCORE) {
    units<Weight, GIVEN_SCORE, FLIGHT>(tile, lane, words, end, active, n_activations, tile_row, rows);
  }
#endif
#ifdef LINEAR_UNITS
  if (kind == LINEAR) {
    units<Weight, LINEAR, FLIGHT>(tile, lane, words, end, reinterpret_cast<const device float*>(parameters), 0, tile_row, rows);
  }
#endif
  merge_lane_groups(tile);

  // Merge the simdgroups that share a tile, ROUND query rows at a time to stay within the threadgroup memory.
  threadgroup float4 tile_out[SIMDGROUPS * ROUND * VECTORS];
  threadgroup float tile_top[SIMDGROUPS * TILE];
  threadgroup float tile_sum[SIMDGROUPS * TILE];
  device float4* vectors = reinterpret_cast<device float4*>(partials);
  device float* numbers = partials + partial_count(rows, slices, n_static) * HEAD_DIM;
  #pragma unroll
  for (int start = 0; start < TILE; start += ROUND) {
    if (start > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    #pragma unroll
    for (int j = 0; j < ROUND; ++j) {
      if (start + j < TILE && lane_index < PARTS) {
        const int n = start + j;
        float4 low;
        float4 high;
        low.x = tile.out[n * 8];
        low.y = tile.out[n * 8 + 1];
        low.z = tile.out[n * 8 + 2];
        low.w = tile.out[n * 8 + 3];
        high.x = tile.out[n * 8 + 4];
        high.y = tile.out[n * 8 + 5];
        high.z = tile.out[n * 8 + 6];
        high.w = tile.out[n * 8 + 7];
        tile_out[(simdgroup * ROUND + j) * VECTORS + lane_index] = low;
        tile_out[(simdgroup * ROUND + j) * VECTORS + PARTS + lane_index] = high;
        if (lane_index == 0) {
          tile_top[simdgroup * TILE + n] = tile.top[n];
          tile_sum[simdgroup * TILE + n] = tile.sum[n];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int item = thread_index; item < TILES * ROUND * VECTORS; item += 32 * SIMDGROUPS) {
      const int v = item % VECTORS;
      const int j = item / VECTORS % ROUND;
      const int of = item / VECTORS / ROUND;
      const int row = (round * TILES + of) * TILE + start + j;
      if (start + j < TILE && row < rows) {
        float top = NEVER;
        #pragma unroll
        for (int i = 0; i < SIMDGROUPS / TILES; ++i) {
          top = metal::max(top, tile_top[(of + i * TILES) * TILE + start + j]);
        }
        float sum = 0.0f;
        float4 out = zero4();
        #pragma unroll
        for (int i = 0; i < SIMDGROUPS / TILES; ++i) {
          const int s = of + i * TILES;
          const float weight = metal::fast::exp(tile_top[s * TILE + start + j] - top);
          sum = metal::fma(weight, tile_sum[s * TILE + start + j], sum);
          out = scaled_sum(weight, tile_out[(s * ROUND + j) * VECTORS + v], out);
        }
        const size_t index = static_cast<size_t>(unit) * static_cast<size_t>(rows) + static_cast<size_t>(row);
        vectors[index * VECTORS + static_cast<size_t>(v)] = out;
        if (v == 0) {
          numbers[index * 2] = top;
          numbers[index * 2 + 1] = sum;
        }
      }
    }
  }

#ifdef ONE_LAUNCH
  // The threadgroup that arrives last at a KV head merges its rows. Needs a memory fence between threadgroups, which CUDA has.
  threadgroup int is_last[1];
  const int arrivals = (static_cast<int>(mine.z - mine.x) + slices) * static_cast<int>(threadgroups_per_grid.y);
  if (arrives_last(arrival_counters + head, arrivals, thread_index, is_last)) {
    merge_rows(rows, slices, mine, n_static, parameters, partials, output, tile_out, head, 0, rows, thread_index);
  }
#endif
