#include "common/tensor.h"

#include <string>

#include "common/isa.h"

#ifdef ANY2POINT_WITH_CUDA
#include <dlfcn.h>

#include "common/cuda_error.h"
#endif

namespace any2point {

void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  A2P_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
            ": expected a tensor on the device of the other arguments");
}

Tensor index_tensor(const char* name, const Tensor& tensor, std::vector<int64_t> shape, const Tensor& like) {
  check_same_device(name, tensor, like);
  A2P_CHECK(tensor.scalar_type() == ScalarType::Long, name, ": expected int64");
  A2P_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(),
            " dimensions");
  for (size_t i = 0; i < shape.size(); i++) {
    A2P_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i, ", got ",
              tensor.size(i));
  }
  return torch::stable::contiguous(tensor);
}

Layout layout_of(const char* name, const Tensor& points, const OptionalTensor& lengths,
                 const OptionalTensor& offsets) {
  A2P_CHECK(points.dim() == (offsets ? 2 : 3), name, ": expected [B, N, D], or [P, D] with offsets");
  Layout layout{};
  layout.points = torch::stable::contiguous(points);
  Rows& rows = layout.rows;
  layout.dim = points.size(points.dim() - 1);
  if (offsets) {
    A2P_CHECK(!lengths, name, ": expected lengths or offsets, got both");
    A2P_CHECK(offsets->dim() == 1 && offsets->size(0) >= 1, name, ": expected offsets [B + 1]");
    rows.clouds = offsets->size(0) - 1;
    rows.total = points.size(0);
    layout.offsets = index_tensor("offsets", *offsets, {rows.clouds + 1}, points);
    rows.offsets = layout.offsets->const_data_ptr<int64_t>();
  } else {
    rows.clouds = points.size(0);
    rows.padded = points.size(1);
    rows.total = rows.clouds * rows.padded;
    if (lengths) {
      layout.lengths = index_tensor("lengths", *lengths, {rows.clouds}, points);
      rows.lengths = layout.lengths->const_data_ptr<int64_t>();
    }
  }
  return layout;
}

#ifdef ANY2POINT_WITH_CUDA
void* current_stream(int32_t device) {
  // This symbol lives in libtorch_cuda alone: looked up, so that a CPU-only torch can load this library.
  using Function = AOTITorchError (*)(int32_t, void**);
  static Function function = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (!symbol) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) symbol = dlsym(library, name);
    }
    return reinterpret_cast<Function>(symbol);
  }();
  A2P_CHECK(function != nullptr, "any2point: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

void check_cuda(const char* op, int error) {
  A2P_CHECK(error == 0, op, ": CUDA said: ", cuda_error_string(error));
}
#endif

namespace {
std::string simd(std::string level) {
  A2P_CHECK(level.empty() || set_isa(level.c_str()),
            "level: expected an instruction set of this CPU (scalar, avx2, avx512, avx512bf16, amx), got ",
            level);
  return isa_name(isa());
}
}  // namespace

}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CompositeExplicitAutograd, m) {
  m.impl("_simd", TORCH_BOX(&any2point::simd));
}
