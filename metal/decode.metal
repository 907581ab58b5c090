// A decode step of one layer. Every threadgroup reads one slice of one kind of work of one KV head and leaves a partial
// result for each query row; merging the partials of a row gives its attention output. Rows of a KV head are numbered
// (b * group + g) * length + t: sequence, query head of the group, query token.

// Finite stand-in for -inf: exp(NEVER - x) is 0 in every math mode.
constant constexpr float NEVER = -3.0e38f;

// Kinds of work. A threadgroup's plan entry is (KV head, kind, rows, first word of its parameters).
constant constexpr int NODES = 0;        // keys, values; bias
constant constexpr int GATED = 1;        // gate, up, out; (b_gate, b_up, w_score)
constant constexpr int PLAIN = 2;        // in, out; b_in
constant constexpr int SCORE = 3;        // in; (b_in, w_score)
constant constexpr int LINEAR = 4;       // rows of a linear map; the column each one yields (HEAD_DIM: the log-normaliser)
constant constexpr int GIVEN = 5;        // out; the index of the activation
constant constexpr int GIVEN_SCORE = 6;  // none; (index of the activation, w_score)
constant constexpr int LIVE = 7;

constant constexpr int SEQUENCE_ROWS = QUERY_HEADS * LENGTH;  // query rows of a KV head and sequence

METAL_FUNC int slices_of(int live) {
  return metal::min((live + LIVE_SLICE - 1) / LIVE_SLICE, MAX_SLICES);
}

#ifdef READS
// What one lane knows of its simdgroup's query rows: its eight columns of each query and of each running output.
struct Tile {
#ifdef LATE_QUERIES
  typename Row<Element>::Raw raw[TILE];  // the queries as they were loaded
  float factor[TILE];                    // of the queries: the attention scale, or 0 for a lane without columns
#endif
  float q[TILE * 8];
  float out[TILE * 8];
  float top[TILE];  // largest score so far
  float sum[TILE];  // of exp(score - top); for hidden units, what they add to the log-normaliser
#ifdef OFFSETS
  float offset[8];  // what the keys of this KV head are relative to, this lane's columns of it
#endif
  int end[TILE];    // first row that the query does not see
};

struct Lane {
  int part;   // which eight columns
  int first;  // first row of the slice that is this lane group's
  int step;   // rows that all lane groups of the tile read at once
};

METAL_FUNC void widen_query(thread Tile& tile, int n, typename Row<Element>::Raw raw, float factor) {
  Row<Element>::widen(raw, tile.q + n * 8);
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    tile.q[n * 8 + i] = factor > 0.0f ? factor * tile.q[n * 8 + i] : 0.0f;
  }
}

#ifdef LATE_QUERIES
// The first rows are asked for before the queries are used, so that one wait serves both. It takes more registers.
METAL_FUNC void widen_queries(thread Tile& tile) {
  #pragma unroll
  for (int n = 0; n < TILE; ++n) {
    widen_query(tile, n, tile.raw[n], tile.factor[n]);
  }
}
#endif

METAL_FUNC Matrix matrix_at(const device uint* words, int rows) {
  Matrix m;
  m.words = words;
  m.stride = static_cast<size_t>(ROW_WORDS);
  m.scales = reinterpret_cast<const device half*>(words + static_cast<size_t>(rows) * ROW_WORDS);
  return m;
}

// Words of a matrix of so many rows with its scales, up to the next multiple of 16 bytes.
METAL_FUNC int matrix_words(int rows) {
  return (rows * ROW_WORDS + (rows * ROW_SCALES + 1) / 2 + 3) / 4 * 4;
}

// Online softmax attention over rows [begin, end): of nodes, which have biases, or of live tokens, whose keys are absolute.
template <typename Stored, int DEPTH>
METAL_FUNC void attend(thread Tile& tile, Lane lane, Matrix keys, Matrix values, const device float* bias, bool biased, int begin, int end) {
  for (int base = begin; base < end; base += lane.step * DEPTH) {
    typename Row<Stored>::Raw key[DEPTH];
    typename Row<Stored>::Raw value[DEPTH];
    float score[DEPTH * TILE];
    float offset[DEPTH];
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const int row = metal::min(base + u * lane.step + lane.first, end - 1);
      key[u] = Row<Stored>::fetch(keys, row, lane.part);
      offset[u] = biased ? bias[row] : 0.0f;
    }
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const int row = metal::min(base + u * lane.step + lane.first, end - 1);
      value[u] = Row<Stored>::fetch(values, row, lane.part);
    }
#ifdef LATE_QUERIES
    if (base == begin) {
      widen_queries(tile);
    }
#endif
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      float x[8];
      const float factor = Row<Stored>::widen(key[u], x);
#ifdef OFFSETS
      if (!biased) {  // before the product, which could be too large to tell keys apart
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
          x[i] -= tile.offset[i];
        }
      }
#endif
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        score[u * TILE + n] = factor * dot8(tile.q + n * 8, x);
      }
    }
    row_sums<DEPTH * TILE>(score);
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const int row = base + u * lane.step + lane.first;
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        score[u * TILE + n] = row < tile.end[n] ? score[u * TILE + n] + offset[u] : NEVER;
      }
    }
    #pragma unroll
    for (int n = 0; n < TILE; ++n) {
      float top = tile.top[n];
      #pragma unroll
      for (int u = 0; u < DEPTH; ++u) {
        top = metal::max(top, score[u * TILE + n]);
      }
      const float keep = metal::fast::exp(tile.top[n] - top);
      tile.top[n] = top;
      tile.sum[n] *= keep;
      #pragma unroll
      for (int i = 0; i < 8; ++i) {
        tile.out[n * 8 + i] *= keep;
      }
      #pragma unroll
      for (int u = 0; u < DEPTH; ++u) {
        const bool seen = base + u * lane.step + lane.first < tile.end[n];
        score[u * TILE + n] = seen ? metal::fast::exp(score[u * TILE + n] - top) : 0.0f;
        tile.sum[n] += score[u * TILE + n];
      }
    }
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      float x[8];
      const float factor = Row<Stored>::widen(value[u], x);
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        const float weight = factor * score[u * TILE + n];
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
          tile.out[n * 8 + i] = metal::fma(weight, x[i], tile.out[n * 8 + i]);
        }
      }
    }
  }
}

#ifdef UNITS
METAL_FUNC float silu(float x) {
  return x / (1.0f + metal::fast::exp(metal::min(-x, 80.0f)));
}

// Units [0, rows) of a network: what each one adds to the output and to the log-normaliser.
// activations: [query rows, n_activations] of this KV head, for the kinds that are given them.
template <typename Stored, int KIND, int DEPTH>
METAL_FUNC void units(thread Tile& tile, Lane lane, const device uint* words, int rows, const device float* activations, int n_activations, int tile_row, int n_rows) {
  constexpr bool has_in = KIND != GIVEN && KIND != GIVEN_SCORE;
  constexpr bool has_out = KIND == GATED || KIND == PLAIN || KIND == GIVEN;
  constexpr int numbers = KIND == GATED ? 3 : (KIND == SCORE || KIND == GIVEN_SCORE ? 2 : 1);
  const int words_each = matrix_words(rows);
  const int n_matrices = KIND == GATED ? 3 : (KIND == PLAIN ? 2 : (KIND == GIVEN_SCORE ? 0 : 1));
  const Matrix in = matrix_at(words, rows);
  const Matrix up = matrix_at(words + words_each, rows);
  const Matrix out = matrix_at(words + words_each * (has_out ? n_matrices - 1 : 0), rows);
  const device float* scalars = reinterpret_cast<const device float*>(words + words_each * n_matrices);
  for (int base = 0; base < rows; base += lane.step * DEPTH) {
    typename Row<Stored>::Raw in_raw[DEPTH];
    typename Row<Stored>::Raw up_raw[DEPTH];
    typename Row<Stored>::Raw out_raw[DEPTH];
    float scalar[DEPTH * numbers];
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const int row = metal::min(base + u * lane.step + lane.first, rows - 1);
      if (has_in) {
        in_raw[u] = Row<Stored>::fetch(in, row, lane.part);
      }
      if (KIND == GATED) {
        up_raw[u] = Row<Stored>::fetch(up, row, lane.part);
      }
      if (has_out) {
        out_raw[u] = Row<Stored>::fetch(out, row, lane.part);
      }
      #pragma unroll
      for (int i = 0; i < numbers; ++i) {
        scalar[u * numbers + i] = scalars[row * numbers + i];
      }
    }
#ifdef LATE_QUERIES
    if (base == 0 && has_in) {
      widen_queries(tile);
    }
#endif
    float hidden[DEPTH * TILE];
    float second[DEPTH * TILE];
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      float x[8];
      if (has_in) {
        const float factor = Row<Stored>::widen(in_raw[u], x);
        #pragma unroll
        for (int n = 0; n < TILE; ++n) {
          hidden[u * TILE + n] = factor * dot8(tile.q + n * 8, x);
        }
      }
      if (KIND == GATED) {
        const float factor = Row<Stored>::widen(up_raw[u], x);
        #pragma unroll
        for (int n = 0; n < TILE; ++n) {
          second[u * TILE + n] = factor * dot8(tile.q + n * 8, x);
        }
      }
    }
    if (has_in) {
      row_sums<DEPTH * TILE>(hidden);
    }
    if (KIND == GATED) {
      row_sums<DEPTH * TILE>(second);
    }
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const bool valid = base + u * lane.step + lane.first < rows;
      const thread float* s = scalar + u * numbers;
      float weight = 0.0f;  // in the log-normaliser
      float x[8];
      float factor = 1.0f;
      if (KIND == GATED || KIND == SCORE || KIND == GIVEN_SCORE) {
        weight = s[numbers - 1];
      }
      if (has_out) {
        factor = Row<Stored>::widen(out_raw[u], x);
      }
      if (KIND == LINEAR) {
        weight = s[0] == static_cast<float>(HEAD_DIM) ? 1.0f : 0.0f;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
          x[i] = s[0] == static_cast<float>(lane.part * 8 + i) ? 1.0f : 0.0f;
        }
      }
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        float h = hidden[u * TILE + n];
        if (!has_in) {
          const int row = metal::min(tile_row + n, n_rows - 1);
          h = activations[static_cast<size_t>(row) * static_cast<size_t>(n_activations) + static_cast<size_t>(s[0])];
        } else if (KIND != LINEAR) {
          h = silu(h + s[0]);
        }
        if (KIND == GATED) {
          h *= second[u * TILE + n] + s[1];
        }
        h = valid ? h : 0.0f;
        tile.sum[n] = metal::fma(h, weight, tile.sum[n]);
        if (has_out || KIND == LINEAR) {
          #pragma unroll
          for (int i = 0; i < 8; ++i) {
            tile.out[n * 8 + i] = metal::fma(h * factor, x[i], tile.out[n * 8 + i]);
          }
        }
      }
    }
  }
}
#endif

// Merges the lane groups of a simdgroup: afterwards every one of them holds the whole.
METAL_FUNC void merge_lane_groups(thread Tile& tile) {
  #pragma unroll
  for (int n = 0; n < TILE; ++n) {
    #pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      const float top = metal::max(tile.top[n], simd_shuffle_xor(tile.top[n], static_cast<ushort>(step)));
      const float keep = metal::fast::exp(tile.top[n] - top);
      tile.top[n] = top;
      tile.sum[n] *= keep;
      tile.sum[n] += simd_shuffle_xor(tile.sum[n], static_cast<ushort>(step));
      #pragma unroll
      for (int i = 0; i < 8; ++i) {
        tile.out[n * 8 + i] *= keep;
        tile.out[n * 8 + i] += simd_shuffle_xor(tile.out[n * 8 + i], static_cast<ushort>(step));
      }
    }
  }
}
#endif

// A partial result is HEAD_DIM / 4 vectors and two numbers (largest score, sum). Vector v of a row holds columns
// 8 * (v % PARTS) + 4 * (v / PARTS) and the next three: so lanes write side by side.
METAL_FUNC size_t partial_count(int rows, int slices, int n_static) {
  return static_cast<size_t>(n_static + N_KV_HEADS * slices) * static_cast<size_t>(rows);
}

METAL_FUNC int column_of(int v) {
  return 8 * (v % PARTS) + 4 * (v / PARTS);
}

METAL_FUNC float4 scaled_sum(float a, float4 x, float4 y) {
  float4 z;
  z.x = metal::fma(a, x.x, y.x);
  z.y = metal::fma(a, x.y, y.y);
  z.z = metal::fma(a, x.z, y.z);
  z.w = metal::fma(a, x.w, y.w);
  return z;
}

METAL_FUNC float4 zero4() {
  float4 z;
  z.x = 0.0f;
  z.y = 0.0f;
  z.z = 0.0f;
  z.w = 0.0f;
  return z;
}

#ifdef MERGES
// One threadgroup merges the partial results of query rows [start, stop) of a head, SHARES simdgroups a row.
// mine: the head's (first block, end of its node blocks, end of its blocks, word of its constants).
METAL_FUNC void merge_rows(int rows, int slices, uint4 mine, int n_static, const device uint* parameters, const device float* partials, device Element* output, threadgroup float4* sums, int head, int start, int stop, int thread_index) {
  const int lane = thread_index % 32;
  const int simdgroup = thread_index / 32;
  const int part = simdgroup % SHARES;
  const int first = static_cast<int>(mine.x);
  const int n_nodes = static_cast<int>(mine.y) - first;
  const int n_far = static_cast<int>(mine.z) - first;
  const int n_all = n_far + slices;
  const int first_live = n_static + head * slices - n_far;
  const device float4* vectors = reinterpret_cast<const device float4*>(partials);
  const device float* numbers = partials + partial_count(rows, slices, n_static) * HEAD_DIM;
  const device float* constants = reinterpret_cast<const device float*>(parameters + mine.w);
  const float b_score = HAS_UNITS ? constants[HEAD_DIM] : 0.0f;

  for (; start < stop; start += SIMDGROUPS / SHARES) {
    const int row = metal::min(start + simdgroup / SHARES, stop - 1);
    // The first vectors and statistics are asked for together.
    float4 ahead[AHEAD];
    #pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int j = metal::min(part + SHARES * i, n_all - 1);
      const int index = ((j < n_far ? first : first_live) + j) * rows + row;
      ahead[i] = vectors[index * VECTORS + metal::min(lane, VECTORS - 1)];
    }
    const int own = metal::min(lane, n_all - 1);
    const int own_index = ((own < n_far ? first : first_live) + own) * rows + row;
    const float own_top = numbers[own_index * 2];
    const float own_sum = numbers[own_index * 2 + 1];

    // Of this lane's partial results: the largest scores of nodes and of live tokens, what the units add to L; then the sums under
    // those scores. Reductions go side by side: each alone is a chain of waits.
    float found[3];
    found[0] = lane < n_nodes ? own_top : NEVER;
    found[1] = lane >= n_far && lane < n_all ? own_top : NEVER;
    found[2] = lane >= n_nodes && lane < n_far ? own_sum : 0.0f;
    for (int j = lane + 32; j < n_all; j += 32) {
      const int index = ((j < n_far ? first : first_live) + j) * rows + row;
      const float top = numbers[index * 2];
      found[0] = j < n_nodes ? metal::max(found[0], top) : found[0];
      found[1] = j < n_far ? found[1] : metal::max(found[1], top);
      found[2] += j >= n_nodes && j < n_far ? numbers[index * 2 + 1] : 0.0f;
    }
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      found[0] = metal::max(found[0], simd_shuffle_xor(found[0], static_cast<ushort>(step)));
      found[1] = metal::max(found[1], simd_shuffle_xor(found[1], static_cast<ushort>(step)));
      if (HAS_UNITS) {
        found[2] += simd_shuffle_xor(found[2], static_cast<ushort>(step));
      }
    }
    const float node_top = found[0];
    const float live_top = found[1];
    float mass[2];
    mass[0] = lane < n_nodes ? own_sum * metal::fast::exp(own_top - node_top) : 0.0f;
    mass[1] = lane >= n_far && lane < n_all ? own_sum * metal::fast::exp(own_top - live_top) : 0.0f;
    for (int j = lane + 32; j < n_all; j += 32) {
      const int index = ((j < n_far ? first : first_live) + j) * rows + row;
      const float top = numbers[index * 2];
      const float sum = numbers[index * 2 + 1];
      if (j < n_nodes) {
        mass[0] = metal::fma(sum, metal::fast::exp(top - node_top), mass[0]);
      } else if (j >= n_far) {
        mass[1] = metal::fma(sum, metal::fast::exp(top - live_top), mass[1]);
      }
    }
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      mass[0] += simd_shuffle_xor(mass[0], static_cast<ushort>(step));
      mass[1] += simd_shuffle_xor(mass[1], static_cast<ushort>(step));
    }

    // Without nodes a network's own log-normaliser is all there is: as if one node had score 0.
    const float far_top = (HAS_NODES ? node_top : 0.0f) + found[2] + b_score;
    const float top = metal::max(far_top, live_top);
    const float far_scale = metal::fast::exp(far_top - top);
    const float live_scale = metal::fast::exp(live_top - top);
    const float far_mass = far_scale * (HAS_NODES ? mass[0] : 1.0f);
    const float all_mass = metal::fma(live_scale, mass[1], far_mass);
    const float share = all_mass > 0.0f ? 1.0f / all_mass : 0.0f;  // a row of padding may see nothing
    const float far_share = far_mass * share;
    const float node_share = far_scale * share;
    const float live_share = live_scale * share;

    for (int base = 0; base < VECTORS; base += 32) {
      const int v = metal::min(base + lane, VECTORS - 1);
      float4 sum = zero4();
      if (HAS_UNITS && part == 0) {
        sum = scaled_sum(far_share, *reinterpret_cast<const device float4*>(constants + column_of(v)), sum);
      }
      for (int from = 0; from < n_all; from += 32) {
        const int j = metal::min(from + lane, n_all - 1);
        const float top_of_j = from == 0 ? own_top : numbers[(((j < n_far ? first : first_live) + j) * rows + row) * 2];
        float weight = live_share * metal::fast::exp(top_of_j - live_top);
        weight = j < n_far ? far_share : weight;
        weight = j < n_nodes ? node_share * metal::fast::exp(top_of_j - node_top) : weight;
        const int end = metal::min(32, n_all - from);
        for (int k = part; k < end; k += SHARES * AHEAD) {
          if (from + k > part || base > 0) {
            #pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
              const int other = metal::min(from + k + SHARES * i, n_all - 1);
              ahead[i] = vectors[(((other < n_far ? first : first_live) + other) * rows + row) * VECTORS + v];
            }
          }
          #pragma unroll
          for (int i = 0; i < AHEAD; ++i) {
            const float w = simd_shuffle(weight, static_cast<ushort>(metal::min(k + SHARES * i, 31)));
            sum = scaled_sum(k + SHARES * i < end ? w : 0.0f, ahead[i], sum);
          }
        }
      }
      if (base + lane < VECTORS) {
        sums[simdgroup * VECTORS + v] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int within = metal::min(SIMDGROUPS / SHARES, stop - start);
    for (int at = thread_index; at < within * VECTORS; at += 32 * SIMDGROUPS) {
      const int v = at % VECTORS;
      const int r = at / VECTORS;
      float4 sum = sums[r * SHARES * VECTORS + v];
      #pragma unroll
      for (int s = 1; s < SHARES; ++s) {
        sum = scaled_sum(1.0f, sums[(r * SHARES + s) * VECTORS + v], sum);
      }
      const int sequence = (start + r) / SEQUENCE_ROWS;
      const int of = (sequence * N_KV_HEADS + head) * SEQUENCE_ROWS + (start + r) % SEQUENCE_ROWS;
      device Element* to = output + static_cast<size_t>(of) * HEAD_DIM + static_cast<size_t>(column_of(v));
      to[0] = static_cast<Element>(sum.x);
      to[1] = static_cast<Element>(sum.y);
      to[2] = static_cast<Element>(sum.z);
      to[3] = static_cast<Element>(sum.w);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
#endif
