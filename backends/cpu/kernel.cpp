// Attention of one item and storing of one token, for the instruction set that this file is compiled for.
#include "kernel.h"

#include "product.h"
#include "turning.h"
#include "vector.h"

namespace {

using selfextend::Cache;
using selfextend::Item;
using selfextend::kTile;
using selfextend::Rows;
using selfextend::Type;

constexpr int kWide = kWidePanels * kPanel;  // columns of a step
constexpr int kStairs = 16;                  // tables of stairs kept
constexpr int kAligned = 16;                 // floats of a cache line
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_inff();

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int clamp(int x, int low, int high) { return max(low, min(x, high)); }
template <class T>
inline T round_up(T x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class T>
struct Tag {
  using type = T;
};

// Calls `action` with a tag of the C++ type that `type` names.
template <class Action>
inline void with_type(Type type, const Action& action) {
  switch (type) {
    case Type::kFloat32:
      return action(Tag<float>{});
    case Type::kBFloat16:
      return action(Tag<BFloat16>{});
    case Type::kFloat16:
      return action(Tag<Float16>{});
    case Type::kFloat8E4M3:
      return action(Tag<Float8E4M3>{});
  }
}

// --- One item

// The working memory of `attend`. Rows are the item's queries: for each token the query heads of the KV head.
struct Scratch {
  float* near_query;  // [rows, head_size]; float32, as `far_query` and `panels` are, or bfloat16 where it is multiplied
  float* far_query;   // the same, turned for grouped keys; not where there are none
  float* factors;     // [rows]: what scores are multiplied by
  float* decays;      // [rows, to a whole vector]: what a row's result is multiplied by where a larger score is met
  float* scores;      // [rows, kTile]; then the weights, in bfloat16 where it is multiplied
  float* far_scores;  // [rows, kWide]: of rows that have neighbors and grouped keys in one step
  float* panels;      // [kWidePanels, head_size or kTile, 16]: a step's right factor
  float* stairs;      // [kStairs, rotary_dim, 16]: of the last phases met
  int stair_phase[kStairs];
  int phase_step;  // phases are multiples of it
  float* rest;     // [rows, head_size + 2]: a result that is whole

  Scratch(const Layer& layer, const Item& item, int rows, float* memory)
      : phase_step(min(item.eighths & -item.eighths, selfextend::kEighths * kPanel)) {
    const auto take = [&memory](int64_t size) {
      float* taken = memory;
      memory += round_up(size, kAligned);
      return taken;
    };
    near_query = take(static_cast<int64_t>(rows) * layer.head_size);
    far_query = take(static_cast<int64_t>(rows) * layer.head_size);
    factors = take(rows);
    decays = take(rows);
    scores = take(static_cast<int64_t>(rows) * kTile);
    far_scores = take(static_cast<int64_t>(rows) * kWide);
    panels = take(static_cast<int64_t>(kWide) * max(layer.head_size, kTile));
    stairs = take(static_cast<int64_t>(kStairs) * layer.rotary_dim * kPanel);
    for (int& phase : stair_phase) phase = -1;
    rest = memory;
  }

  const float* stairs_of(const Layer& layer, int eighths, int first) {
    const int phase = selfextend::kEighths * first % eighths;
    const int place = phase / phase_step % kStairs;
    float* found = stairs + static_cast<int64_t>(place) * layer.rotary_dim * kPanel;
    if (stair_phase[place] != phase) fill_stairs(layer, eighths, first, found);
    stair_phase[place] = phase;
    return found;
  }
};

// The unfinished result of an item: sum over keys of weight * value, the largest score, and the sum of weights.
struct Partial {
  float* output;   // [rows, head_size]
  float* largest;  // [rows]
  float* total;    // [rows]

  Partial(const Layer& layer, int rows, float* memory)
      : output(memory), largest(memory + static_cast<int64_t>(rows) * layer.head_size), total(largest + rows) {}
};

inline int heads_per_kv_head(const Layer& layer) { return layer.num_heads / layer.num_kv_heads; }

template <class Left>
inline void load_queries(const Layer& layer, const Rows& query, const Item& item, Scratch& scratch) {
  const int heads = heads_per_kv_head(layer), size = layer.head_size, eighths = item.eighths;
  auto* near = reinterpret_cast<Left*>(scratch.near_query);
  auto* far = reinterpret_cast<Left*>(scratch.far_query);
  float turned[selfextend::kMaxHeadSize];
  with_type(query.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int row = 0; row < item.num_tokens * heads; ++row, near += size, far += size) {
      const int position = item.first_position + row / heads;
      float factor = layer.scale * layer.k_scale * (layer.soft_cap == 0.0f ? kLog2E : 1.0f);
      if (layer.log_scale != 0.0f) {
        const double log_scale = __builtin_log(position + 1.0) * layer.log_scale;
        if (log_scale > 1.0) factor = static_cast<float>(factor * log_scale);
      }
      scratch.factors[row] = factor;
      const int head = item.kv_head * heads + row % heads;
      const auto* from = reinterpret_cast<const T*>(query.data) +
                         (item.first_token + row / heads) * query.token_stride + head * query.head_stride;
      for (int i = 0; i < size; i += kLanes) store(turned + i, load(from + i));
      for (int i = 0; i < size; i += kLanes) put_factor(near + i, load(turned + i));
      if (eighths == selfextend::kEighths) continue;
      turn_head(layer, lag(layer.neighbor_window, eighths) - lag(position, eighths), turned);
      for (int i = 0; i < size; i += kLanes) put_factor(far + i, load(turned + i));
    }
  });
}

// Applies soft cap and mask to a row of scores, of which the keys begin .. end - 1 of a tile are seen. Returns the
// largest score, as an exponent of 2.
inline float cap_and_mask(const Layer& layer, float factor, float* scores, int begin, int end) {
  const int last = round_up(end, kLanes);
  if (layer.soft_cap != 0.0f) {
    for (int i = 0; i < last; i += kLanes) {
      store(scores + i, tanh(load(scores + i) * (factor / layer.soft_cap)) * (layer.soft_cap * kLog2E));
    }
    factor = 1.0f;
  }
  for (int i = 0; i < begin; ++i) scores[i] = kMinusInfinity;
  for (int i = end; i < last; ++i) scores[i] = kMinusInfinity;
  Float running = load(scores) * factor;
  for (int i = kLanes; i < last; i += kLanes) running = ::max(running, load(scores + i) * factor);
  return largest(running);
}

// Turns a row of scores into weights, those of keys after `end` into zeros, up to the tile's `count`. Returns their
// sum.
template <class Weight>
inline float weigh(float factor, float largest, float* scores, int end, int count) {
  const int last = round_up(end, kLanes);
  Float sums{};
  auto* to = reinterpret_cast<Weight*>(scores);  // not wider, so written after it was read
  for (int i = 0; i < last; i += kLanes) {
    const Float weights = exp2(load(scores + i) * factor - largest);
    sums += weights;
    put_factor(to + i, weights);
  }
  // Pairs of weights are read from any key on, so one past the last key may be.
  const int zeros = kMultiplies<Weight> ? count + 1 : count;
  for (int i = last; i < zeros; i += kLanes) put_factor(to + i, Float{});
  return sum(sums);
}

// What a panel is unpacked to, beside a left factor of `Left`.
template <class Left>
struct Unpacked {
  using type = float;
};
template <>
struct Unpacked<BFloat16> {
  using type = BFloat16Paired;
};

// Attention of one item over a cache of `T`: for each tile of keys the scores, their softmax, and the weighted values.
// `Left` is what queries and weights are for the products: float, or as the cache where such are multiplied.
template <class T, class Left>
class ItemAttention {
 public:
  ItemAttention(const Layer& layer, const Cache& cache, const Item& item, Scratch& scratch, Partial& result)
      : layer_(layer),
        cache_(cache),
        item_(item),
        scratch_(scratch),
        result_(result),
        heads_(heads_per_kv_head(layer)),
        size_(layer.head_size),
        rows_(item.num_tokens * heads_),
        few_rows_(rows_ <= 2 * kMaxRows),
        unpacks_(sizeof(T) != sizeof(float) && !few_rows_),
        near_query_(reinterpret_cast<const Left*>(scratch.near_query)),
        far_query_(reinterpret_cast<const Left*>(scratch.far_query)) {}

  void run() {
    for (int row = 0; row < rows_; ++row) {
      result_.largest[row] = kMinusInfinity;
      result_.total[row] = 0.0f;
    }
    for (int64_t i = 0; i < at(rows_, size_); ++i) result_.output[i] = 0.0f;
    for (int tile = item_.key_begin; tile < item_.key_end; tile += kTile) {
      const int end = min(tile + kTile, item_.key_end);
      for (int step = tile; step < end; step += kWide) score(step, min(step + kWide, end), tile, end);
      // Rows that see something of the tile.
      const int first_row = row_of(tile);
      const int last_row = layer_.sliding_window > 0 ? row_of(end - 1 + layer_.sliding_window) : rows_;
      if (first_row >= last_row) continue;
      soften(first_row, last_row, tile, end);
      // Keys that no row of them sees may hold anything, and 0 * nan is nan.
      const int begin = max(tile, first_key(first_row));
      for (int dim = 0; dim < size_; dim += kWide) add_values(dim, tile, begin, end, first_row, last_row);
    }
  }

 private:
  using Right = typename Unpacked<Left>::type;
  static constexpr int kWeights = kTile * sizeof(float) / sizeof(Left);  // from a row of weights to the next

  static int64_t at(int row, int stride) { return static_cast<int64_t>(row) * stride; }

  int position_of(int row) const { return item_.first_position + row / heads_; }

  // The first key that a row sees.
  int first_key(int row) const {
    return layer_.sliding_window > 0 ? max(0, position_of(row) - layer_.sliding_window + 1) : 0;
  }

  // The first row at `position` or later.
  int row_of(int position) const { return clamp(position - item_.first_position, 0, item_.num_tokens) * heads_; }

  // The interior of the block with the key at `position`.
  const T* block(int position) const {
    return reinterpret_cast<const T*>(cache_.data) + item_.blocks[position / layer_.block_size] * cache_.block_stride +
           item_.kv_head * cache_.head_stride;
  }

  // The panels of kWide keys from `first` on; past the item's last one, that one's again.
  void find_keys(int first, const T** panels) const {
    for (int i = 0; i < kWidePanels; ++i, first += kPanel) {
      const int key = min(first, (item_.key_end - 1) / kPanel * kPanel);
      panels[i] = block(key) + at(key % layer_.block_size, size_);
    }
  }

  // The panels of kWide of the values' dimensions from `dim` on, from the key at `position` on; past the last one, that
  // one's again.
  void find_values(int dim, int position, const T** panels) const {
    const T* values = block(position) + at(layer_.block_size, size_) + position % layer_.block_size * kPanel;
    for (int i = 0; i < kWidePanels; ++i, dim += kPanel) {
      panels[i] = values + at(min(dim, size_ - kPanel), layer_.block_size);
    }
  }

  // Turning keys leaves memory idle: the values of the 16 keys from `first` on, which are needed next, may come.
  void prefetch_values(int first) const {
    const T* values = block(first) + at(layer_.block_size, size_) + first % layer_.block_size * kPanel;
    for (int dim = 0; dim < size_; dim += kPanel) {
      const auto* line = reinterpret_cast<const char*>(values + at(dim, layer_.block_size));
      for (int byte = 0; byte < kPanel * kPanel * static_cast<int>(sizeof(T)); byte += 64) {
        __builtin_prefetch(line + byte, 0, 2);
      }
    }
  }

  // Scores of the keys begin .. end - 1 of a tile, at most kWide of them, for the rows that see any of them.
  void score(int begin, int end, int tile, int tile_end) {
    const int panels = (end - begin + kPanel - 1) / kPanel;
    float* scores = scratch_.scores + begin - tile;
    const T *stored[kWidePanels], *later[kWidePanels];
    Right* unpacked[kWidePanels];
    find_keys(begin, stored);
    const T* const* next = later;
    if (few_rows_) {  // a product has one tile, mostly, and asks for its own panels
      next = stored;
    } else if (end < tile_end) {
      find_keys(end, later);
    } else {
      find_values(0, tile, later);
    }
    for (int i = 0; i < panels; ++i) {
      unpacked[i] = reinterpret_cast<Right*>(scratch_.panels) + at(i, size_ * kPanel);
    }
    // To rows before `near_end` some of the keys are neighbors, to those from `far_begin` on some are not.
    const int seen = row_of(begin);
    int near_end = rows_, far_begin = rows_;
    if (item_.eighths > selfextend::kEighths) {
      near_end = max(seen, row_of(end - 1 + layer_.neighbor_window));
      far_begin = max(seen, row_of(begin + layer_.neighbor_window));
    }
    if (seen < near_end && unpacks_) {
      for (int i = 0; i < panels; ++i) unpack(stored[i], size_, unpacked[i]);
      multiply(near_query_, seen, near_end, unpacked, panels, next, scores + at(seen, kTile), kTile);
    } else if (seen < near_end) {
      multiply(near_query_, seen, near_end, stored, panels, next, scores + at(seen, kTile), kTile);
    }
    if (far_begin == rows_) return;
    // Rows with both kinds, those before `near_end`, have their far scores beside the near ones.
    const bool at_once = scores_turned<Left>(layer_, rows_ - far_begin);
    for (int i = 0; i < panels; ++i) {
      const int first = begin + i * kPanel, steps = lag(first, item_.eighths);
      const float* stairs = scratch_.stairs_of(layer_, item_.eighths, first);
      if (few_rows_) prefetch_values(first);
      if (at_once) {
        const auto score = [&](int row, int row_end, float* to, int64_t stride) {
          if (row == row_end) return;
          score_turned(layer_, steps, stairs, stored[i], far_query_ + at(row, size_), row_end - row,
                       reinterpret_cast<Left*>(scratch_.panels), to + i * kPanel, stride);
        };
        score(far_begin, near_end, scratch_.far_scores, kWide);
        score(near_end, rows_, scores + at(near_end, kTile), kTile);
      } else {
        turn_panel(layer_, steps, stairs, stored[i], unpacked[i]);
      }
    }
    if (!at_once) {
      multiply(far_query_, far_begin, near_end, unpacked, panels, next, scratch_.far_scores, kWide);
      multiply(far_query_, near_end, rows_, unpacked, panels, next, scores + at(near_end, kTile), kTile);
    }
    for (int row = far_begin; row < near_end; ++row) {
      const int count = min(position_of(row) - layer_.neighbor_window + 1, end) - begin;
      for (int i = 0; i < count; ++i) scores[at(row, kTile) + i] = scratch_.far_scores[at(row - far_begin, kWide) + i];
    }
  }

  // The scores of some rows of queries with panels of keys.
  template <class B>
  void multiply(const Left* query, int row, int row_end, const B* const* keys, int panels, const T* const* next,
                float* scores, int64_t stride) {
    product<false>(query + at(row, size_), size_, row_end - row, keys, panels, size_, next, scores, stride);
  }

  // The softmax of rows over the tile begin .. end - 1; what a row has so far shrinks to its new largest score. Each
  // step is taken for all rows before the next one: they do not wait for one another.
  void soften(int first_row, int last_row, int begin, int end) {
    const auto last_key = [&](int row) { return min(end, position_of(row) + 1) - begin; };
    for (int row = first_row; row < last_row; ++row) {
      const float found = cap_and_mask(layer_, scratch_.factors[row], scratch_.scores + at(row, kTile),
                                       max(0, first_key(row) - begin), last_key(row));
      const float before = result_.largest[row];
      result_.largest[row] = found > before ? found : before;
      scratch_.decays[row] = before - result_.largest[row];
    }
    for (int row = first_row; row < last_row; row += kLanes) {
      store(scratch_.decays + row, exp2(load(scratch_.decays + row)));
    }
    for (int row = first_row; row < last_row; ++row) {
      const float factor = layer_.soft_cap == 0.0f ? scratch_.factors[row] : 1.0f, decay = scratch_.decays[row];
      const float sum =
          weigh<Left>(factor, result_.largest[row], scratch_.scores + at(row, kTile), last_key(row), end - begin);
      result_.total[row] = result_.total[row] * decay + sum;
      if (decay == 1.0f) continue;
      float* output = result_.output + at(row, size_);
      for (int i = 0; i < size_; i += kLanes) store(output + i, load(output + i) * decay);
    }
  }

  // Adds to the output's dimensions from `dim` on, at most kWide of them, the weighted values of begin .. end - 1.
  void add_values(int dim, int tile, int begin, int end, int first_row, int last_row) {
    const int panels = min(kWidePanels, (size_ - dim) / kPanel), block_size = layer_.block_size;
    float* output = result_.output + at(first_row, size_) + dim;
    for (int key = begin, key_end; key < end; key = key_end) {  // the tile lies in one block or in several
      key_end = min(end, (key / block_size + 1) * block_size);
      const auto* weights = reinterpret_cast<const Left*>(scratch_.scores + at(first_row, kTile)) + (key - tile);
      const T *stored[kWidePanels], *later[kWidePanels];
      find_values(dim, key, stored);
      const T* const* next = later;
      if (few_rows_) {
        next = stored;
      } else if (key_end < end) {
        find_values(dim, key_end, later);
      } else if (dim + kWide < size_) {
        find_values(dim + kWide, begin, later);
      } else {
        find_keys(tile + kTile, later);
      }
      Right* unpacked[kWidePanels];
      for (int i = 0; i < panels; ++i) {
        unpacked[i] = reinterpret_cast<Right*>(scratch_.panels) + at(i, kTile * kPanel);
      }
      if (unpacks_) {
        for (int i = 0; i < panels; ++i) unpack(stored[i], key_end - key, unpacked[i]);
        product<true>(weights, kWeights, last_row - first_row, unpacked, panels, key_end - key, next, output, size_);
      } else {
        product<true>(weights, kWeights, last_row - first_row, stored, panels, key_end - key, next, output, size_);
      }
    }
  }

  const Layer& layer_;
  const Cache& cache_;
  const Item& item_;
  Scratch& scratch_;
  Partial& result_;
  const int heads_, size_, rows_;
  const bool few_rows_;
  const bool unpacks_;  // with many rows, converting a panel once costs less than converting it for every few rows
  const Left *near_query_, *far_query_;
};

// Divides by the sum of weights, the sinks' included, and writes some of the item's rows of `out`.
inline void finish(const Layer& layer, const Rows& out, const Item& item, int row_begin, int row_end,
                   const Partial& result) {
  const int heads = heads_per_kv_head(layer), size = layer.head_size;
  with_type(out.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int row = row_begin; row < row_end; ++row) {
      const int head = item.kv_head * heads + row % heads;
      float factor = 1.0f, total = result.total[row];
      if (layer.sinks != nullptr) {
        const float sink = layer.sinks[head] * kLog2E, difference = sink - result.largest[row];
        if (difference > 0.0f) {
          factor = exp2(splat(-difference))[0];
          total = total * factor + 1.0f;
        } else {
          total += exp2(splat(difference))[0];
        }
      }
      factor *= layer.v_scale / total;
      const float* output = result.output + static_cast<int64_t>(row) * size;
      auto* to =
          reinterpret_cast<T*>(out.data) + (item.first_token + row / heads) * out.token_stride + head * out.head_stride;
      for (int i = 0; i < size; i += kLanes) put(to + i, load(output + i) * factor);
    }
  });
}

// --- The calls

int preferred_rows(int head_size) { return max(kMaxRows, 24576 / head_size); }

int64_t scratch_bytes(const Layer& layer, int rows) {
  const int64_t floats_per_row = 3 * layer.head_size + kTile + kWide + 4;
  const int64_t floats = rows * floats_per_row + 2 * kAligned +
                         static_cast<int64_t>(kWide) * max(layer.head_size, kTile) +
                         static_cast<int64_t>(kStairs) * layer.rotary_dim * kPanel;
  return floats * static_cast<int64_t>(sizeof(float));
}

template <class T, class Left>
inline void attend_over(const Layer& layer, const Cache& cache, const Rows& query, const Item& item, Scratch& scratch,
                        Partial& result) {
  load_queries<Left>(layer, query, item, scratch);
  ItemAttention<T, Left>(layer, cache, item, scratch, result).run();
}

void attend(const Layer& layer, const Cache& cache, const Rows& query, const Rows& out, const Item& item, float* memory,
            float* partials) {
  const int rows = item.num_tokens * heads_per_kv_head(layer);
  Scratch scratch(layer, item, rows, memory);
  Partial result(layer, rows, item.partial < 0 ? scratch.rest : partials + item.partial);
  with_type(cache.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (kMultiplies<T>) {
      if (query.type == cache.type) return attend_over<T, T>(layer, cache, query, item, scratch, result);
    }
    attend_over<T, float>(layer, cache, query, item, scratch, result);
  });
  if (item.partial < 0) finish(layer, out, item, 0, rows, result);
}

void merge(const Layer& layer, const Rows& out, const Item& item, int row_begin, int row_end, float* partials,
           int count, int64_t stride) {
  const int rows = item.num_tokens * heads_per_kv_head(layer), size = layer.head_size;
  Partial result(layer, rows, partials);
  for (int i = 1; i < count; ++i) {
    const Partial other(layer, rows, partials + i * stride);
    for (int row = row_begin; row < row_end; ++row) {
      float& mine = result.largest[row];
      const float theirs = other.largest[row];
      if (theirs == kMinusInfinity) continue;  // it saw none of these keys
      const float both = mine > theirs ? mine : theirs;
      const float my_decay = exp2(splat(mine - both))[0], their_decay = exp2(splat(theirs - both))[0];
      mine = both;
      result.total[row] = result.total[row] * my_decay + other.total[row] * their_decay;
      float* output = result.output + static_cast<int64_t>(row) * size;
      const float* theirs_output = other.output + static_cast<int64_t>(row) * size;
      for (int k = 0; k < size; k += kLanes) {
        store(output + k, load(output + k) * my_decay + load(theirs_output + k) * their_decay);
      }
    }
  }
  finish(layer, out, item, row_begin, row_end, result);
}

void store_token(const Layer& layer, const Cache& cache, const Rows& key, const Rows& value, int64_t token,
                 int64_t slot) {
  const int size = layer.head_size, block_size = layer.block_size;
  const int64_t offset = slot % block_size;
  float head[selfextend::kMaxHeadSize];
  const auto take = [&](const Rows& rows, int kv_head, float scale) {
    with_type(rows.type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* from = reinterpret_cast<const T*>(rows.data) + token * rows.token_stride + kv_head * rows.head_stride;
      for (int i = 0; i < size; i += kLanes) ::store(head + i, load(from + i) * scale);
    });
  };
  with_type(cache.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T rounded[selfextend::kMaxHeadSize];
    for (int kv_head = 0; kv_head < layer.num_kv_heads; ++kv_head) {
      T* block =
          reinterpret_cast<T*>(cache.data) + slot / block_size * cache.block_stride + kv_head * cache.head_stride;
      take(key, kv_head, 1.0f / layer.k_scale);
      for (int i = 0; i < size; i += kLanes) put(rounded + i, load(head + i));
      T* column = block + offset / kPanel * kPanel * size + offset % kPanel;
      for (int i = 0; i < size; ++i) column[i * kPanel] = rounded[i];
      take(value, kv_head, 1.0f / layer.v_scale);
      T* row = block + static_cast<int64_t>(block_size) * size + offset * kPanel;
      for (int i = 0; i < size; i += kLanes) {
        put(row + static_cast<int64_t>(i / kPanel) * block_size * kPanel + i % kPanel, load(head + i));
      }
    }
  });
}

}  // namespace

namespace selfextend {

// SELFEXTEND_KERNEL is kPortable, kAvx2, kAvx512 or kAvx512Bf16, SELFEXTEND_NAME what users and tests call it.
const Kernel SELFEXTEND_KERNEL = {SELFEXTEND_NAME, preferred_rows, scratch_bytes, attend, merge, store_token};

}  // namespace selfextend
