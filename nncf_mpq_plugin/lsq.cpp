// LSQ fake quantization for the CPU: one pass over the input forward, one backward (lsq.py documents the formulas).
//
// The work is split into blocks of a fixed size, and a block's sum does not depend on the thread that computes it, so
// gradients are the same for every number of threads. Threads are torch's own: TensorIterator runs the blocks.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorIterator.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
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
  const char* base = static_cast<const char*>(results.data_ptr());
  at::TensorIterator iterator = at::TensorIterator::nullary_op(results);
  const int64_t grain = std::max<int64_t>(1, SERIAL / std::min(blocks.row, BLOCK));
  iterator.for_each(
      [&](char** data, const int64_t* strides, int64_t size) {
        for (int64_t i = 0; i < size; ++i) {
          char* slot = data[0] + i * strides[0];
          const int64_t index = (slot - base) / static_cast<int64_t>(sizeof(double));
          const int64_t row = index / blocks.per_row, offset = index % blocks.per_row * BLOCK;
          *reinterpret_cast<double*>(slot) =
              work(row, row * blocks.row + offset, std::min(BLOCK, blocks.row - offset));
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
void quantize_block(const T* in, T* out, int64_t size, T scale, T low, T high) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    out[i] = clamp(std::nearbyint(in[i] / scale), low, high) * scale;
  }
}

// writes the gradient of the input; returns that of the scale
template <typename T>
double gradient_block(const T* grad, const T* in, T* out, int64_t size, T scale, T low, T high) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const T v = in[i] / scale;
    const T q = clamp(std::nearbyint(v), low, high);
    const bool inside = (v > low) & (v < high);
    out[i] = grad[i] * (inside ? T(1) : T(0));
    sum += (inside ? q - v : q) * grad[i];
  }
  return sum;
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& scale, int64_t low, int64_t high) {
  at::Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lsq_forward", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* scales = scale.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    for_blocks(Blocks(x.numel(), scale.numel()), [=](int64_t row, int64_t begin, int64_t size) {
      quantize_block<scalar_t>(in + begin, out + begin, size, scales[row], low, high);
      return 0.0;
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, int64_t low, int64_t high, double factor) {
  at::Tensor grad_x = at::empty_like(x), sums;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lsq_backward", [&] {
    const scalar_t* above = grad.const_data_ptr<scalar_t>();
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* scales = scale.const_data_ptr<scalar_t>();
    scalar_t* out = grad_x.mutable_data_ptr<scalar_t>();
    sums = for_blocks(Blocks(x.numel(), scale.numel()), [=](int64_t row, int64_t begin, int64_t size) {
      return gradient_block<scalar_t>(above + begin, in + begin, out + begin, size, scales[row], low, high);
    });
  });
  at::Tensor grad_scale = sums.view({scale.numel(), -1}).sum(1).mul_(factor);
  return {grad_x, grad_scale.to(scale.scalar_type()).view(scale.sizes())};
}

}  // namespace

TORCH_LIBRARY(nncf_mpq_plugin, library) {
  library.def("lsq_forward(Tensor x, Tensor scale, int low, int high) -> Tensor");
  library.def(
      "lsq_backward(Tensor grad, Tensor x, Tensor scale, int low, int high, float factor) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(nncf_mpq_plugin, CPU, library) {
  library.impl("lsq_forward", &forward);
  library.impl("lsq_backward", &backward);
}
