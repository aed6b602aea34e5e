#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "guided_aggregate/cpu.h"
#include "inverse_list/op.h"

namespace any2point {
namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Contiguous, and where kernels may read 16 bytes at once.
Tensor whole(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const bool even = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  return even ? dense : torch::stable::clone(dense);
}

std::vector<Tensor> whole(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = whole(tensor);
  return tensors;
}

// The data of a contiguous tensor of a dtype and shape, on the device of `like`.
const void* data_of(const char* name, const Tensor& tensor, ScalarType dtype, std::vector<int64_t> shape,
                    const Tensor& like) {
  check_same_device(name, tensor, like);
  A2P_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                tensor.dim() == static_cast<int64_t>(shape.size()),
            name, ": expected a contiguous tensor of other dtype or dimensions");
  for (size_t i = 0; i < shape.size(); i++) {
    A2P_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i, ", got ",
              tensor.size(i));
  }
  return tensor.const_data_ptr();
}

const float* floats_of(const char* name, const Tensor& tensor, std::vector<int64_t> shape,
                       const Tensor& like) {
  return static_cast<const float*>(data_of(name, tensor, ScalarType::Float, shape, like));
}

const int32_t* ints_of(const char* name, const Tensor& tensor, std::vector<int64_t> shape,
                       const Tensor& like) {
  return static_cast<const int32_t*>(data_of(name, tensor, ScalarType::Int, shape, like));
}

Ensemble ensemble_of(const std::string& name) {
  A2P_CHECK(name == "adaptive" || name == "mean" || name == "max",
            "ensemble: expected adaptive, mean or max");
  return name == "adaptive" ? Ensemble::adaptive : name == "mean" ? Ensemble::mean : Ensemble::max;
}

#ifdef ANY2POINT_WITH_CUDA
int32_t* ints(const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); }

// Voxels out of range count as none.
Four lists(const Tensor& cell_, const OptionalTensor& cluster_, int64_t cells) {
  A2P_CHECK(cell_.dim() == 3, "cell: expected [B, V, S]");
  const int64_t clouds = cell_.size(0), views = cell_.size(1), tokens = cell_.size(2), rows = clouds * tokens;
  A2P_CHECK(cells > 0 && rows < (int64_t(1) << 30), "cell: expected fewer than 2^30 tokens");
  const Tensor cell = index_tensor("cell", cell_, {clouds, views, tokens}, cell_);
  const int64_t layers = views + (cluster_ ? 1 : 0);
  const auto make = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(cell, shape, ScalarType::Int);
  };
  Tensor order = make({layers, rows}), segment = make({layers, rows}), start = make({layers, rows + 1});
  Tensor count = make({layers, clouds});
  const OnDevice device(cell);
  Tensor cluster;
  GuidedLists args{clouds, tokens, views, layers, cells};
  args.cell = cell.const_data_ptr<int64_t>();
  if (cluster_) {
    cluster = index_tensor("cluster", *cluster_, {clouds, tokens}, cell);
    args.cluster = cluster.const_data_ptr<int64_t>();
  }
  args.order = ints(order);
  args.segment = ints(segment);
  args.start = ints(start);
  args.count = ints(count);
  const int64_t bytes = guided_lists_workspace(args);
  const Tensor workspace = scratch(cell, bytes);
  check_cuda("guided_lists", guided_lists_cuda(args, workspace.mutable_data_ptr(), bytes, device.stream));
  return {order, segment, start, count};
}

std::tuple<Tensor, Tensor, Tensor> product_backward(const Tensor& grad_, const Tensor& product,
                                                    const Tensor& features_, const Tensor& low_,
                                                    const Tensor& sums, const Tensor& bias,
                                                    const Tensor& moments) {
  A2P_CHECK(features_.dim() == 3 && low_.dim() == 2, "features: expected [B, S, C]");
  const Tensor grad = whole(grad_), features = whole(features_), low = whole(low_);
  const int64_t clouds = features.size(0), tokens = features.size(1), width = features.size(2);
  GuidedProductBackward args{};
  args.dtype = dtype_of("features", features);
  A2P_CHECK((args.dtype == Dtype::f16 || args.dtype == Dtype::bf16) && width % 8 == 0,
            "features: expected 16 bits and a multiple of 8 channels");
  args.rows = clouds * tokens;
  args.channels = width;
  args.columns = low.size(0);
  args.grad = floats_of("grad", grad, {clouds, tokens, args.columns}, features);
  args.product = floats_of("product", product, {clouds, tokens, args.columns}, features);
  args.features = features.const_data_ptr();
  args.weight = data_of("low", low, features.scalar_type(), {args.columns, width}, features);
  args.sums = floats_of("sums", sums, {args.columns}, features);
  args.bias = floats_of("bias", bias, {args.columns}, features);
  args.moments = floats_of("moments", moments, {2, args.rows}, features);
  Tensor grad_features = torch::stable::empty_like(features);
  Tensor grad_weight = torch::stable::new_empty(features, {args.columns, width}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(features, {args.columns}, ScalarType::Float);
  args.grad_features = grad_features.mutable_data_ptr();
  args.grad_weight = floats(grad_weight);
  args.grad_bias = floats(grad_bias);
  const OnDevice device(features);
  const Tensor workspace = scratch(features, guided_product_backward_workspace(args));
  check_cuda("guided_product_backward",
             guided_product_backward_cuda(args, workspace.mutable_data_ptr(), device.stream));
  return {grad_features, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> product(const Tensor& features_, const Tensor&, const Tensor& low_,
                                           const Tensor& sums, const Tensor& bias, double eps) {
  A2P_CHECK(features_.dim() == 3 && low_.dim() == 2, "features: expected [B, S, C]");
  const Tensor features = whole(features_), low = whole(low_);
  GuidedProduct args{};
  args.dtype = dtype_of("low", low);
  A2P_CHECK(args.dtype == Dtype::f16 || args.dtype == Dtype::bf16, "low: expected 16 bits");
  const bool whole_features = dtype_of("features", features) == Dtype::f32;
  args.rows = features.size(0) * features.size(1);
  args.channels = features.size(2);
  args.columns = low.size(0);
  args.eps = static_cast<float>(eps);
  const OnDevice device(features);
  A2P_CHECK(guided_product_fits(args.channels), "features: expected fewer channels, a multiple of 8");
  Tensor rounded = torch::stable::new_empty(low, {0});
  if (whole_features) {
    rounded = torch::stable::new_empty(low, {features.size(0), features.size(1), args.channels});
    args.whole = features.const_data_ptr<float>();
    args.rounded = rounded.mutable_data_ptr();
  } else {
    args.features = data_of("features", features, low.scalar_type(),
                            {features.size(0), features.size(1), args.channels}, low);
  }
  args.weight = data_of("low", low, low.scalar_type(), {args.columns, args.channels}, features);
  args.sums = floats_of("sums", sums, {args.columns}, features);
  args.bias = floats_of("bias", bias, {args.columns}, features);
  Tensor out = torch::stable::new_empty(features, {features.size(0), features.size(1), args.columns},
                                        ScalarType::Float);
  Tensor moments = torch::stable::new_empty(features, {2, args.rows}, ScalarType::Float);
  args.out = floats(out);
  args.moments = floats(moments);
  check_cuda("guided_product", guided_product_cuda(args, device.stream));
  return {out, moments, rounded};
}
#endif

// What the forward pass keeps for the backward pass, on CUDA alone: shapes of inner and agreement.
std::vector<int64_t> inner_shape(const Guided& args, const Tensor& like) {
  if (!like.is_cuda()) return {0, 0, 0};
  return {args.views, args.clouds * args.tokens, guided::coefficients(args.inner)};
}

std::vector<int64_t> agreement_shape(const Guided& args, const Tensor& like) {
  if (!like.is_cuda() || args.ensemble != Ensemble::adaptive) return {0, 0};
  return {2 * args.views + 1, args.clouds * args.tokens};
}

// The checked arguments that forward and backward share.
template <typename Args>
Args guided(const Tensor& features, const Tensor& qkv, const Tensor& proj, const std::vector<Tensor>& norms,
            const Tensor& order, const Tensor& segment, const Tensor& start, const Tensor& count,
            const OptionalTensor& keep, int64_t heads, double scale, double coefficient, bool maximum,
            const std::string& ensemble, int64_t total) {
  Args args{};
  A2P_CHECK(features.dim() == 3 && features.is_contiguous(), "features: expected [B, S, C]");
  A2P_CHECK(qkv.dim() == 5 && qkv.is_contiguous() && proj.dim() == 3, "qkv: expected [B, S, V, 3, M]");
  args.dtype = dtype_of("features", features);
  args.qkv_dtype = dtype_of("qkv", qkv);
  A2P_CHECK(args.dtype != Dtype::f64 && args.qkv_dtype != Dtype::f64, "features: expected float32 or less");
  args.ensemble = ensemble_of(ensemble);
  args.clouds = features.size(0);
  args.tokens = features.size(1);
  args.channels = features.size(2);
  args.views = qkv.size(2);
  args.layers = args.views + (args.ensemble == Ensemble::adaptive ? 1 : 0);
  args.inner = qkv.size(4);
  args.heads = heads;
  args.total = total;
  args.maximum = maximum;
  args.scale = static_cast<float>(scale);
  args.coefficient = static_cast<float>(coefficient);
  const int64_t rows = args.clouds * args.tokens, views = args.views, width = args.channels;
  A2P_CHECK(width > 0 && args.views > 0 && args.inner > 0 && heads > 0 && args.inner % heads == 0,
            "num_heads: expected a divisor");
  A2P_CHECK(!features.is_cuda() || args.dtype == Dtype::f32 || width % 4 == 0,
            "features: expected a multiple of 4 channels in 16 bits on CUDA");
  A2P_CHECK(order.dim() == 2 && order.size(0) >= args.layers, "order: expected [L, R]");
  const int64_t layers = order.size(0);
  args.features = features.const_data_ptr();
  args.qkv =
      data_of("qkv", qkv, qkv.scalar_type(), {args.clouds, args.tokens, views, 3, args.inner}, features);
  args.proj = floats_of("proj", proj, {views, args.inner + 1, width}, features);
  const bool voxels = args.ensemble == Ensemble::adaptive;
  A2P_CHECK(norms.size() == (voxels ? 4 : 2), "norms: expected two or four tensors");
  args.view_weight = floats_of("norms", norms[0], {views, width}, features);
  args.view_bias = floats_of("norms", norms[1], {views, width}, features);
  if (voxels) {
    args.space_weight = floats_of("norms", norms[2], {width}, features);
    args.space_bias = floats_of("norms", norms[3], {width}, features);
  }
  args.order = ints_of("order", order, {layers, rows}, features);
  args.segment = ints_of("segment", segment, {layers, rows}, features);
  args.start = ints_of("start", start, {layers, rows + 1}, features);
  args.count = ints_of("count", count, {layers, args.clouds}, features);
  if (keep) args.keep = floats_of("keep", *keep, {views, args.clouds, args.tokens}, features);
  return args;
}

Six forward(const Tensor& features_, const Tensor& qkv, const Tensor& proj_, std::vector<Tensor> norms_,
            std::vector<Tensor> running, const Tensor& order, const Tensor& segment, const Tensor& start,
            const Tensor& count, const OptionalTensor& keep, int64_t heads, double scale, double coefficient,
            bool maximum, std::string ensemble, int64_t total, double eps, const OptionalTensor& base) {
  const Tensor features = whole(features_), proj = whole(proj_);
  const std::vector<Tensor> norms = whole(norms_);
  GuidedForward args = guided<GuidedForward>(features, qkv, proj, norms, order, segment, start, count, keep,
                                             heads, scale, coefficient, maximum, ensemble, total);
  const int64_t views = args.views, width = args.channels;
  args.eps = static_cast<float>(eps);
  args.residual = !base;
  args.training = running.empty();
  A2P_CHECK(args.training || running.size() == norms.size(), "running: expected as many as norms");
  if (!args.training) {
    args.view_mean = floats_of("running", running[0], {views, width}, features);
    args.view_variance = floats_of("running", running[1], {views, width}, features);
    if (args.layers > views) {
      args.space_mean = floats_of("running", running[2], {width}, features);
      args.space_variance = floats_of("running", running[3], {width}, features);
    }
  }
  Tensor out, whole_base;
  if (base) {
    A2P_CHECK(features.is_cuda(), "base: expected None on a CPU");
    whole_base = whole(*base);
    args.base = floats_of("base", whole_base, {args.clouds, args.tokens, width}, features);
    out = torch::stable::empty_like(whole_base);
  } else {
    out = torch::stable::new_empty(features, {args.clouds, args.tokens, width});
  }
  const auto statistic = [&] {
    return torch::stable::new_empty(features, {order.size(0), width}, ScalarType::Float);
  };
  Tensor mean = statistic(), deviation = statistic(), unbiased = statistic();
  args.out = out.mutable_data_ptr();
  args.mean = floats(mean);
  args.deviation = floats(deviation);
  args.unbiased = floats(unbiased);
  Tensor inner = torch::stable::new_empty(features, inner_shape(args, features), ScalarType::Float);
  Tensor agreement = torch::stable::new_empty(features, agreement_shape(args, features), ScalarType::Float);
  args.inner_means = floats(inner);
  args.agreement = floats(agreement);
#ifdef ANY2POINT_WITH_CUDA
  if (features.is_cuda()) {
    const OnDevice device(features);
    const Tensor workspace = scratch(features, guided_forward_workspace(args));
    check_cuda("guided_aggregate", guided_forward_cuda(args, workspace.mutable_data_ptr(), device.stream));
    return {out, mean, deviation, unbiased, inner, agreement};
  }
#endif
  guided_forward_cpu(args);
  return {out, mean, deviation, unbiased, inner, agreement};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const Tensor& grad_, const Tensor& features_, const Tensor& qkv, const Tensor& proj_,
    std::vector<Tensor> norms_, const Tensor& mean, const Tensor& deviation, const Tensor& inner,
    const Tensor& agreement, const Tensor& order, const Tensor& segment, const Tensor& start,
    const Tensor& count, const OptionalTensor& keep, int64_t heads, double scale, double coefficient,
    bool maximum, std::string ensemble, int64_t total, bool training, bool residual) {
  const Tensor grad = whole(grad_), features = whole(features_), proj = whole(proj_);
  const std::vector<Tensor> norms = whole(norms_);
  GuidedBackward args = guided<GuidedBackward>(features, qkv, proj, norms, order, segment, start, count, keep,
                                               heads, scale, coefficient, maximum, ensemble, total);
  args.training = training;
  args.residual = residual;
  const int64_t width = args.channels;
  args.mean = floats_of("mean", mean, {order.size(0), width}, features);
  args.deviation = floats_of("deviation", deviation, {order.size(0), width}, features);
  args.inner_means = floats_of("inner", inner, inner_shape(args, features), features);
  args.agreement = floats_of("agreement", agreement, agreement_shape(args, features), features);
  args.grad = data_of("grad", grad, features.scalar_type(), {args.clouds, args.tokens, width}, features);
  Tensor grad_features = torch::stable::empty_like(features), grad_qkv = torch::stable::empty_like(qkv);
  Tensor grad_proj = torch::stable::empty_like(proj);
  std::vector<Tensor> grad_norms;
  for (const Tensor& norm : norms) grad_norms.push_back(torch::stable::empty_like(norm));
  args.grad_features = grad_features.mutable_data_ptr();
  args.grad_qkv = grad_qkv.mutable_data_ptr();
  args.grad_proj = floats(grad_proj);
  args.grad_view_weight = floats(grad_norms[0]);
  args.grad_view_bias = floats(grad_norms[1]);
  if (grad_norms.size() == 4) {
    args.grad_space_weight = floats(grad_norms[2]);
    args.grad_space_bias = floats(grad_norms[3]);
  }
#ifdef ANY2POINT_WITH_CUDA
  if (features.is_cuda()) {
    const OnDevice device(features);
    const Tensor workspace = scratch(features, guided_backward_workspace(args));
    check_cuda("guided_aggregate", guided_backward_cuda(args, workspace.mutable_data_ptr(), device.stream));
    return {grad_features, grad_qkv, grad_proj, grad_norms};
  }
#endif
  A2P_CHECK(residual, "residual: expected True on a CPU");
  guided_backward_cpu(args);
  return {grad_features, grad_qkv, grad_proj, grad_norms};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("_guided_aggregate", TORCH_BOX(&any2point::forward));
  m.impl("_guided_aggregate_backward", TORCH_BOX(&any2point::backward));
}
#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("_guided_lists", TORCH_BOX(&any2point::lists));
  m.impl("_guided_product_backward", TORCH_BOX(&any2point::product_backward));
  m.impl("_guided_product", TORCH_BOX(&any2point::product));
  m.impl("_guided_aggregate", TORCH_BOX(&any2point::forward));
  m.impl("_guided_aggregate_backward", TORCH_BOX(&any2point::backward));
}
#endif
