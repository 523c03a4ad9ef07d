// The two calls of interface.py as torch operators: checks, the choice of the vector code, and the split into items.
#include <Python.h>
// Python's header comes before all others.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernel.h"

namespace selfextend {
namespace {

constexpr int kItemsPerThread = 16;        // so that the last ones to finish leave little idle
constexpr int64_t kLeastEffort = 4 << 10;  // query rows * keys: less is not worth an item of its own

const std::vector<const Kernel*>& runnable_kernels() {
  static const std::vector<const Kernel*> kernels = [] {
    std::vector<const Kernel*> found;
#ifdef SELFEXTEND_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
  }();
  return kernels;
}

// The instruction sets that this machine runs, best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernel* kernel : runnable_kernels()) names.emplace_back(kernel->name);
  return names;
}

const Kernel& find_kernel(const std::string& instruction_set) {
  for (const Kernel* kernel : runnable_kernels()) {
    if (instruction_set == kernel->name) return *kernel;
  }
  TORCH_CHECK_VALUE(false, "instruction_set is '", instruction_set, "'; this machine runs ", instruction_sets());
}

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
  TORCH_CHECK_VALUE(kv_cache.size(2) % kPanel == 0, "block_size is ", kv_cache.size(2), "; it must be a multiple of ",
                    kPanel, ".");
  return {static_cast<char*>(kv_cache.data_ptr()), type_of(kv_cache, "kv_cache", true), kv_cache.stride(0),
          kv_cache.stride(1)};
}

template <class T>
const T* integers(const at::Tensor& tensor, const char* name, int64_t size) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == c10::CppTypeToScalarType<T>::value && tensor.dim() >= 1 &&
                        tensor.size(0) >= size && tensor.stride(-1) == 1,
                    name, " must hold ", size, " contiguous values of ", c10::CppTypeToScalarType<T>::value, "; it is ",
                    tensor.sizes(), " of ", tensor.scalar_type());
  return tensor.const_data_ptr<T>();
}

int64_t lag(int64_t position, int64_t group_size) { return position - position / group_size; }

// Checks what both calls need of a layer, and gives one that groups positions its rotation; `max_position` is the
// largest position they will rotate.
void complete_layer(Layer& layer, const std::optional<at::Tensor>& cos_sin, bool interleaved, int64_t max_position) {
  TORCH_CHECK_VALUE(layer.head_size % kPanel == 0 && layer.head_size <= kMaxHeadSize, "head_size is ", layer.head_size,
                    "; it must be a multiple of ", kPanel, " up to ", kMaxHeadSize, ".");
  TORCH_CHECK_VALUE(layer.num_heads % layer.num_kv_heads == 0, "num_heads is ", layer.num_heads,
                    "; it must be a multiple of num_kv_heads, ", layer.num_kv_heads, ".");
  if (layer.group_size == 1) return;
  TORCH_CHECK_VALUE(cos_sin.has_value(), "group_size is ", layer.group_size,
                    ", and re-rotating needs params.rotation, which is None.");
  const int64_t needed = std::max<int64_t>({lag(max_position, layer.group_size), lag(kPanel, layer.group_size),
                                            int64_t{layer.neighbor_window} - layer.neighbor_window / layer.group_size});
  TORCH_CHECK_VALUE(cos_sin->scalar_type() == at::kFloat && cos_sin->dim() == 2 && cos_sin->is_contiguous() &&
                        cos_sin->size(0) > needed && cos_sin->size(1) <= layer.head_size && cos_sin->size(1) % 2 == 0,
                    "params.rotation.cos_sin must be contiguous float32 [more than ", needed, ", at most ",
                    layer.head_size, "]; it is ", cos_sin->sizes(), " of ", cos_sin->scalar_type());
  layer.cos_sin = cos_sin->const_data_ptr<float>();
  layer.rotary_dim = static_cast<int>(cos_sin->size(1));
  layer.interleaved = interleaved;
}

// Memory that a thread keeps from call to call, aligned to a cache line.
class ThreadMemory {
 public:
  float* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<float*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<float, Delete> memory_;
  int64_t size_ = 0;
};

// Runs `action(i)` for i < count on all threads, each taking the next one when it is done with one.
template <class Action>
void for_each(int64_t count, const Action& action) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) action(i);
  });
}

// Partial results of the same queries, in the order of their keys.
struct Merge {
  Item item;
  int parts;
  int64_t stride;
};

// What a batch is split into.
struct Work {
  std::vector<Item> items;  // longest first
  std::vector<Merge> merges;
  int64_t partial_floats = 0;
  int most_rows = 0;
};

// Splits a batch into blocks of queries of one request and KV head, and the longest of those over their context. The
// split depends on the batch and the number of threads alone, so a repeated run repeats every rounding.
Work split_batch(const Layer& layer, const Kernel& kernel, const int32_t* query_start_loc, const int32_t* seq_lens,
                 const int32_t* block_table, int64_t table_stride, int64_t num_reqs) {
  const int heads = layer.num_heads / layer.num_kv_heads;
  const int tokens = std::max(1, kernel.preferred_rows(layer.head_size) / heads);
  const auto effort = [heads](const Item& item) {
    return int64_t{item.num_tokens} * heads * (item.key_end - item.key_begin);
  };
  std::vector<Item> blocks;
  int64_t total = 0;
  for (int64_t request = 0; request < num_reqs; ++request) {
    const int end = query_start_loc[request + 1];
    for (int token = query_start_loc[request]; token < end; token += tokens) {
      Item block{};
      block.first_token = token;
      block.num_tokens = std::min(tokens, end - token);
      block.first_position = seq_lens[request] - (end - token);
      block.key_end = block.first_position + block.num_tokens;
      if (layer.sliding_window > 0) {
        block.key_begin = std::max(0, block.first_position - layer.sliding_window + 1) / kTile * kTile;
      }
      block.blocks = block_table + request * table_stride;
      block.partial = -1;
      for (block.kv_head = 0; block.kv_head < layer.num_kv_heads; ++block.kv_head) blocks.push_back(block);
      total += effort(block) * layer.num_kv_heads;
    }
  }

  Work work;
  const int threads = at::get_num_threads();
  const int64_t share = std::max(kLeastEffort, total / (int64_t{threads} * kItemsPerThread));
  for (const Item& block : blocks) {
    const int rows = block.num_tokens * heads, keys = block.key_end - block.key_begin;
    work.most_rows = std::max(work.most_rows, rows);
    const int64_t parts = threads > 1 ? std::max<int64_t>(1, effort(block) / share) : 1;
    const int keys_a_part = static_cast<int>((keys + parts * kTile - 1) / (parts * kTile) * kTile);
    if (keys_a_part >= keys) {
      work.items.push_back(block);
      continue;
    }
    Merge merge{block, 0, int64_t{rows} * (layer.head_size + 2)};
    merge.item.partial = work.partial_floats;
    for (Item part = block; part.key_begin < block.key_end; part.key_begin += keys_a_part, ++merge.parts) {
      part.key_end = std::min(part.key_begin + keys_a_part, block.key_end);
      part.partial = work.partial_floats;
      work.items.push_back(part);
      work.partial_floats += merge.stride;
    }
    work.merges.push_back(merge);
  }
  std::stable_sort(work.items.begin(), work.items.end(),
                   [&](const Item& a, const Item& b) { return effort(a) > effort(b); });
  return work;
}

void attention(const at::Tensor& query, const at::Tensor& kv_cache, const at::Tensor& query_start_loc,
               const at::Tensor& seq_lens, const at::Tensor& block_table, const at::Tensor& out, double scale,
               int64_t group_size, int64_t neighbor_window, int64_t exact_len, int64_t log_scale_len, double soft_cap,
               int64_t sliding_window, const std::optional<at::Tensor>& cos_sin, bool interleaved,
               const std::optional<at::Tensor>& sinks, double k_scale, double v_scale,
               const std::string& instruction_set) {
  const Kernel& kernel = find_kernel(instruction_set);
  const Rows queries = rows_of(query, "query"), outputs = rows_of(out, "out");
  TORCH_CHECK_VALUE(query.sizes() == out.sizes(), "out is ", out.sizes(), "; it must be as query, ", query.sizes());
  const Cache cache = cache_of(kv_cache, kv_cache.size(1), query.size(2));
  const int64_t num_reqs = seq_lens.size(0), block_size = kv_cache.size(2);
  const int32_t* starts = integers<int32_t>(query_start_loc, "query_start_loc", num_reqs + 1);
  const int32_t* lens = integers<int32_t>(seq_lens, "seq_lens", num_reqs);
  const int32_t* table = integers<int32_t>(block_table, "block_table", num_reqs);
  int64_t longest = 0;
  for (int64_t request = 0; request < num_reqs; ++request) {
    const int64_t query_len = int64_t{starts[request + 1]} - starts[request], seq_len = lens[request];
    TORCH_CHECK_VALUE(starts[request] >= 0 && query_len >= 0 && starts[request + 1] <= query.size(0) &&
                          seq_len >= query_len && seq_len <= block_table.size(1) * block_size,
                      "request ", request, " has the queries ", starts[request], " to ", starts[request + 1], " of ",
                      query.size(0), ", and ", seq_len, " tokens in ", block_table.size(1), " blocks of ", block_size);
    for (int64_t i = 0; query_len > 0 && i * block_size < seq_len; ++i) {
      const int32_t block = table[request * block_table.stride(0) + i];
      TORCH_CHECK_VALUE(block >= 0 && block < kv_cache.size(0), "block_table names block ", block, " for request ",
                        request, "; the cache has ", kv_cache.size(0));
    }
    longest = std::max(longest, seq_len);
  }

  Layer layer{};
  layer.num_heads = static_cast<int>(query.size(1));
  layer.num_kv_heads = static_cast<int>(kv_cache.size(1));
  layer.head_size = static_cast<int>(query.size(2));
  layer.block_size = static_cast<int>(block_size);
  layer.group_size = static_cast<int>(group_size);
  // Windows and lengths past every position are all the same.
  layer.neighbor_window = static_cast<int>(std::min(neighbor_window, int64_t{1} << 30));
  layer.exact_len = static_cast<int>(std::min(exact_len, int64_t{1} << 30));
  layer.sliding_window = static_cast<int>(std::min(sliding_window, int64_t{1} << 30));
  layer.scale = static_cast<float>(scale);
  layer.soft_cap = static_cast<float>(soft_cap);
  layer.log_scale = log_scale_len > 0 ? static_cast<float>(1.0 / std::log(static_cast<double>(log_scale_len))) : 0.0f;
  layer.k_scale = static_cast<float>(k_scale);
  layer.v_scale = static_cast<float>(v_scale);
  complete_layer(layer, cos_sin, interleaved, std::max<int64_t>(longest - 1, 0));
  if (sinks.has_value()) {
    TORCH_CHECK_VALUE(sinks->scalar_type() == at::kFloat && sinks->is_contiguous() && sinks->numel() == query.size(1),
                      "sinks must be ", query.size(1), " values of float32; they are ", sinks->sizes(), " of ",
                      sinks->scalar_type());
    layer.sinks = sinks->const_data_ptr<float>();
  }

  const Work work = split_batch(layer, kernel, starts, lens, table, block_table.stride(0), num_reqs);
  thread_local ThreadMemory partial_memory;
  float* partials = partial_memory.at_least(work.partial_floats * static_cast<int64_t>(sizeof(float)));
  const int64_t scratch_bytes = kernel.scratch_bytes(layer, work.most_rows);
  for_each(static_cast<int64_t>(work.items.size()), [&](int64_t i) {
    thread_local ThreadMemory scratch;
    kernel.attend(layer, cache, queries, outputs, work.items[i], scratch.at_least(scratch_bytes), partials);
  });
  for_each(static_cast<int64_t>(work.merges.size()), [&](int64_t i) {
    const Merge& merge = work.merges[i];
    kernel.merge(layer, outputs, merge.item, partials + merge.item.partial, merge.parts, merge.stride);
  });
}

void store_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache, const at::Tensor& positions,
              const at::Tensor& slot_mapping, int64_t group_size, const std::optional<at::Tensor>& cos_sin,
              bool interleaved, double k_scale, double v_scale, const std::string& instruction_set) {
  const Kernel& kernel = find_kernel(instruction_set);
  const Rows keys = rows_of(key, "key"), values = rows_of(value, "value");
  TORCH_CHECK_VALUE(key.sizes() == value.sizes(), "value is ", value.sizes(), "; it must be as key, ", key.sizes());
  const Cache cache = cache_of(kv_cache, key.size(1), key.size(2));
  const int64_t num_tokens = key.size(0), num_slots = kv_cache.size(0) * kv_cache.size(2);
  const int64_t* position = integers<int64_t>(positions, "positions", num_tokens);
  const int64_t* slot = integers<int64_t>(slot_mapping, "slot_mapping", num_tokens);
  int64_t last = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    TORCH_CHECK_VALUE(slot[token] < num_slots, "slot_mapping names slot ", slot[token], "; the cache has ", num_slots);
    TORCH_CHECK_VALUE(position[token] >= 0, "positions holds ", position[token], "; it must be 0 or more.");
    last = std::max(last, position[token]);
  }
  Layer layer{};
  layer.num_heads = layer.num_kv_heads = static_cast<int>(key.size(1));
  layer.head_size = static_cast<int>(key.size(2));
  layer.block_size = static_cast<int>(kv_cache.size(2));
  layer.group_size = static_cast<int>(group_size);
  layer.k_scale = static_cast<float>(k_scale);
  layer.v_scale = static_cast<float>(v_scale);
  complete_layer(layer, cos_sin, interleaved, last);
  at::parallel_for(0, num_tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slot[token] < 0) continue;
      kernel.store(layer, cache, keys, values, token, static_cast<int>(position[token]), slot[token]);
    }
  });
}

}  // namespace

TORCH_LIBRARY(vllm_selfextend_cpu, library) {
  library.def("instruction_sets() -> str[]", &instruction_sets);
  library.def(
      "attention(Tensor query, Tensor kv_cache, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "Tensor(a!) "
      "out, float scale, int group_size, int neighbor_window, int exact_len, int log_scale_len, float soft_cap, int "
      "sliding_window, Tensor? cos_sin, bool interleaved, Tensor? sinks, float k_scale, float v_scale, str "
      "instruction_set) -> ()",
      &attention);
  library.def(
      "store_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor positions, Tensor slot_mapping, int group_size, "
      "Tensor? cos_sin, bool interleaved, float k_scale, float v_scale, str instruction_set) -> ()",
      &store_kv);
}

}  // namespace selfextend

// Importing the module registers the operators; it holds nothing itself.
PyMODINIT_FUNC PyInit__kernels() {
  static PyModuleDef module = [] {
    PyModuleDef definition{};
    definition.m_base = PyModuleDef_HEAD_INIT;
    definition.m_name = "_kernels";
    return definition;
  }();
  return PyModule_Create(&module);
}
