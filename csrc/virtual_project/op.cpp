#include <algorithm>
#include <cmath>
#include <tuple>

#include "inverse_list/op.h"
#include "virtual_project/kernel.h"

namespace any2point {
namespace {

// Contiguous float32 on one device.
const float* coordinates(const char* name, const Tensor& tensor, const Tensor& like) {
  check_same_device(name, tensor, like);
  A2P_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
            ": expected a contiguous float32 tensor");
  return static_cast<const float*>(tensor.const_data_ptr());
}

float step(int64_t table, int64_t size) {
  return static_cast<float>(double(table - 1) / double(std::max<int64_t>(size - 1, 1)));
}

// height = 0: lines; table rows and columns, 0 for the first likewise.
VirtualProject arguments(const Tensor& centers, const Tensor& views, int64_t table_rows,
                         int64_t table_columns, double cell, int64_t height, int64_t width, double camera,
                         bool wrap) {
  VirtualProject args{};
  args.centers = coordinates("centers", centers, centers);
  args.views = coordinates("views", views, centers);
  args.image = height > 0;
  A2P_CHECK(centers.dim() == 3 && centers.size(1) > 0 && centers.size(2) == 3,
            "centers: expected [B, S, 3] with S > 0");
  A2P_CHECK(views.dim() == (args.image ? 3 : 2) && views.size(0) > 0 && views.size(1) == 3 &&
                views.size(views.dim() - 1) == 3,
            "views: expected [V, 3], or [V, 3, 3] for images");
  A2P_CHECK(width > 0 && cell > 0 && camera >= 0 && table_columns > 0 && (table_rows > 0) == args.image &&
                (args.image || !wrap),
            "size, cell, camera: expected positive numbers, and no wrapped lines");
  args.count = centers.size(1);
  args.view_count = views.size(0);
  args.height = std::max<int64_t>(1, table_rows);
  args.width = table_columns;
  args.wrap = wrap;
  args.cell = static_cast<float>(cell);
  args.camera = static_cast<float>(camera);
  args.rows = std::max<int64_t>(1, height);
  args.columns = width;
  args.cell_rows = static_cast<int64_t>(std::ceil(double(args.rows) / cell));
  args.cell_columns = static_cast<int64_t>(std::ceil(double(width) / cell));
  args.down = step(args.height, args.rows);
  args.across = step(args.width, args.columns);
  return args;
}

void run(const VirtualProject& args, const Tensor& centers) {
  const int64_t clouds = centers.size(0), entries = args.view_count * args.corners();
#ifdef ANY2POINT_WITH_CUDA
  if (centers.is_cuda()) {
    A2P_CHECK(entries <= kMostCorners, "views: expected at most ", kMostCorners / args.corners());
    const OnDevice device(centers);
    check_cuda("virtual_project", virtual_project_cuda(args, clouds, device.stream));
    return;
  }
#endif
  std::vector<Span> spans(args.image ? 0 : clouds * args.view_count);
  std::vector<Frame> frames(args.image ? clouds : 0);
  torch::stable::parallel_for(0, clouds, 1, [&](int64_t begin, int64_t end) {
    virtual_measure_cpu(args, spans.data(), frames.data(), begin, end);
  });
  const int64_t work = entries * std::max<int64_t>(8, args.encoding ? args.channels : 0);
  torch::stable::parallel_for(
      0, clouds * args.count, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
        std::vector<int64_t> corner(entries);
        std::vector<float> weight(entries);
        virtual_project_cpu(args, spans.data(), frames.data(), corner.data(), weight.data(), begin, end);
      });
}

std::tuple<Tensor, Tensor, Tensor> virtual_project(const Tensor& centers, const Tensor& table,
                                                   const Tensor& views, double cell, int64_t height,
                                                   int64_t width, double camera, bool wrap) {
  const bool image = table.dim() == 3;
  A2P_CHECK((table.dim() == 2 || image) && image == (height > 0), "table: expected [L, C] or [H, W, C]");
  VirtualProject args = arguments(centers, views, image ? table.size(0) : 0, table.size(image ? 1 : 0), cell,
                                  height, width, camera, wrap);
  check_same_device("table", table, centers);
  args.dtype = dtype_of("table", table);
  A2P_CHECK(args.dtype != Dtype::f64 && table.is_contiguous(),
            "table: expected a contiguous tensor of float16, bfloat16 or float32");
  args.table = table.const_data_ptr();
  args.channels = table.size(table.dim() - 1);
  const int64_t clouds = centers.size(0);
  Tensor position = torch::stable::new_empty(centers, {clouds, args.view_count, args.count, image ? 2 : 1});
  Tensor encoding = torch::stable::new_empty(table, {clouds, args.count, args.channels});
  Tensor cells = torch::stable::new_empty(centers, {clouds, args.view_count, args.count}, ScalarType::Long);
  args.position = static_cast<float*>(position.mutable_data_ptr());
  args.encoding = encoding.mutable_data_ptr();
  args.cells = cells.mutable_data_ptr<int64_t>();
  run(args, centers);
  return {position, encoding, cells};
}

std::tuple<Tensor, Tensor> virtual_corners(const Tensor& centers, const Tensor& views, int64_t table_rows,
                                           int64_t table_columns, int64_t height, int64_t width,
                                           double camera, bool wrap) {
  VirtualProject args =
      arguments(centers, views, table_rows, table_columns, 1.0, height, width, camera, wrap);
  const int64_t rows = centers.size(0) * args.count, entries = args.view_count * args.corners();
  Tensor weight = torch::stable::new_empty(centers, {rows, entries});
  Tensor corner = torch::stable::new_empty(centers, {rows, entries}, ScalarType::Long);
  args.weight = static_cast<float*>(weight.mutable_data_ptr());
  args.corner = corner.mutable_data_ptr<int64_t>();
  run(args, centers);
  return {weight, corner};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("_virtual_project", TORCH_BOX(&any2point::virtual_project));
  m.impl("_virtual_corners", TORCH_BOX(&any2point::virtual_corners));
}
#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("_virtual_project", TORCH_BOX(&any2point::virtual_project));
  m.impl("_virtual_corners", TORCH_BOX(&any2point::virtual_corners));
}
#endif
