  // grid = (32 * SIMDGROUPS * ceil(rows / (SIMDGROUPS / SHARES)), n_kv_heads, 1), threadgroup = (32 * SIMDGROUPS, 1, 1)
  using namespace nectar;
  const int rows = static_cast<int>(queries_shape[0]) * SEQUENCE_ROWS;
  const int slices = slices_of(static_cast<int>(live_tokens_shape[0]));
  const int head = static_cast<int>(threadgroup_position_in_grid.y);
  const uint4 mine = *reinterpret_cast<const device uint4*>(parameters + head * 4);
  const int n_static = static_cast<int>(parameters[(N_KV_HEADS - 1) * 4 + 2]);
  const int each = SIMDGROUPS / SHARES;
  const int start = static_cast<int>(threadgroup_position_in_grid.x) * each;
  threadgroup float4 sums[SIMDGROUPS * VECTORS];
  merge_rows(rows, slices, mine, n_static, parameters, partials, output, sums, head, start, metal::min(start + each, rows), static_cast<int>(thread_index_in_threadgroup));
