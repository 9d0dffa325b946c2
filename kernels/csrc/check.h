// Argument checks of the op entries. They throw std::runtime_error, which Python sees as a RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace audiomae {

// Unlike STD_TORCH_CHECK, whose messages begin with the function, the file and the line.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(const torch::stable::Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

inline bool is_bfloat16(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16;
}

inline bool is_float32_or_bfloat16(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Float || is_bfloat16(tensor);
}

// Bytes from one element along a dimension to the next. A dimension of one element has no next one, and may have a
// stride of any size, which is not to be multiplied.
inline int64_t byte_step(const torch::stable::Tensor& tensor, int64_t dimension) {
  return tensor.size(dimension) > 1 ? tensor.stride(dimension) * int64_t(tensor.element_size()) : 0;
}

// The tensor if the values along its last dimension lie side by side, else a contiguous copy.
inline torch::stable::Tensor rows_in_one_piece(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// For small operands of any float type.
inline torch::stable::Tensor float32_in_one_piece(const torch::stable::Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, torch::headeronly::ScalarType::Float));
}

}  // namespace audiomae
