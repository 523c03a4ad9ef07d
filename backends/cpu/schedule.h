// How a batch is split into the items that threads work on. It knows plain data only, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"

namespace selfextend {

// The requests of a step: see interface.AttentionBatch.
struct Requests {
  int64_t count;
  const int32_t* query_start_loc;  // [count + 1]
  const int32_t* seq_lens;         // [count]
  const int32_t* block_table;      // [count, max_blocks], rows `table_stride` apart
  int64_t table_stride;
};

// Partial results of the same queries, in the order of their keys; some of the queries' rows.
struct Merge {
  Item item;
  int row_begin, row_end;
  int parts;
  int64_t stride;  // from one part to the next, in floats
};

// What a batch is split into.
struct Work {
  std::vector<Item> items;     // longest first
  std::vector<Merge> merges;   // to be done when all items are
  int64_t partial_floats = 0;  // memory for the partial results
  int most_rows = 0;           // of any item
};

// Splits a batch into blocks of queries of one request, group size and KV head, and the longest of those over their
// context. `rows` is Kernel::preferred_rows. The split depends on these arguments alone, so a repeated run repeats
// every rounding.
Work split_batch(const Layer& layer, const Requests& requests, int rows, int threads);

}  // namespace selfextend
