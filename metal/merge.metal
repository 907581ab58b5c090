  // grid = (32 * SIMDGROUPS * ceil(rows / SIMDGROUPS), n_kv_heads, 1), threadgroup = (32 * SIMDGROUPS, 1, 1): a simdgroup a row.
  using namespace nectar;
  const Problem p = problem(queries_shape[0], queries_shape[1], queries_shape[2], keys_shape[1], keys_shape[2]);
  const int row = static_cast<int>(threadgroup_position_in_grid.x) * SIMDGROUPS + static_cast<int>(simdgroup_index_in_threadgroup);
  if (row < p.batch * p.group * p.length) {
    merge_row(p, parameters, partials, output, static_cast<int>(threadgroup_position_in_grid.y), row, static_cast<int>(thread_index_in_simdgroup));
  }
