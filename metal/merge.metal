  // grid = (32 * SIMDGROUPS * threadgroups, n_kv_heads, 1), threadgroup = (32 * SIMDGROUPS, 1, 1).
  using namespace nectar;
  const Problem p = problem(queries_shape[0], queries_shape[1], queries_shape[2], keys_shape[1], keys_shape[2]);
  const int head = static_cast<int>(threadgroup_position_in_grid.y);
  const uint4 mine = *reinterpret_cast<const device uint4*>(parameters + head * 4);
  const int n_static = static_cast<int>(parameters[(p.n_kv_heads - 1) * 4 + 2]);
  const int rows = p.batch * p.group * p.length;
  const int each = SIMDGROUPS / parts_of(rows);
  const int start = static_cast<int>(threadgroup_position_in_grid.x) * each;
  threadgroup float4 sums[SIMDGROUPS * VECTORS];
  merge_rows(p, mine, n_static, parameters, partials, output, sums, head, start, metal::min(start + each, rows), static_cast<int>(thread_index_in_threadgroup));
