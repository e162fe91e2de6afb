// LSQ fake quantization for the CPU: one pass over the input forward, one backward (lsq.py documents the formulas).
// The input is cut off at `ceiling` first, which is infinite but for an activation function that ends there.
//
// The work is split into blocks of a fixed size, and a block's sum does not depend on the thread that computes it, so
// gradients are the same for every number of threads. Threads are torch's own: TensorIterator runs the blocks.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorIterator.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

namespace {

constexpr int64_t BLOCK = 8192;       // elements in a block
constexpr int64_t SERIAL = 32768;     // elements below which a second thread does not pay

// x is a dense piece of memory of `rows` equal rows, each with a scale of its own
struct Blocks {
  int64_t row, per_row, count;
  Blocks(int64_t elements, int64_t rows) : row(rows ? elements / rows : 0) {
    per_row = (row + BLOCK - 1) / BLOCK;
    count = rows * per_row;
  }
};

// work(row, begin, size) for each block; its result lands in the returned tensor, one double a block
template <typename Work>
at::Tensor for_blocks(const Blocks& blocks, const Work& work) {
  at::Tensor results = at::empty({blocks.count}, at::kDouble);
  if (blocks.count == 0) {
    return results;
  }
  double* first = results.mutable_data_ptr<double>();
  const auto run = [&](int64_t index) {
    const int64_t row = index / blocks.per_row, offset = index % blocks.per_row * BLOCK;
    first[index] = work(row, row * blocks.row + offset, std::min(BLOCK, blocks.row - offset));
  };
  const int64_t grain = std::max<int64_t>(1, SERIAL / std::min(blocks.row, BLOCK));
  if (blocks.count <= grain) {
    for (int64_t index = 0; index < blocks.count; ++index) {
      run(index);
    }
    return results;
  }
  at::TensorIterator iterator = at::TensorIterator::nullary_op(results);
  iterator.for_each(
      [&](char** data, const int64_t* strides, int64_t size) {
        for (int64_t i = 0; i < size; ++i) {
          run(reinterpret_cast<double*>(data[0] + i * strides[0]) - first);
        }
      },
      grain);
  return results;
}

template <typename T>
inline T clamp(T value, T low, T high) {  // NaN stays NaN
  value = value < low ? low : value;
  return value > high ? high : value;
}

template <typename T>
void quantize_block(const T* in, T* out, int64_t size, T scale, T low, T high, T ceiling) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T x = in[i] > ceiling ? ceiling : in[i];
    out[i] = clamp(std::nearbyint(x / scale), low, high) * scale;
  }
}

// writes the gradient of the input (`out` may be `grad`); returns that of the scale
template <typename T>
double gradient_block(const T* grad, const T* in, T* out, int64_t size, T scale, T low, T high, T ceiling) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const bool below = !(in[i] >= ceiling);
    const T v = (below ? in[i] : ceiling) / scale, above = grad[i];
    const T q = clamp(std::nearbyint(v), low, high);
    const bool inside = (v > low) & (v < high);
    sum += (inside ? q - v : q) * above;
    out[i] = above * (inside & below ? T(1) : T(0));
  }
  return sum;
}

at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, int64_t low, int64_t high, double ceiling) {
  at::Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lsq_quantize", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* scales = scale.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    for_blocks(Blocks(x.numel(), scale.numel()), [=](int64_t row, int64_t begin, int64_t size) {
      quantize_block<scalar_t>(in + begin, out + begin, size, scales[row], low, high, ceiling);
      return 0.0;
    });
  });
  return y;
}

// nobody else can see the tensor's memory, so that a result may be written over it
bool is_ours(const at::Tensor& tensor) {
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1 && !at::GradMode::is_enabled();
}

std::tuple<at::Tensor, at::Tensor> gradients(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& scale,
    int64_t low,
    int64_t high,
    double factor,
    double ceiling) {
  const bool same_layout = grad.strides() == x.strides();
  const at::Tensor above = same_layout ? grad : at::empty_like(x).copy_(grad);
  const at::Tensor grad_x = !same_layout || is_ours(grad) ? above : at::empty_like(x);
  const at::Tensor grad_scale = at::empty_like(scale);
  const Blocks blocks(x.numel(), scale.numel());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lsq_gradients", [&] {
    const scalar_t* from = above.const_data_ptr<scalar_t>();
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* scales = scale.const_data_ptr<scalar_t>();
    scalar_t* out = grad_x.mutable_data_ptr<scalar_t>();
    const at::Tensor sums = for_blocks(blocks, [=](int64_t row, int64_t begin, int64_t size) {
      return gradient_block<scalar_t>(from + begin, in + begin, out + begin, size, scales[row], low, high, ceiling);
    });
    const double* sum = sums.const_data_ptr<double>();
    scalar_t* out_scale = grad_scale.mutable_data_ptr<scalar_t>();
    for (int64_t row = 0; row < scale.numel(); ++row, sum += blocks.per_row) {
      out_scale[row] = static_cast<scalar_t>(std::accumulate(sum, sum + blocks.per_row, 0.0) * factor);
    }
  });
  return {grad_x, grad_scale};
}

// keeps its input (which the layer before has kept as well) and no copy or mask
class Quantize : public torch::autograd::Function<Quantize> {
 public:
  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& x,
      const at::Tensor& scale,
      int64_t low,
      int64_t high,
      double factor,
      double ceiling) {
    context->save_for_backward({x, scale});
    context->saved_data["low"] = low;
    context->saved_data["high"] = high;
    context->saved_data["factor"] = factor;
    context->saved_data["ceiling"] = ceiling;
    return quantize(x, scale, low, high, ceiling);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    auto [grad_x, grad_scale] = gradients(
        grads[0],
        saved[0],
        saved[1],
        data["low"].toInt(),
        data["high"].toInt(),
        data["factor"].toDouble(),
        data["ceiling"].toDouble());
    return {grad_x, grad_scale, {}, {}, {}, {}};
  }
};

at::Tensor lsq(
    const at::Tensor& x, const at::Tensor& scale, int64_t low, int64_t high, double factor, double ceiling) {
  return Quantize::apply(x, scale, low, high, factor, ceiling);
}

at::Tensor lsq_without_gradient(
    const at::Tensor& x, const at::Tensor& scale, int64_t low, int64_t high, double /*factor*/, double ceiling) {
  return quantize(x, scale, low, high, ceiling);
}

}  // namespace

TORCH_LIBRARY(nncf_mpq_plugin, library) {
  library.def("lsq(Tensor x, Tensor scale, int low, int high, float factor, float ceiling) -> Tensor");
}

TORCH_LIBRARY_IMPL(nncf_mpq_plugin, CPU, library) {
  library.impl("lsq", &lsq_without_gradient);
}

TORCH_LIBRARY_IMPL(nncf_mpq_plugin, AutogradCPU, library) {
  library.impl("lsq", &lsq);
}
