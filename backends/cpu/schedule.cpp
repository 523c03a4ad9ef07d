// Splits a batch so that all threads have work to the end, and little of it is overhead.
#include "schedule.h"

#include <algorithm>
#include <iterator>

namespace selfextend {
namespace {

constexpr int kRowsPerKey = 3;       // a key that is read costs about as much as these rows of queries that see it
constexpr int kManyItems = 16;       // of a thread: the last ones to finish leave little idle
constexpr int kFewItems = 8;         // of a thread: small ones cost more than they are worth, but for idle threads
constexpr int64_t kSmall = 8 << 10;  // effort of a small item
constexpr int kRowsPerMerge = 64;    // rows * parts that a thread joins at a time

int64_t effort(const Item& item, int heads) {
  return int64_t{item.num_tokens * heads + kRowsPerKey} * (item.key_end - item.key_begin);
}

// Blocks of at most `tokens` queries of one request, group size and KV head, each over all keys that its queries see.
std::vector<Item> split_queries(const Layer& layer, const Requests& requests, int tokens) {
  std::vector<Item> blocks;
  for (int64_t request = 0; request < requests.count; ++request) {
    const int end = requests.query_start_loc[request + 1];
    for (int token = requests.query_start_loc[request]; token < end;) {
      Item block{};
      block.first_token = token;
      block.num_tokens = std::min(tokens, end - token);
      block.first_position = requests.seq_lens[request] - (end - token);
      block.eighths = kEighths;
      if (layer.group_sizes != nullptr) {
        const int32_t* sizes = layer.group_sizes + block.first_position;
        block.eighths = *sizes;
        block.num_tokens = static_cast<int>(std::upper_bound(sizes, sizes + block.num_tokens, *sizes) - sizes);
      }
      token += block.num_tokens;
      block.key_end = block.first_position + block.num_tokens;
      if (layer.sliding_window > 0) {
        block.key_begin = std::max(0, block.first_position - layer.sliding_window + 1) / kTile * kTile;
      }
      block.blocks = requests.block_table + request * requests.table_stride;
      block.partial = -1;
      for (block.kv_head = 0; block.kv_head < layer.num_kv_heads; ++block.kv_head) blocks.push_back(block);
    }
  }
  return blocks;
}

}  // namespace

Work split_batch(const Layer& layer, const Requests& requests, int rows, int threads) {
  const int heads = layer.num_heads / layer.num_kv_heads;
  const std::vector<Item> blocks = split_queries(layer, requests, std::max(1, rows / heads));
  int64_t total = 0, largest = 0;
  for (const Item& block : blocks) {
    total += effort(block, heads);
    largest = std::max(largest, effort(block, heads));
  }
  const int64_t per_thread = total / threads, blocks_per_thread = (std::ssize(blocks) + threads - 1) / threads;
  int64_t share = std::max<int64_t>(1, std::max(per_thread / kManyItems, std::min(kSmall, per_thread / kFewItems)));
  // Small blocks that come out even are left as they are: parts have to be merged.
  if (largest <= kSmall && blocks_per_thread * largest <= per_thread * 11 / 10) share = largest;

  Work work;
  for (const Item& block : blocks) {
    const int block_rows = block.num_tokens * heads, keys = block.key_end - block.key_begin;
    work.most_rows = std::max(work.most_rows, block_rows);
    const int64_t parts = threads > 1 ? std::max<int64_t>(1, effort(block, heads) / share) : 1;
    const int keys_per_part = std::max<int>(kTile, (keys / parts + kTile / 2) / kTile * kTile);
    if (parts == 1 || keys_per_part >= keys) {
      work.items.push_back(block);
      continue;
    }
    Merge merge{block, 0, 0, 0, int64_t{block_rows} * (layer.head_size + 2)};
    merge.item.partial = work.partial_floats;
    for (Item part = block; part.key_begin < block.key_end; part.key_begin += keys_per_part, ++merge.parts) {
      part.key_end = std::min(part.key_begin + keys_per_part, block.key_end);
      part.partial = work.partial_floats;
      work.items.push_back(part);
      work.partial_floats += merge.stride;
    }
    const int rows_per_merge = std::max(1, kRowsPerMerge / merge.parts);
    for (; merge.row_begin < block_rows; merge.row_begin = merge.row_end) {
      merge.row_end = std::min(merge.row_begin + rows_per_merge, block_rows);
      work.merges.push_back(merge);
    }
  }
  std::stable_sort(work.items.begin(), work.items.end(),
                   [heads](const Item& a, const Item& b) { return effort(a, heads) > effort(b, heads); });
  return work;
}

}  // namespace selfextend
