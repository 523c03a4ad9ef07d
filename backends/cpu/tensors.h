// From the operators' tensors to the plain data of kernel.h and schedule.h. What does not fit is a ValueError in Python
// that names the values and what is needed: kernels read and write memory without looking.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "kernel.h"
#include "schedule.h"

namespace selfextend {

// A number as an int; an error if it is not from `least` to `most`.
int count_of(int64_t number, const char* name, int64_t least, int64_t most);

// Gives a layer its heads.
void set_shape(Layer& layer, int64_t num_heads, int64_t num_kv_heads, int64_t head_size);

// A tensor [num_tokens, heads, head_size].
Rows rows_of(const at::Tensor& tensor, const char* name);

Cache cache_of(const at::Tensor& kv_cache, int64_t num_kv_heads, int64_t head_size);

// The requests of a step of `num_tokens` tokens.
Requests requests_of(const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                     int64_t num_tokens, const at::Tensor& kv_cache);

// The slots of the new tokens of a step, [num_tokens]; negative: not stored.
const int64_t* slots_of(const at::Tensor& slot_mapping, int64_t num_tokens, const at::Tensor& kv_cache);

// The part of a layer that both calls need; `rows` are its queries or its keys.
Layer layer_of(const at::Tensor& rows, const at::Tensor& kv_cache, const std::optional<at::Tensor>& k_scale,
               const std::optional<at::Tensor>& v_scale);

// Gives a layer its group sizes, if it has any, and its rotation; they reach as far as a batch's requests need them.
void set_group_sizes(Layer& layer, const std::optional<at::Tensor>& group_sizes,
                     const std::optional<at::Tensor>& cos_sin, bool interleaved, const Requests& requests);

// Gives a layer its sinks; what is returned holds them and must be kept.
at::Tensor set_sinks(Layer& layer, const std::optional<at::Tensor>& sinks);

}  // namespace selfextend
