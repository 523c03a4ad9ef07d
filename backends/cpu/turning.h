// Turning of queries, and of cached keys to their grouped positions.
#pragma once

#include "product.h"
#include "vector.h"

namespace {

using selfextend::kPanel;
using selfextend::Layer;

// interface.lag: how far a token's grouped position lags behind its position.
inline int lag(int position, int eighths) { return position - selfextend::kEighths * position / eighths; }

// Turns pairs of values, `stride` apart in each of the two places.
template <int stride>
inline void turn_pairs(int pairs, const float* cosine, float sign, float* __restrict first, float* __restrict second) {
  const float* sine = cosine + pairs;
  for (int pair = 0; pair < pairs; ++pair) {
    const float x = first[pair * stride], y = second[pair * stride], c = cosine[pair], s = sign * sine[pair];
    first[pair * stride] = x * c - y * s;
    second[pair * stride] = y * c + x * s;
  }
}

// Turns one head in place by `steps` of either sign.
inline void turn_head(const Layer& layer, int steps, float* head) {
  const int pairs = layer.rotary_dim / 2;
  const float sign = steps < 0 ? -1.0f : 1.0f;
  const float* cosine = layer.cos_sin + static_cast<int64_t>(steps < 0 ? -steps : steps) * layer.rotary_dim;
  if (layer.interleaved) {
    turn_pairs<2>(pairs, cosine, sign, head, head + 1);
  } else {
    turn_pairs<1>(pairs, cosine, sign, head, head + pairs);
  }
}

// Cosines and sines of d(first) - d(j) for the 16 keys j from `first` of a panel on, as columns: [rotary_dim][16]. They
// depend on 8 * first modulo the group size alone, so few are needed, and with d(first) they give every key's turn.
inline void fill_stairs(const Layer& layer, int eighths, int first, float* stairs) {
  const int pairs = layer.rotary_dim / 2;
  for (int column = 0; column < kPanel; ++column) {
    const int steps = lag(first + column, eighths) - lag(first, eighths);
    const float* row = layer.cos_sin + static_cast<int64_t>(steps) * layer.rotary_dim;
    for (int pair = 0; pair < pairs; ++pair) {
      stairs[pair * kPanel + column] = row[pair];
      stairs[(pairs + pair) * kPanel + column] = -row[pairs + pair];
    }
  }
}

struct Angle {
  Float cosine, sine;
};

// Some keys' stairs, by pair.
class Stairs {
 public:
  Stairs(const Layer& layer, const float* stairs) : sines_(layer.rotary_dim / 2 * kPanel), stairs_(stairs) {}

  Angle operator()(int pair, int lane = 0) const {
    const float* stair = stairs_ + pair * kPanel + lane;
    return {load(stair), load(stair + sines_)};
  }

 private:
  const int sines_;
  const float* stairs_;
};

// What the keys of a panel turn by, of which the first one lags `steps` behind.
class Angles {
 public:
  Angles(const Layer& layer, int steps, const float* stairs)
      : stairs_(layer, stairs),
        cosines_(layer.cos_sin + static_cast<int64_t>(steps) * layer.rotary_dim),
        sines_(cosines_ + layer.rotary_dim / 2) {}

  Angle operator()(int pair, int lane = 0) const {
    const auto [cosine, sine] = stairs_(pair, lane);
    return {cosine * cosines_[pair] + sine * sines_[pair], sine * cosines_[pair] - cosine * sines_[pair]};
  }

 private:
  const Stairs stairs_;
  const float *cosines_, *sines_;
};

// Calls `take(row, lane, numbers)` for the vectors of a panel, turned. What a later panel holds there is asked for.
template <class GetAngle, class T, class Take>
inline void turn(const Layer& layer, const GetAngle& angles, const T* panel, const Take& take) {
  const int pairs = layer.rotary_dim / 2;
  const int step = layer.interleaved ? 2 : 1, second = layer.interleaved ? 1 : pairs;
  for (int pair = 0, row = 0; pair < pairs; ++pair, row += step) {
    const T *one = panel + row * kPanel, *other = one + second * kPanel;
    __builtin_prefetch(one + layer.head_size * kPanel);
    __builtin_prefetch(other + layer.head_size * kPanel);
#pragma GCC unroll 4
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const auto [c, s] = angles(pair, lane);
      const Float x = load(one + lane), y = load(other + lane);
      take(row, lane, x * c - y * s);
      take(row + second, lane, y * c + x * s);
    }
  }
  for (int row = layer.rotary_dim; row < layer.head_size; ++row) {
#pragma GCC unroll 4
    for (int lane = 0; lane < kPanel; lane += kLanes) take(row, lane, load(panel + row * kPanel + lane));
  }
}

// The keys of a panel, turned to their grouped positions; the first one lags `steps` behind.
// (Not inlined: within a large function the compiler runs out of registers.)
template <class T, class To>
[[gnu::noinline]] void turn_panel(const Layer& layer, int steps, const float* stairs, const T* panel, To* turned) {
  turn(layer, Angles(layer, steps, stairs), panel,
       [=](int row, int lane, Float numbers) { put_factor(turned + row * kPanel + lane, numbers); });
}

// The scores of a panel's keys, which turn by their stairs while they are multiplied and never leave the registers.
template <int rows, class T>
[[gnu::noinline]] void score_turned_rows(const Layer& layer, const float* stairs, const T* panel, const float* query,
                                         float* scores, int64_t stride) {
  Float sums[rows] = {};
  turn(layer, Stairs(layer, stairs), panel, [&](int row, int, Float numbers) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) sums[i] += numbers * query[i * layer.head_size + row];
  });
  for (int i = 0; i < rows; ++i) store(scores + i * stride, sums[i]);
}

// Whether two rows that lie together turn with two that do: always, but for odd numbers of pairs half a head apart.
inline bool turns_two(const Layer& layer) { return layer.interleaved || layer.rotary_dim % 4 == 0; }

#if defined(__AVX512BF16__)
// As above, for keys that are multiplied as bfloat16: `take(row, numbers, numbers of the next row)`.
template <class GetAngle, class Take>
inline void turn_two(const Layer& layer, const GetAngle& angles, const BFloat16* panel, const Take& take) {
  const int pairs = layer.rotary_dim / 2, next = layer.head_size * kPanel;
  if (layer.interleaved) {
    for (int row = 0; row < layer.rotary_dim; row += 2) {
      __builtin_prefetch(panel + row * kPanel + next);
      const auto [c, s] = angles(row / 2);
      const auto [x, y] = load_two(panel + row * kPanel);
      take(row, x * c - y * s, y * c + x * s);
    }
  } else {
    for (int row = 0; row < pairs; row += 2) {
      const BFloat16 *one = panel + row * kPanel, *other = one + pairs * kPanel;
      __builtin_prefetch(one + next);
      __builtin_prefetch(other + next);
      const auto [c, s] = angles(row);
      const auto [next_c, next_s] = angles(row + 1);
      const auto [x, next_x] = load_two(one);
      const auto [y, next_y] = load_two(other);
      take(row, x * c - y * s, next_x * next_c - next_y * next_s);
      take(row + pairs, y * c + x * s, next_y * next_c + next_x * next_s);
    }
  }
  for (int row = layer.rotary_dim; row < layer.head_size; row += 2) {
    const auto [one, other] = load_two(panel + row * kPanel);
    take(row, one, other);
  }
}

[[gnu::noinline]] void turn_panel(const Layer& layer, int steps, const float* stairs, const BFloat16* panel,
                                  BFloat16Paired* turned) {
  if (turns_two(layer)) {
    turn_two(layer, Angles(layer, steps, stairs), panel, [=](int row, Float numbers, Float next) {
      const __m512bh pairs = pair_up(numbers, next);
      __builtin_memcpy(turned + row * kPanel, &pairs, sizeof(pairs));
    });
  } else {
    auto* in_place = reinterpret_cast<BFloat16*>(turned);
    turn_panel<BFloat16, BFloat16>(layer, steps, stairs, panel, in_place);
    unpack(in_place, layer.head_size, turned);
  }
}

template <int rows, class T>
[[gnu::noinline]] void score_turned_rows(const Layer& layer, const float* stairs, const T* panel, const BFloat16* query,
                                         float* scores, int64_t stride) {
  __m512 sums[rows] = {};
  turn_two(layer, Stairs(layer, stairs), panel, [&](int row, Float numbers, Float next) {
    const __m512bh right = pair_up(numbers, next);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(query + i * layer.head_size + row));
      sums[i] = _mm512_dpbf16_ps(sums[i], left, right);
    }
  });
  for (int i = 0; i < rows; ++i) _mm512_storeu_ps(scores + i * stride, sums[i]);
}
#endif

constexpr int kTurnedRows = 8;  // a row's sums are one register of a machine with many

// Whether `score_turned` takes so many rows of queries.
template <class Left>
inline bool scores_turned(const Layer& layer, int rows) {
  return kVectors == 1 && rows <= kTurnedRows && (!kMultiplies<Left> || turns_two(layer));
}

// Rows of queries turned by `steps`.
template <class T>
inline void turn_rows(const Layer& layer, int steps, const T* query, int rows, T* turned) {
  const int size = layer.head_size, pairs = layer.rotary_dim / 2;
  if (layer.interleaved || pairs % kLanes != 0) {
    float head[selfextend::kMaxHeadSize];
    for (int row = 0; row < rows; ++row, query += size, turned += size) {
      for (int i = 0; i < size; i += kLanes) store(head + i, load(query + i));
      turn_head(layer, steps, head);
      for (int i = 0; i < size; i += kLanes) put_factor(turned + i, load(head + i));
    }
    return;
  }
  const float* cosine = layer.cos_sin + static_cast<int64_t>(steps) * layer.rotary_dim;
  for (int pair = 0; pair < pairs; pair += kLanes) {
    const Float c = load(cosine + pair), s = load(cosine + pairs + pair);
    for (int at = pair; at < rows * size; at += size) {
      const Float x = load(query + at), y = load(query + at + pairs);
      put_factor(turned + at, x * c - y * s);
      put_factor(turned + at + pairs, y * c + x * s);
    }
  }
  for (int i = 2 * pairs; i < size; i += kLanes) {
    for (int at = i; at < rows * size; at += size) put_factor(turned + at, load(query + at));
  }
}

// The scores of a panel's keys, of which the first one lags `steps` behind, for few rows of queries: these turn by
// that, which is less work than to turn the keys back by it. `turned` is memory for as many rows.
template <class T, class Left>
inline void score_turned(const Layer& layer, int steps, const float* stairs, const T* panel, const Left* query,
                         int rows, Left* turned, float* scores, int64_t stride) {
  if constexpr (kVectors == 1) {
    turn_rows(layer, steps, query, rows, turned);
    with_rows<kTurnedRows>(
        rows, [&](auto few) { score_turned_rows<few.value>(layer, stairs, panel, turned, scores, stride); });
  }
}

}  // namespace
