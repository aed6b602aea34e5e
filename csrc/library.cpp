// Every op of the library: the table of contents. A schema here, the kernels in csrc/<op>/, the public
// function with checks, fake and autograd in any2point/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(any2point, m) {
  // Padded [B, N, D] with lengths [B], or packed [P, D] with offsets [B + 1]; all of them int64.
  m.def(
      "farthest_point_sample(Tensor points, SymInt num_samples, Tensor? lengths, Tensor? offsets, Tensor? "
      "start, "
      "bool pointnet2) -> (Tensor index, Tensor distance)");
  // Distances come first: opcheck sums outputs in place, which a leading integer tensor would make
  // impossible.
  m.def(
      "knn(Tensor query, Tensor points, SymInt k, Tensor? query_lengths, Tensor? lengths, Tensor? "
      "query_offsets, "
      "Tensor? offsets, bool sorted) -> (Tensor distance, Tensor index)");
  m.def(
      "ball_query(Tensor query, Tensor points, float radius, SymInt k, Tensor? query_lengths, Tensor? "
      "lengths, "
      "Tensor? query_offsets, Tensor? offsets, bool nearest) -> (Tensor distance, Tensor index, Tensor "
      "count)");

  // Canonical layouts: features [B, N, C], index [B, R], grad [B, R, C]; -1 in an index is no row.
  m.def("group(Tensor features, Tensor index) -> Tensor");
  m.def("_group_backward(Tensor grad, Tensor index, SymInt num_rows) -> Tensor");
  // index and weight [B, S, K]; weight in float32 (float64 with float64 features).
  m.def("interpolate(Tensor features, Tensor index, Tensor weight) -> Tensor");
  m.def("_interpolate_features_grad(Tensor grad, Tensor index, Tensor weight, SymInt num_rows) -> Tensor");
  m.def("_interpolate_weight_grad(Tensor grad, Tensor features, Tensor index) -> Tensor");
  m.def(
      "voxel_cluster(Tensor points, float[] size, Tensor? lengths, Tensor? offsets, Tensor? origin) -> "
      "(Tensor cluster, Tensor start, Tensor order, Tensor count)");
  // features [R, C], segment [R]; order and start: an inverse list of segment. saved: what the gradient
  // needs.
  m.def(
      "segment_pool(Tensor features, Tensor segment, SymInt num_segments, str reduce, Tensor? order, Tensor? "
      "start) -> (Tensor pooled, Tensor saved)");
  m.def("_segment_pool_backward(Tensor grad, Tensor segment, Tensor saved, str reduce) -> Tensor");

  // table [L, C], or [H, W, C] for images: then views [V, 3, 3], otherwise [V, 3] and height 0. The extent of
  // the positions and the edge of a cell; camera 0 places it for each cloud.
  m.def(
      "_virtual_project(Tensor centers, Tensor table, Tensor views, float cell, SymInt height, SymInt width, "
      "float camera, bool wrap) -> (Tensor position, Tensor encoding, Tensor cell)");
  // The entries [B S, V * 2 or 4] of the table that the encodings are made of.
  m.def(
      "_virtual_corners(Tensor centers, Tensor views, SymInt table_rows, SymInt table_columns, SymInt "
      "height, "
      "SymInt width, float camera, bool wrap) -> (Tensor weight, Tensor corner)");

  // Evaluation; on CUDA any2point/ops/local_aggregate.py chooses among kernels. units: in_weight [H, C],
  // in_bias [H], out_weight [C, H], out_bias [C] of each unit, with the batch normalisations folded in;
  // divisor [B], or none for the largest offset of each group.
  m.def(
      "_local_aggregate(Tensor points, Tensor features, Tensor center, Tensor neighbor, Tensor? divisor, "
      "Tensor wavelength, Tensor[] units, float beta, bool guard) -> Tensor");
  // The same in float16 and bfloat16 on sm_90a, for the sizes of hopper_has.
  m.def(
      "_local_aggregate_hopper(Tensor points, Tensor features, Tensor center, Tensor neighbor, Tensor? "
      "divisor, "
      "Tensor wavelength, Tensor[] units, float beta, bool guard) -> Tensor");

  // Guided aggregation. L layers of segments of the R = B * S tokens: the cells of V views, and the voxels if
  // there are any. order [L, R]: tokens by segment; segment [L, R]: of each token, -1 for none; start [L, R +
  // 1]: where each segment begins in order; count [L, B]: segments with tokens among [b * S, (b + 1) * S).
  // Cells that hold tokens of cloud b are numbered from b * S on in ascending order, voxels as given; all
  // other segments are empty. All int32.
  m.def(
      "_guided_lists(Tensor cell, Tensor? cluster, SymInt num_cells) -> (Tensor order, Tensor segment, "
      "Tensor start, Tensor count)");
  // Gradients of a product of LayerNorm(features) and low, given it, the sums of low's rows and what the
  // forward pass kept: moments [2, R], mean and 1 / deviation of every token.
  m.def(
      "_guided_product_backward(Tensor grad, Tensor product, Tensor features, Tensor low, Tensor sums, "
      "Tensor bias, Tensor moments) -> (Tensor grad_features, Tensor grad_weight, Tensor grad_bias)");
  // LN(features) weight^T + bias of 16-bit features [B, S, C], on CUDA: weight [N, C], for its gradient
  // alone; low: the same in 16 bits; sums [N] of its rows. moments [2, R]: mean and 1 / deviation. rounded:
  // of float32 features, what they are in low's dtype, otherwise without elements.
  m.def(
      "_guided_product(Tensor features, Tensor weight, Tensor low, Tensor sums, Tensor bias, float eps) -> "
      "(Tensor out, Tensor moments, Tensor rounded)");
  // qkv [B, S, V, 3, M]; proj [V, M + 1, C]: weight and, last, bias; norms: weight and bias [V, C] of the
  // views, then [C] of the voxels if there are any; running: likewise means and variances, or none to train;
  // keep [V, B, S]: factors on the attention branch, or none; total: rows that the statistics of views count,
  // 0 for those with tokens; base [B, S, C] float32: what the blend is added to, on CUDA, instead of the
  // features. mean, deviation (1 / root of variance + eps), unbiased: [L, C] float32. For the backward pass
  // on CUDA, elsewhere without elements: inner [V, R, K], heads averaged over cells, agreement [2V + 1, R],
  // products and squared norms of activations (guided_aggregate/kernel.h).
  m.def(
      "_guided_aggregate(Tensor features, Tensor qkv, Tensor proj, Tensor[] norms, Tensor[] running, "
      "Tensor order, Tensor segment, Tensor start, Tensor count, Tensor? keep, int num_heads, float scale, "
      "float coefficient, bool maximum, str ensemble, SymInt total, float eps, Tensor? base) -> (Tensor out, "
      "Tensor mean, Tensor deviation, Tensor unbiased, Tensor inner, Tensor agreement)");
  // grad_norms like norms; residual: the blend was added to the features.
  m.def(
      "_guided_aggregate_backward(Tensor grad, Tensor features, Tensor qkv, Tensor proj, Tensor[] norms, "
      "Tensor mean, Tensor deviation, Tensor inner, Tensor agreement, Tensor order, Tensor segment, Tensor "
      "start, Tensor count, Tensor? keep, int num_heads, float scale, float coefficient, bool maximum, str "
      "ensemble, SymInt total, bool "
      "training, bool residual) -> (Tensor grad_features, Tensor grad_qkv, Tensor grad_proj, Tensor[] "
      "grad_norms)");

  // Which kernels farthest point sampling would launch on a GPU of these limits, as JSON, for tests.
  m.def(
      "_farthest_point_launches(int capability, int processors, int shared, bool cooperative, int clouds, "
      "int most, bool packed, bool ragged, int samples) -> str");

  // Which kernels a neighbour search would launch on a GPU whose blocks can have so much shared memory, as
  // JSON, for tests. clouds, queries, points: of the largest cloud (packed: of all).
  m.def(
      "_neighbour_launches(int shared, int clouds, int queries, int points, int dim, int k, bool packed, "
      "bool same, bool wide) -> str");

  // Which kernels would build the inverse list of an index on a GPU of these limits, as JSON, for tests.
  m.def(
      "_inverse_list_launches(int capability, int processors, int shared, int clouds, int entries, int rows) "
      "-> str");

  // Training, pass by pass (csrc/local_aggregate/train.h). done: before [M, H], scale, shift [H], weight [C,
  // H] and bias [C] of each unit before. Sums come as one row per chunk, on the CPU padded as the kernels do.
  // Without `statistics` _project may return none. On CUDA before goes to `to` if that is there, which may be
  // that of the last unit that is done, and is empty.
  // dense: no tensor, or du [M, C]; on CUDA its halves [M, C / 2], and dz may be the second. There, for units
  // above or below another, du may be missing if dz has du times the weight already; if dz is empty, only
  // sums are made; and with norm (factor, m1, m2) dy1 takes the place of dz, without sums. On CUDA features,
  // before, dense, du, dz, dy1 and the weights of _project and _max have 16 bits, everything else is float32.
  m.def(
      "_local_aggregate_project(Tensor points, Tensor features, Tensor center, Tensor neighbor, Tensor? "
      "divisor, Tensor wavelength, float beta, bool guard, Tensor[] done, Tensor weight, Tensor bias, bool "
      "statistics=True, Tensor(a!)? to=None) -> (Tensor before, Tensor mean, Tensor spread, Tensor count)");
  m.def(
      "_local_aggregate_gram(Tensor before, Tensor scale, Tensor shift, int neighbors) -> (Tensor gram, "
      "Tensor "
      "sum)");
  m.def(
      "_local_aggregate_max(Tensor points, Tensor features, Tensor center, Tensor neighbor, Tensor? divisor, "
      "Tensor wavelength, float beta, bool guard, Tensor[] done) -> (Tensor out, Tensor argmax)");
  m.def(
      "_local_aggregate_out_sums(Tensor before, Tensor scale, Tensor shift, Tensor grad, Tensor argmax, int "
      "neighbors, Tensor weight, Tensor bias, Tensor mean, Tensor deviation) -> (Tensor grad, Tensor "
      "grad_normed, Tensor outer)");
  m.def(
      "_local_aggregate_hidden_grad(Tensor before, Tensor scale, Tensor shift, Tensor? grad, Tensor? argmax, "
      "Tensor[] dense, int neighbors, Tensor q, Tensor constant, Tensor weight, Tensor mean, Tensor "
      "deviation, Tensor(a!) dz, Tensor[] norm) -> (Tensor sum, Tensor sum_normed)");
  m.def(
      "_local_aggregate_rows_grad(Tensor points, Tensor features, Tensor center, Tensor neighbor, Tensor? "
      "divisor, Tensor wavelength, float beta, bool guard, Tensor[] done, Tensor before, Tensor? grad, "
      "Tensor? "
      "argmax, Tensor[] dense, Tensor(a!) dz, Tensor[] norm, Tensor weight, Tensor[] below) -> Tensor[]");
  // On CUDA the first unit's _rows_grad returns the gradient of W1 alone and leaves dy1 in the place of dz;
  // another unit's has the halves of du instead of du: the first, the sums over groups [B S, C / 2] of the
  // second, and the second in the place of dz. With dy1, W1 [H, C], and an entry per group and channel, or
  // dense: the first half and those sums, _points_grad gives factor times the gradient of the features, in
  // the type of dy1 or in float32. For _points_grad the first half of dense may also be sums over the points
  // [B, N, C / 2] in float32, as _point_sums makes of it for some of all clouds, from `first` on. lists: what
  // _point_lists gives of all clouds, or without dense none.
  m.def(
      "_local_aggregate_points_grad(Tensor dy1, Tensor? grad, Tensor? argmax, Tensor[] dense, Tensor center, "
      "Tensor neighbor, Tensor weight, Tensor? factor, SymInt points, bool single, Tensor[] lists) -> "
      "Tensor");
  m.def("_local_aggregate_point_lists(Tensor center, Tensor neighbor, SymInt points) -> Tensor[]");
  m.def("_local_aggregate_point_sums(Tensor dense, Tensor[] lists, int first, Tensor(a!) to) -> ()");
  // Between the passes on CUDA (csrc/local_aggregate/train_algebra.h), from the parts of their sums. single:
  // [4, H] scale, shift, mean and deviation of y1; [2, C] mean and deviation of the second layer. rows: M.
  m.def(
      "_local_aggregate_in_statistics(Tensor mean, Tensor spread, Tensor count, Tensor weight, Tensor bias, "
      "float eps) -> (Tensor mean, Tensor deviation, Tensor single)");
  m.def(
      "_local_aggregate_out_statistics(Tensor features, Tensor gram, Tensor sum, Tensor out_weight, Tensor "
      "out_bias, Tensor weight, Tensor bias, float eps, int rows) -> (Tensor mean, Tensor deviation, Tensor "
      "hidden_mean, Tensor hidden_sum, Tensor hidden_outer, Tensor single, Tensor folded, Tensor shift)");
  // Where out > 0, the gradient times a size that fits float16 (unless not `scaled`); sizes: it and 1 / it.
  m.def(
      "_local_aggregate_entries(Tensor grad, Tensor out, Tensor out_weight, Tensor out_scale, Tensor "
      "deviation, bool scaled) -> (Tensor entries, Tensor sizes)");
  m.def(
      "_local_aggregate_pull(Tensor total, Tensor normed, Tensor outer, Tensor out_weight, Tensor out_scale, "
      "Tensor deviation, Tensor hidden_mean, Tensor hidden_sum, Tensor hidden_outer, int rows, bool "
      "transposed) -> (Tensor out_grad, Tensor q, Tensor constant, Tensor carried)");

  // The SIMD level in use ("scalar", "avx2", "avx512", "avx512bf16", "amx"); a non-empty argument sets it,
  // for tests.
  m.def("_simd(str level) -> str");
}
