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

struct Problem {
  int batch;
  int n_kv_heads;
  int group;   // query heads of a KV head
  int length;  // query tokens
  int live;    // live tokens
  int slices;  // of the live tokens
};

METAL_FUNC Problem problem(int batch, int n_heads, int length, int n_kv_heads, int live) {
  Problem p;
  p.batch = batch;
  p.n_kv_heads = n_kv_heads;
  p.group = n_heads / n_kv_heads;
  p.length = length;
  p.live = live;
  p.slices = metal::min((live + LIVE_SLICE - 1) / LIVE_SLICE, MAX_SLICES);
  return p;
}

// Simdgroups side by side that hold different query rows and read the same weights: a power of two.
METAL_FUNC int tiles_of(int rows) {
  int tiles = 1;
  while (tiles < SIMDGROUPS && tiles * TILE < rows) {
    tiles *= 2;
  }
  return tiles;
}

METAL_FUNC int rounds_of(int rows) {
  const int at_once = tiles_of(rows) * TILE;
  return (rows + at_once - 1) / at_once;
}

// What one lane knows of its simdgroup's query rows: its eight columns of each query and of each running output.
struct Tile {
  float q[TILE * 8];
  float out[TILE * 8];
  float top[TILE];  // largest score so far
  float sum[TILE];  // of exp(score - top); for hidden units, what they add to the log-normaliser
  int end[TILE];    // first row that the query does not see
};

struct Lane {
  int part;   // which eight columns
  int first;  // first row of the slice that is this lane group's
  int step;   // rows that all lane groups of the tile read at once
};

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

// Online softmax attention over rows [begin, end).
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
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      float x[8];
      const float factor = Row<Stored>::widen(key[u], x);
      const int row = base + u * lane.step + lane.first;
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        const float s = row_sum(factor * dot8(tile.q + n * 8, x)) + offset[u];
        score[u * TILE + n] = row < tile.end[n] ? s : NEVER;
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
    #pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const bool valid = base + u * lane.step + lane.first < rows;
      const thread float* s = scalar + u * numbers;
      float hidden[TILE];
      float x[8];
      float factor = 0.0f;
      if (has_in) {
        factor = Row<Stored>::widen(in_raw[u], x);
      }
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        if (has_in) {
          hidden[n] = row_sum(factor * dot8(tile.q + n * 8, x));
          hidden[n] = KIND == LINEAR ? hidden[n] : silu(hidden[n] + s[0]);
        } else {
          hidden[n] = activations[static_cast<size_t>(metal::min(tile_row + n, n_rows - 1)) * static_cast<size_t>(n_activations) + static_cast<size_t>(s[0])];
        }
      }
      if (KIND == GATED) {
        factor = Row<Stored>::widen(up_raw[u], x);
        #pragma unroll
        for (int n = 0; n < TILE; ++n) {
          hidden[n] *= row_sum(factor * dot8(tile.q + n * 8, x)) + s[1];
        }
      }
      float weight = 0.0f;  // in the log-normaliser
      if (KIND == GATED || KIND == SCORE || KIND == GIVEN_SCORE) {
        weight = s[numbers - 1];
      }
      if (KIND == LINEAR) {
        weight = s[0] == static_cast<float>(HEAD_DIM) ? 1.0f : 0.0f;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
          x[i] = s[0] == static_cast<float>(lane.part * 8 + i) ? 1.0f : 0.0f;
        }
        factor = 1.0f;
      }
      if (has_out) {
        factor = Row<Stored>::widen(out_raw[u], x);
      }
      #pragma unroll
      for (int n = 0; n < TILE; ++n) {
        const float h = valid ? hidden[n] : 0.0f;
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

// A partial result is HEAD_DIM / 4 vectors and two numbers (largest score, sum). Vector v of a row holds columns
// 8 * (v % PARTS) + 4 * (v / PARTS) and the next three: so lanes write side by side.
METAL_FUNC size_t partial_slots(Problem p, int n_static) {
  return static_cast<size_t>(n_static + p.n_kv_heads * p.slices) * static_cast<size_t>(p.batch * p.group * p.length);
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

// One simdgroup merges all partial results of one query row. heads: (first block, end of its node blocks, end, word of its constants).
METAL_FUNC void merge_row(Problem p, const device uint* parameters, const device float* partials, device Element* output, int head, int row, int lane) {
  const uint4 mine = *reinterpret_cast<const device uint4*>(parameters + head * 4);
  const int n_static = static_cast<int>(parameters[(p.n_kv_heads - 1) * 4 + 2]);
  const int first = static_cast<int>(mine.x);
  const int n_nodes = static_cast<int>(mine.y) - first;
  const int n_far = static_cast<int>(mine.z) - first;
  const int n_all = n_far + p.slices;
  const int live_unit = n_static + head * p.slices - n_far;
  const int rows = p.batch * p.group * p.length;
  const device float4* vectors = reinterpret_cast<const device float4*>(partials);
  const device float* numbers = partials + partial_slots(p, n_static) * HEAD_DIM;

  // The first vectors are asked for before the statistics that weigh them.
  float4 ahead[AHEAD];
  #pragma unroll
  for (int j = 0; j < AHEAD; ++j) {
    const int k = metal::min(j, n_all - 1);
    const size_t slot = static_cast<size_t>((k < n_far ? first : live_unit) + k) * static_cast<size_t>(rows) + static_cast<size_t>(row);
    ahead[j] = vectors[slot * VECTORS + static_cast<size_t>(metal::min(lane, VECTORS - 1))];
  }

  float node_top = NEVER;
  float live_top = NEVER;
  for (int j = lane; j < n_all; j += 32) {
    const size_t slot = static_cast<size_t>((j < n_far ? first : live_unit) + j) * static_cast<size_t>(rows) + static_cast<size_t>(row);
    node_top = j < n_nodes ? metal::max(node_top, numbers[slot * 2]) : node_top;
    live_top = j < n_far ? live_top : metal::max(live_top, numbers[slot * 2]);
  }
  node_top = simd_max(node_top);
  live_top = simd_max(live_top);
  float node_sum = 0.0f;
  float live_sum = 0.0f;
  float correction = 0.0f;
  for (int j = lane; j < n_all; j += 32) {
    const size_t slot = static_cast<size_t>((j < n_far ? first : live_unit) + j) * static_cast<size_t>(rows) + static_cast<size_t>(row);
    const float top = numbers[slot * 2];
    const float sum = numbers[slot * 2 + 1];
    if (j < n_nodes) {
      node_sum = metal::fma(sum, metal::fast::exp(top - node_top), node_sum);
    } else if (j < n_far) {
      correction += sum;
    } else {
      live_sum = metal::fma(sum, metal::fast::exp(top - live_top), live_sum);
    }
  }
  node_sum = simd_sum(node_sum);
  live_sum = simd_sum(live_sum);
  correction = simd_sum(correction);

  const device float* constants = reinterpret_cast<const device float*>(parameters + mine.w);
  const float node_log = n_nodes > 0 ? node_top + metal::log(node_sum) : (HAS_NODES ? NEVER : 0.0f);
  const float far_log = node_log + correction + (HAS_UNITS ? constants[HEAD_DIM] : 0.0f);
  const bool any_live = live_sum > 0.0f;  // a row of padding sees nothing
  const float live_log = any_live ? live_top + metal::log(live_sum) : NEVER;
  const float top = metal::max(far_log, live_log);
  const float far_weight = metal::fast::exp(far_log - top);
  const float live_weight = any_live ? metal::fast::exp(live_log - top) : 0.0f;
  const float far_share = far_weight / (far_weight + live_weight);
  const float node_share = n_nodes > 0 ? far_share / node_sum : 0.0f;
  const float live_share = any_live ? (1.0f - far_share) / live_sum : 0.0f;

  const int sequence = row / (p.group * p.length);
  const int within = row % (p.group * p.length);
  device Element* to = output + static_cast<size_t>((sequence * p.n_kv_heads + head) * p.group * p.length + within) * HEAD_DIM;
  for (int base = 0; base < VECTORS; base += 32) {
    const int v = metal::min(base + lane, VECTORS - 1);
    const int column = 8 * (v % PARTS) + 4 * (v / PARTS);
    float4 sum = zero4();
    if (HAS_UNITS) {
      sum = scaled_sum(far_share, *reinterpret_cast<const device float4*>(constants + column), sum);
    }
    for (int start = 0; start < n_all; start += 32) {
      const int j = metal::min(start + lane, n_all - 1);
      const size_t slot = static_cast<size_t>((j < n_far ? first : live_unit) + j) * static_cast<size_t>(rows) + static_cast<size_t>(row);
      const float mine_top = numbers[slot * 2];
      float weight = far_share;
      weight = j < n_nodes ? node_share * metal::fast::exp(mine_top - node_top) : weight;
      weight = j < n_far ? weight : live_share * metal::fast::exp(mine_top - live_top);
      const int stop = metal::min(32, n_all - start);
      for (int k = 0; k < stop; k += AHEAD) {
        if (start + k > 0 || base > 0) {
          #pragma unroll
          for (int i = 0; i < AHEAD; ++i) {
            const int at = metal::min(start + k + i, n_all - 1);
            const size_t other = static_cast<size_t>((at < n_far ? first : live_unit) + at) * static_cast<size_t>(rows) + static_cast<size_t>(row);
            ahead[i] = vectors[other * VECTORS + static_cast<size_t>(v)];
          }
        }
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const float w = simd_shuffle(weight, static_cast<ushort>(metal::min(k + i, 31)));
          sum = scaled_sum(k + i < stop ? w : 0.0f, ahead[i], sum);
        }
      }
    }
    if (base + lane < VECTORS) {
      to[column] = static_cast<Element>(sum.x);
      to[column + 1] = static_cast<Element>(sum.y);
      to[column + 2] = static_cast<Element>(sum.z);
      to[column + 3] = static_cast<Element>(sum.w);
    }
  }
}
