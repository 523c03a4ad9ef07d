// The two calls of interface.py as torch operators: from tensors to plain data, to items, to threads.
#include <Python.h>
// Python's header comes before all others.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "instruction_sets.h"
#include "kernel.h"
#include "schedule.h"
#include "tensors.h"

namespace selfextend {
namespace {

// Memory kept per thread, from call to call, aligned to a cache line.
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

// A number that a layer adds up or multiplies as float32.
float finite(double number, const char* name) {
  const float value = static_cast<float>(number);
  TORCH_CHECK_VALUE(std::isfinite(value), name, " is ", number, "; it must be a finite float32.");
  return value;
}

void attention(const at::Tensor& query, const at::Tensor& kv_cache, const at::Tensor& query_start_loc,
               const at::Tensor& seq_lens, const at::Tensor& block_table, const at::Tensor& out,
               const std::optional<at::Tensor>& group_sizes, const std::optional<at::Tensor>& cos_sin, bool interleaved,
               const std::string& instruction_set, double scale, int64_t neighbor_window, int64_t log_scale_len,
               double soft_cap, int64_t sliding_window, const std::optional<at::Tensor>& sinks,
               const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale) {
  const Kernel& kernel = find_kernel(instruction_set);
  const Rows queries = rows_of(query, "query"), outputs = rows_of(out, "out");
  TORCH_CHECK_VALUE(query.sizes() == out.sizes(), "out is ", out.sizes(), "; it must be as query, ", query.sizes());
  const Cache cache = cache_of(kv_cache, kv_cache.size(1), query.size(2));
  const Requests requests = requests_of(query_start_loc, seq_lens, block_table, query.size(0), kv_cache);
  Layer layer = layer_of(query, kv_cache, k_scale, v_scale);
  layer.neighbor_window = count_of(neighbor_window, "neighbor_window", 1, kMaxPositions);
  layer.sliding_window = count_of(sliding_window, "sliding_window", 0, kMaxPositions);
  layer.scale = finite(scale, "scale");
  layer.soft_cap = finite(soft_cap, "soft_cap");
  TORCH_CHECK_VALUE(soft_cap >= 0.0, "soft_cap is ", soft_cap, "; it must be 0 (off) or positive.");
  TORCH_CHECK_VALUE(log_scale_len == 0 || (log_scale_len >= 2 && log_scale_len <= kMaxPositions), "log_scale_len is ",
                    log_scale_len, "; it must be 0 (off), or from 2 to ", kMaxPositions, ".");
  layer.log_scale = log_scale_len > 0 ? static_cast<float>(1.0 / std::log(static_cast<double>(log_scale_len))) : 0.0f;
  set_group_sizes(layer, group_sizes, cos_sin, interleaved, requests);
  const at::Tensor kept = set_sinks(layer, sinks);

  const Work work = split_batch(layer, requests, kernel.preferred_rows(layer.head_size), at::get_num_threads());
  thread_local ThreadMemory partial_memory;
  float* partials = partial_memory.at_least(work.partial_floats * static_cast<int64_t>(sizeof(float)));
  const int64_t scratch_bytes = kernel.scratch_bytes(layer, work.most_rows);
  for_each(static_cast<int64_t>(work.items.size()), [&](int64_t i) {
    thread_local ThreadMemory scratch;
    kernel.attend(layer, cache, queries, outputs, work.items[i], scratch.at_least(scratch_bytes), partials);
  });
  for_each(static_cast<int64_t>(work.merges.size()), [&](int64_t i) {
    const Merge& merge = work.merges[i];
    kernel.merge(layer, outputs, merge.item, merge.row_begin, merge.row_end, partials + merge.item.partial, merge.parts,
                 merge.stride);
  });
}

void store_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache,
              const at::Tensor& slot_mapping, const std::string& instruction_set,
              const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale) {
  const Kernel& kernel = find_kernel(instruction_set);
  const Rows keys = rows_of(key, "key"), values = rows_of(value, "value");
  TORCH_CHECK_VALUE(key.sizes() == value.sizes(), "value is ", value.sizes(), "; it must be as key, ", key.sizes());
  const Cache cache = cache_of(kv_cache, key.size(1), key.size(2));
  const int64_t* slots = slots_of(slot_mapping, key.size(0), kv_cache);
  const Layer layer = layer_of(key, kv_cache, k_scale, v_scale);
  at::parallel_for(0, key.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slots[token] >= 0) kernel.store(layer, cache, keys, values, token, slots[token]);
    }
  });
}

// How a step would be split: [items, 2], rows and keys of each in the order in which threads take them, and [merges,
// 2], rows and parts of each. What a test asks for numbers of threads that no machine here has.
std::tuple<at::Tensor, at::Tensor> work_split(const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                                              int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
                                              int64_t sliding_window, const std::string& instruction_set,
                                              int64_t threads) {
  TORCH_CHECK_VALUE(query_start_loc.scalar_type() == at::kInt && seq_lens.scalar_type() == at::kInt &&
                        query_start_loc.is_contiguous() && seq_lens.is_contiguous() &&
                        query_start_loc.numel() == seq_lens.numel() + 1,
                    "query_start_loc and seq_lens must be int32, and the first longer by one");
  Layer layer{};
  set_shape(layer, num_heads, num_kv_heads, head_size);
  layer.sliding_window = count_of(sliding_window, "sliding_window", 0, kMaxPositions);
  Requests requests{};
  requests.count = seq_lens.numel();
  requests.query_start_loc = query_start_loc.const_data_ptr<int32_t>();
  requests.seq_lens = seq_lens.const_data_ptr<int32_t>();
  const Work work = split_batch(layer, requests, find_kernel(instruction_set).preferred_rows(layer.head_size),
                                count_of(threads, "threads", 1, kMaxPositions));
  const int64_t heads = num_heads / num_kv_heads;
  const auto table = [](const auto& things, const auto& row) {
    at::Tensor result = at::empty({static_cast<int64_t>(things.size()), 2}, at::kLong);
    auto* to = result.mutable_data_ptr<int64_t>();
    for (const auto& thing : things) std::tie(to[0], to[1]) = row(thing), to += 2;
    return result;
  };
  return {table(work.items,
                [&](const Item& item) {
                  return std::tuple<int64_t, int64_t>{item.num_tokens * heads, item.key_end - item.key_begin};
                }),
          table(work.merges, [&](const Merge& merge) {
            return std::tuple<int64_t, int64_t>{merge.row_end - merge.row_begin, merge.parts};
          })};
}

// Heads have a multiple of the first number, up to the second.
std::tuple<int64_t, int64_t> head_sizes() { return {kPanel, kMaxHeadSize}; }

// What follows `instruction_set` is named as interface.AttentionParams names it: Python passes those by these names.
constexpr const char* kAttention = R"(attention(
    Tensor query, Tensor kv_cache, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, Tensor(a!) out,
    Tensor? group_sizes, Tensor? cos_sin, bool interleaved, str instruction_set,
    float scale, int neighbor_window, int log_scale_len, float soft_cap, int sliding_window, Tensor? sinks,
    Tensor? k_scale, Tensor? v_scale) -> ())";

constexpr const char* kStoreKv = R"(store_kv(
    Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, str instruction_set,
    Tensor? k_scale, Tensor? v_scale) -> ())";

constexpr const char* kWorkSplit = R"(work_split(
    Tensor query_start_loc, Tensor seq_lens, int num_heads, int num_kv_heads, int head_size, int sliding_window,
    str instruction_set, int threads) -> (Tensor, Tensor))";

}  // namespace

TORCH_LIBRARY(vllm_selfextend_cpu, library) {
  library.def("instruction_sets() -> str[]", &instruction_sets);
  library.def("head_sizes() -> (int, int)", &head_sizes);
  library.def(kAttention, &attention);
  library.def(kStoreKv, &store_kv);
  library.def(kWorkSplit, &work_split);
}

}  // namespace selfextend

// Importing the module registers the operators; it holds nothing itself. Its name ends in torch's version: setup.py.
PyMODINIT_FUNC SELFEXTEND_INIT() {
  static PyModuleDef module = [] {
    PyModuleDef definition{};
    definition.m_base = PyModuleDef_HEAD_INIT;
    definition.m_name = "_kernels";
    return definition;
  }();
  return PyModule_Create(&module);
}
