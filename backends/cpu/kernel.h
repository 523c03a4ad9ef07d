// What the vector code of one instruction set offers, and the plain data that it works on. kernel.cpp is compiled once
// per instruction set; it and the headers that it includes must not include anything with inline functions (no standard
// library, no torch): the linker could keep a copy that was compiled for a newer machine and use it everywhere.
//
// A cache block of one KV head holds the keys, then the values, in panels of 16 columns:
//
//   keys    [block_size / 16][head_size][16]    columns are keys:                  scores  = query (rows) x panel
//   values  [head_size / 16][block_size][16]    columns are the head's dimensions: output += weights (rows) x panel
//
// so both products of attention are the same one, its right factor is read front to back, and a panel of any type is a
// whole number of vectors on every machine.
#pragma once

#include <cstdint>

namespace selfextend {

constexpr int kPanel = 16;  // columns of a panel
constexpr int kTile = 128;  // keys whose scores are held at once
constexpr int kMaxHeadSize = 512;
constexpr int kEighths = 8;             // limits.EIGHTHS: the group size of ordinary attention
constexpr int kMaxPositions = 1 << 27;  // limits.MAX_POSITIONS: eight times one fits into an int

enum class Type : int8_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };

// The attention layer: see interface.AttentionParams.
struct Layer {
  int num_heads, num_kv_heads, head_size, block_size;
  int neighbor_window, sliding_window;
  float scale, soft_cap;
  float log_scale;             // 1 / ln(log_scale_len), or 0
  float k_scale, v_scale;      // what cached keys and values must be multiplied by
  const int32_t* group_sizes;  // of each position, in eighths; null: ordinary attention
  const float* cos_sin;        // [steps, rotary_dim]: cosines, then sines
  int rotary_dim;
  bool interleaved;
  const float* sinks;  // [num_heads] or null
};

// A tensor [tokens, heads, head_size] whose heads are contiguous. Strides in elements.
struct Rows {
  char* data;
  Type type;
  int64_t token_stride, head_stride;
};

struct Cache {
  char* data;  // [num_blocks, num_kv_heads, block interior], contiguous
  Type type;
  int64_t block_stride, head_stride;  // in elements
};

// What one call of `attend` works on: some queries of one request and group size, and some of the keys they see, of one
// KV head.
struct Item {
  int kv_head;
  int64_t first_token;  // row of the first query in the batch
  int num_tokens;
  int first_position;  // position of the first query in its request; the others follow
  int eighths;         // their group size
  int key_begin;       // position, a multiple of kTile
  int key_end;
  const int32_t* blocks;  // the request's row of the block table
  int64_t partial;        // where among the partial results this one goes; negative: it is whole and goes to `out`
};

// The calls for one instruction set.
struct Kernel {
  const char* name;
  // Queries and heads that `attend` likes to have in an item, for a head size.
  int (*preferred_rows)(int head_size);
  // Bytes of scratch memory for items of at most `rows` rows.
  int64_t (*scratch_bytes)(const Layer&, int rows);
  void (*attend)(const Layer&, const Cache&, const Rows& query, const Rows& out, const Item&, float* scratch,
                 float* partials);
  // Joins `count` partial results of the same queries, `stride` floats apart, into the first, and writes `out`; of the
  // item's rows those from `row_begin` to `row_end`.
  void (*merge)(const Layer&, const Rows& out, const Item&, int row_begin, int row_end, float* partials, int count,
                int64_t stride);
  // Puts the key and value of `token` into `slot`.
  void (*store)(const Layer&, const Cache&, const Rows& key, const Rows& value, int64_t token, int64_t slot);
};

extern const Kernel kPortable;
#ifdef SELFEXTEND_X86
extern const Kernel kAvx2;
extern const Kernel kAvx512;
extern const Kernel kAvx512Bf16;
#endif

}  // namespace selfextend
