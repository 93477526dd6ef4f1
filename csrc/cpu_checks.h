// What the CPU operators ask of their arguments: each check raises one error that names the operator, the argument, the
// rule and the value. Included once, by cpu_ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

namespace {

const char* name_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return "float32";
  if (dtype == ScalarType::BFloat16) return "bfloat16";
  if (dtype == ScalarType::Half) return "float16";
  if (dtype == ScalarType::Double) return "float64";
  if (dtype == ScalarType::Int) return "int32";
  if (dtype == ScalarType::Long) return "int64";
  if (dtype == ScalarType::Char) return "int8";
  if (dtype == ScalarType::Bool) return "bool";
  return "another dtype";
}

void check_float(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
                  " must be float32 or bfloat16, got ", name_of(dtype));
}

void check_same_dtype(const char* op, const char* name, const Tensor& x, const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name, ", ",
                  name_of(like.scalar_type()), ", got ", name_of(x.scalar_type()));
}

void check_dims(const char* op, const char* name, const Tensor& x, int64_t dims, const char* axes) {
  STD_TORCH_CHECK(x.dim() == dims, op, ": ", name, " must be ", axes, ", got ", x.dim(), " axes");
}

void check_int32(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32, got ", name_of(x.scalar_type()));
}

void check_size(const char* op, const char* what, int64_t got, int64_t expected) {
  STD_TORCH_CHECK(got == expected, op, ": ", what, " must be ", expected, ", got ", got);
}

void check_unit_stride(const char* op, const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) <= 1 || x.stride(last) == 1, op, ": the last stride of ", name, " must be 1, got ",
                  x.stride(last));
}

void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  check_dims(op, "k_cache", k_cache, 4, "(num_blocks, block_size, kv heads, head dim)");
  check_dims(op, "v_cache", v_cache, 4, "(num_blocks, block_size, kv heads, head dim)");
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(v_cache.size(axis) == k_cache.size(axis), op, ": v_cache must have k_cache's shape, got ",
                    v_cache.size(axis), " instead of ", k_cache.size(axis), " in axis ", axis);
  }
  STD_TORCH_CHECK(k_cache.size(1) >= 1, op, ": block_size must be >= 1, got ", k_cache.size(1));
  check_unit_stride(op, "k_cache", k_cache);
  check_unit_stride(op, "v_cache", v_cache);
}

void check_vector(const char* op, const char* name, const Tensor& x, ScalarType dtype, int64_t length) {
  const bool fits = x.scalar_type() == dtype && x.dim() == 1 && x.numel() == length && x.is_contiguous();
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a vector of ", length, " dense ", name_of(dtype), ", got ", x.numel(),
                  " of ", name_of(x.scalar_type()), " in ", x.dim(), x.is_contiguous() ? " axes" : " axes, strided");
}

template <class T>
const T* vector_of(const char* op, const char* name, const Tensor& x, ScalarType dtype, int64_t length) {
  check_vector(op, name, x, dtype, length);
  return static_cast<const T*>(x.const_data_ptr());
}

// Rows of C values: (R, C) with a dense last axis, or any shape (..., C) that is contiguous.
void check_rows(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, ": ", name, " must be (..., C) with C >= 1");
  if (x.is_contiguous()) return;
  check_dims(op, name, x, 2, "(R, C), or contiguous");
  check_unit_stride(op, name, x);
}

void check_rows_like(const char* op, const char* name, const Tensor& x, const char* like_name, const Tensor& like) {
  check_rows(op, name, x);
  check_same_dtype(op, name, x, like_name, like);
  const int64_t columns = like.size(like.dim() - 1), values = like.numel();
  STD_TORCH_CHECK(x.size(x.dim() - 1) == columns, op, ": ", name, "'s columns must be ", columns, ", got ",
                  x.size(x.dim() - 1));
  STD_TORCH_CHECK(x.numel() == values, op, ": ", name, "'s values must be ", values, ", got ", x.numel());
}

template <class T>
const T* data_or_null(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
T* result_of(MaybeTensor& x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

}  // namespace
