// C = A x B, or C += A x B, with B in panels: the one product that both halves of attention are made of. A is float32;
// with AVX512-BF16 it may be bfloat16, where B is too: two rows of B are then multiplied at once.
#pragma once

#include "vector.h"

namespace {

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Calls `action` with `rows`, if it is 1 to `most`, as a constant of the compiler's, so that loops over rows unroll.
template <int most, class Action>
inline void with_rows(int rows, const Action& action) {
  if constexpr (most > 0) {
    if (rows == most) return action(Constant<most>{});
    with_rows<most - 1>(rows, action);
  }
}

// `rows` rows of a panel, as the products read them fastest; in place, too.
template <class T>
inline void unpack(const T* stored, int rows, float* unpacked) {
  for (int i = 0; i < rows * selfextend::kPanel; i += kLanes) store(unpacked + i, load(stored + i));
}

#if defined(__AVX512BF16__)
inline void unpack(const BFloat16* stored, int rows, BFloat16Paired* unpacked) {
  for (int row = 0; row < rows; row += 2, stored += 2 * selfextend::kPanel, unpacked += 2 * selfextend::kPanel) {
    const __m512bh pairs = row + 1 < rows ? load_pairs(stored) : load_last(stored);
    __builtin_memcpy(unpacked, &pairs, sizeof(pairs));
  }
}
#endif

// Of the tiles of a product the first one finds B in memory and asks for what it will read 2048 bytes later; the others
// find it near by, and ask for a panel of the cache that the next product will read.
template <bool first, class B, class Next>
inline void prefetch(const B* panel, const Next* next, int row) {
  if constexpr (first) {
    __builtin_prefetch(reinterpret_cast<const char*>(panel) + 2048);
  } else {
    __builtin_prefetch(next + row * selfextend::kPanel);
  }
}

// `rows` rows of A (float32, `a_stride` apart) times `panels` panels of B, `depth` rows each. Everything is unrolled
// but the loop over the depth, so that the sums stay in registers.
template <int rows, int panels, bool accumulate, bool first, class B, class Next>
inline void product_tile(const float* a, int64_t a_stride, const B* const* b, int depth, const Next* next, float* c,
                         int64_t c_stride) {
  constexpr int columns = panels * kVectors;
  Float sums[rows][columns] = {};
  const B* panel[panels];
#pragma GCC unroll 4
  for (int i = 0; i < panels; ++i) panel[i] = b[i];
  for (int k = 0; k < depth; ++k) {
    Float right[columns];
#pragma GCC unroll 4
    for (int i = 0; i < panels; ++i) {
      if (first || i == 0) prefetch<first>(panel[i], next, k);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[i * kVectors + j] = load(panel[i] + j * kLanes);
      panel[i] += selfextend::kPanel;
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const float left = a[row * a_stride + k];
#pragma GCC unroll 4
      for (int column = 0; column < columns; ++column) sums[row][column] += right[column] * left;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < columns; ++column) {
      float* to = c + row * c_stride + column * kLanes;
      store(to, accumulate ? load(to) + sums[row][column] : sums[row][column]);
    }
  }
}

#if defined(__AVX512BF16__)
// `depth` counts rows of B, two of which make a step. A last one without a partner is paired with zeros, by which what
// A has after its last column is multiplied: it must be finite.
template <int rows, int panels, bool accumulate, bool first, class B, class Next>
inline void product_tile(const BFloat16* a, int64_t a_stride, const B* const* b, int depth, const Next* next, float* c,
                         int64_t c_stride) {
  __m512 sums[rows][panels];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < panels; ++i) {
      sums[row][i] = accumulate ? _mm512_loadu_ps(c + row * c_stride + i * kLanes) : _mm512_setzero_ps();
    }
  }
  const B* panel[panels];
#pragma GCC unroll 4
  for (int i = 0; i < panels; ++i) panel[i] = b[i];
  const auto add = [&](int k, const auto& load_right) {
    __m512bh right[panels];
#pragma GCC unroll 4
    for (int i = 0; i < panels; ++i) right[i] = load_right(panel[i]);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(a + row * a_stride + k));
#pragma GCC unroll 4
      for (int i = 0; i < panels; ++i) sums[row][i] = _mm512_dpbf16_ps(sums[row][i], left, right[i]);
    }
  };
  int k = 0;
  for (; k + 1 < depth; k += 2) {
    if constexpr (!first) prefetch<false>(b[0], next, k);
    add(k, [&](const B* from) {
      if constexpr (first) prefetch<true>(from, next, k);
      return load_pairs(from);
    });
#pragma GCC unroll 4
    for (int i = 0; i < panels; ++i) panel[i] += 2 * selfextend::kPanel;
  }
  if (k < depth) add(k, [](const B* from) { return load_last(from); });
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < panels; ++i) _mm512_storeu_ps(c + row * c_stride + i * kLanes, sums[row][i]);
  }
}
#endif

// `next` are kWidePanels panels that the next product will read.
template <int panels, bool accumulate, class A, class B, class Next>
inline void product(const A* a, int64_t a_stride, int rows, const B* const* b, int depth, const Next* const* next,
                    float* c, int64_t c_stride) {
  for (int tile = 0; rows >= kMaxRows; ++tile, rows -= kMaxRows) {
    if (tile == 0) {
      product_tile<kMaxRows, panels, accumulate, true>(a, a_stride, b, depth, next[0], c, c_stride);
    } else {
      const Next* one = next[tile < kWidePanels ? tile - 1 : kWidePanels - 1];
      product_tile<kMaxRows, panels, accumulate, false>(a, a_stride, b, depth, one, c, c_stride);
    }
    a += kMaxRows * a_stride;
    c += kMaxRows * c_stride;
  }
  with_rows<kMaxRows - 1>(rows, [&](auto few) {
    product_tile<few.value, panels, accumulate, true>(a, a_stride, b, depth, next[0], c, c_stride);
  });
}

// The same for `panels` panels, 1 to kWidePanels.
template <bool accumulate, class A, class B, class Next>
inline void product(const A* a, int64_t a_stride, int rows, const B* const* b, int panels, int depth,
                    const Next* const* next, float* c, int64_t c_stride) {
  if (panels == kWidePanels) return product<kWidePanels, accumulate>(a, a_stride, rows, b, depth, next, c, c_stride);
  for (int i = 0; i < panels; ++i) {
    product<1, accumulate>(a, a_stride, rows, b + i, depth, next, c + i * selfextend::kPanel, c_stride);
  }
}

}  // namespace
