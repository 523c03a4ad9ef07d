// The checks of dtypes, shapes, strides and indices.
#include "tensors.h"

#include <algorithm>
#include <cmath>

namespace selfextend {
namespace {

Type type_of(const at::Tensor& tensor, const char* name, bool is_cache) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat32;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kFloat16;
    case at::kFloat8_e4m3fn:
    case at::kByte:
      if (is_cache) return Type::kFloat8E4M3;
      [[fallthrough]];
    default:
      TORCH_CHECK_VALUE(false, name, " has dtype ", tensor.scalar_type(), "; it must be float32, bfloat16",
                        is_cache ? ", float16 or float8_e4m3fn." : " or float16.");
  }
}

// The values of a tensor of integers: its first dimension holds at least `size`, its last is contiguous.
template <class T>
const T* integers_of(const at::Tensor& tensor, const char* name, int64_t size) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == c10::CppTypeToScalarType<T>::value && tensor.dim() >= 1 &&
                        tensor.size(0) >= size && tensor.stride(-1) == 1,
                    name, " must be ", c10::CppTypeToScalarType<T>::value, " of size ", size,
                    " or more, its last dimension contiguous; it is ", tensor.scalar_type(), " of ", tensor.sizes());
  return tensor.const_data_ptr<T>();
}

}  // namespace

int count_of(int64_t number, const char* name, int64_t least, int64_t most) {
  TORCH_CHECK_VALUE(number >= least && number <= most, name, " is ", number, "; it must be from ", least, " to ", most,
                    ".");
  return static_cast<int>(number);
}

void set_shape(Layer& layer, int64_t num_heads, int64_t num_kv_heads, int64_t head_size) {
  TORCH_CHECK_VALUE(head_size > 0 && head_size % kPanel == 0 && head_size <= kMaxHeadSize, "head_size is ", head_size,
                    "; it must be a multiple of ", kPanel, " up to ", kMaxHeadSize, ".");
  layer.head_size = static_cast<int>(head_size);
  layer.num_kv_heads = count_of(num_kv_heads, "num_kv_heads", 1, kMaxPositions);
  layer.num_heads = count_of(num_heads, "num_heads", 1, kMaxPositions);
  TORCH_CHECK_VALUE(num_heads % num_kv_heads == 0, "num_heads is ", num_heads,
                    "; it must be a multiple of num_kv_heads, ", num_kv_heads, ".");
}

Rows rows_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 3 && tensor.stride(2) == 1, name,
                    " must be [num_tokens, heads, head_size] with contiguous heads; its shape is ", tensor.sizes(),
                    ", its strides ", tensor.strides());
  return {static_cast<char*>(tensor.data_ptr()), type_of(tensor, name, false), tensor.stride(0), tensor.stride(1)};
}

Cache cache_of(const at::Tensor& kv_cache, int64_t num_kv_heads, int64_t head_size) {
  TORCH_CHECK_VALUE(kv_cache.dim() == 4 && kv_cache.size(1) == num_kv_heads && kv_cache.size(3) == 2 * head_size &&
                        kv_cache.stride(3) == 1 && kv_cache.stride(2) == 2 * head_size,
                    "kv_cache must be [num_blocks, ", num_kv_heads, ", block_size, ", 2 * head_size,
                    "] with contiguous block interiors; its shape is ", kv_cache.sizes(), ", its strides ",
                    kv_cache.strides());
  const int64_t block_size = kv_cache.size(2);
  TORCH_CHECK_VALUE(block_size > 0 && block_size % kPanel == 0 && block_size <= kMaxPositions, "block_size is ",
                    block_size, "; it must be a multiple of ", kPanel, ".");
  return {static_cast<char*>(kv_cache.data_ptr()), type_of(kv_cache, "kv_cache", true), kv_cache.stride(0),
          kv_cache.stride(1)};
}

Requests requests_of(const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                     int64_t num_tokens, const at::Tensor& kv_cache) {
  const int64_t count = seq_lens.size(0), block_size = kv_cache.size(2);
  const int32_t* starts = integers_of<int32_t>(query_start_loc, "query_start_loc", count + 1);
  const int32_t* lens = integers_of<int32_t>(seq_lens, "seq_lens", count);
  const int32_t* table = integers_of<int32_t>(block_table, "block_table", count);
  const int64_t num_blocks = kv_cache.size(0), max_blocks = block_table.size(1), stride = block_table.stride(0);
  for (int64_t request = 0; request < count; ++request) {
    const int64_t query_len = int64_t{starts[request + 1]} - starts[request], seq_len = lens[request];
    TORCH_CHECK_VALUE(starts[request] >= 0 && query_len >= 0 && starts[request + 1] <= num_tokens &&
                          seq_len >= query_len && seq_len <= max_blocks * block_size && seq_len <= kMaxPositions,
                      "request ", request, " has the queries ", starts[request], " to ", starts[request + 1], " of ",
                      num_tokens, ", and ", seq_len, " tokens in ", max_blocks, " blocks of ", block_size);
    for (int64_t i = 0; query_len > 0 && i * block_size < seq_len; ++i) {
      const int32_t block = table[request * stride + i];
      TORCH_CHECK_VALUE(block >= 0 && block < num_blocks, "block_table names block ", block, " for request ", request,
                        "; the cache has ", num_blocks);
    }
  }
  return {count, starts, lens, table, stride};
}

const int64_t* slots_of(const at::Tensor& slot_mapping, int64_t num_tokens, const at::Tensor& kv_cache) {
  const int64_t* slot = integers_of<int64_t>(slot_mapping, "slot_mapping", num_tokens);
  const int64_t num_slots = kv_cache.size(0) * kv_cache.size(2);
  for (int64_t token = 0; token < num_tokens; ++token) {
    TORCH_CHECK_VALUE(slot[token] < num_slots, "slot_mapping names slot ", slot[token], "; the cache has ", num_slots);
  }
  return slot;
}

namespace {

float scale_of(const std::optional<at::Tensor>& scale, const char* name) {
  if (!scale.has_value()) return 1.0f;
  TORCH_CHECK_VALUE(scale->scalar_type() == at::kFloat && scale->numel() == 1, name, " must be one float32; it is ",
                    scale->sizes(), " of ", scale->scalar_type());
  const float value = *scale->const_data_ptr<float>();
  TORCH_CHECK_VALUE(value > 0.0f && std::isfinite(value), name, " is ", value, "; it must be positive and finite.");
  return value;
}

}  // namespace

Layer layer_of(const at::Tensor& rows, const at::Tensor& kv_cache, const std::optional<at::Tensor>& k_scale,
               const std::optional<at::Tensor>& v_scale) {
  Layer layer{};
  set_shape(layer, rows.size(1), kv_cache.size(1), rows.size(2));
  layer.block_size = static_cast<int>(kv_cache.size(2));  // `cache_of` looked at it
  layer.k_scale = scale_of(k_scale, "k_scale");
  layer.v_scale = scale_of(v_scale, "v_scale");
  return layer;
}

void set_group_sizes(Layer& layer, const std::optional<at::Tensor>& group_sizes,
                     const std::optional<at::Tensor>& cos_sin, bool interleaved, const Requests& requests) {
  if (!group_sizes.has_value()) return;
  TORCH_CHECK_VALUE(cos_sin.has_value(),
                    "params.group_sizes is given, and turning needs params.rotation, which is None.");
  TORCH_CHECK_VALUE(cos_sin->scalar_type() == at::kFloat && cos_sin->dim() == 2 && cos_sin->is_contiguous() &&
                        cos_sin->size(1) <= layer.head_size && cos_sin->size(1) % 2 == 0,
                    "params.rotation.cos_sin must be contiguous float32 [steps, an even number up to ", layer.head_size,
                    "]; it is ", cos_sin->sizes(), " of ", cos_sin->scalar_type());
  const int32_t* sizes = integers_of<int32_t>(*group_sizes, "params.group_sizes.eighths", 0);
  for (int64_t request = 0; request < requests.count; ++request) {
    const int64_t end = requests.seq_lens[request];
    const int64_t begin = end - (requests.query_start_loc[request + 1] - requests.query_start_loc[request]);
    if (begin == end) continue;
    TORCH_CHECK_VALUE(end <= group_sizes->numel(), "params.group_sizes has ", group_sizes->numel(),
                      " positions; request ", request, " has ", end);
    int64_t last = kEighths;
    for (int64_t position = begin; position < end; last = sizes[position++]) {
      TORCH_CHECK_VALUE(sizes[position] >= last, "params.group_sizes.eighths holds ", sizes[position], " at position ",
                        position, "; it must be ", kEighths, " or more, and not fall.");
    }
    const int64_t farthest = std::max<int64_t>({end, layer.neighbor_window, kPanel});
    const int64_t steps = farthest - kEighths * farthest / last + 1;
    TORCH_CHECK_VALUE(steps <= cos_sin->size(0), "params.rotation.cos_sin has ", cos_sin->size(0), " rows; request ",
                      request, " of ", end, " tokens and a group size of ", last, " eighths needs ", steps);
  }
  layer.group_sizes = sizes;
  layer.cos_sin = cos_sin->const_data_ptr<float>();
  layer.rotary_dim = static_cast<int>(cos_sin->size(1));
  layer.interleaved = interleaved;
}

at::Tensor set_sinks(Layer& layer, const std::optional<at::Tensor>& sinks) {
  if (!sinks.has_value()) return {};
  TORCH_CHECK_VALUE(sinks->is_floating_point() && sinks->numel() == layer.num_heads, "sinks must be ", layer.num_heads,
                    " floating-point values; they are ", sinks->sizes(), " of ", sinks->scalar_type());
  at::Tensor kept = sinks->to(at::kFloat).contiguous();
  layer.sinks = kept.const_data_ptr<float>();
  return kept;
}

}  // namespace selfextend
