// Vectors of float32 in the widest form that the file is compiled for, the four storage types, and 2^x.
// Written with the vector extensions of GCC and Clang: the same code for every instruction set.
#pragma once

#include <cstdint>

#include "kernel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxRows = 6, kWidePanels = 4;  // a tile of the product: 24 of 32 registers add up
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxRows = 6, kWidePanels = 1;  // 12 of 16
#elif defined(__x86_64__)
constexpr int kLanes = 4;
constexpr int kMaxRows = 3, kWidePanels = 1;  // 12 of 16
#else
constexpr int kLanes = 4;
constexpr int kMaxRows = 6, kWidePanels = 1;  // 24 of 32
#endif
constexpr int kVectors = selfextend::kPanel / kLanes;  // vectors in a row of a panel

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// The storage types. bfloat16 and float16 differ in meaning only, so each is a struct of its own.
struct BFloat16 {
  uint16_t bits;
};
// The same in two rows of a panel of which each column's two values lie side by side.
struct BFloat16Paired {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Vector>
inline Vector load_bits(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(Vector));
  return vector;
}

inline Float load(const float* from) { return load_bits<Float>(from); }

inline void store(float* to, Float vector) { __builtin_memcpy(to, &vector, sizeof(Float)); }

inline Float splat(float x) { return x - Float{}; }

// Unsigned integers of 16 and 8 bits, widened. GCC 12 makes several instructions of __builtin_convertvector.
inline Bits widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return bit_cast<Bits>(_mm512_cvtepu16_epi32(load_bits<__m256i>(from)));
#elif defined(__AVX2__)
  return bit_cast<Bits>(_mm256_cvtepu16_epi32(load_bits<__m128i>(from)));
#else
  return __builtin_convertvector(load_bits<Halves>(from), Bits);
#endif
}

inline Bits widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return bit_cast<Bits>(_mm512_cvtepu8_epi32(load_bits<__m128i>(from)));
#elif defined(__AVX2__)
  return bit_cast<Bits>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from)));
#else
  return __builtin_convertvector(load_bits<Bytes>(from), Bits);
#endif
}

inline Float load(const BFloat16* from) { return bit_cast<Float>(widen(&from->bits) << 16); }

inline Float load(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_bits<__m256i>(from));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  // The exponent's bias grows by 112; infinities and NaNs keep an exponent of ones.
  const Bits bits = widen(&from->bits);
  const Float magnitude = bit_cast<Float>((bits & 0x7fff) << 13) * 0x1p112f;
  const Bits special = bit_cast<Bits>(magnitude >= 65536.0f) & 0x7f800000;
  return bit_cast<Float>(bit_cast<Bits>(magnitude) | special | (bits & 0x8000) << 16);
#endif
}

inline Float load(const Float8E4M3* from) {
  // As above with a bias that grows by 120; there are no infinities, and all ones is NaN.
  const Bits bits = widen(&from->bits);
  const Float magnitude = bit_cast<Float>((bits & 0x7f) << 20) * 0x1p120f;
  const Bits nan = bit_cast<Bits>((bits & 0x7f) == 0x7f) & 0x7fc00000;
  return bit_cast<Float>(bit_cast<Bits>(magnitude) | nan | (bits & 0x80) << 24);
}

// Whether the processor multiplies numbers of a storage type as they are, two rows of a panel at once.
template <class T>
constexpr bool kMultiplies = false;

#if defined(__AVX512BF16__)
template <>
constexpr bool kMultiplies<BFloat16> = true;

// Two rows of a panel, side by side what is in one column.
inline __m512bh load_pairs(const BFloat16Paired* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512bh pair_up(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (__m512bh)_mm512_permutexvar_epi16(order, rows);
}

inline __m512bh load_pairs(const BFloat16* from) { return pair_up(_mm512_loadu_si512(from)); }

// A row without a partner, beside zeros.
inline __m512bh load_last(const BFloat16* from) { return pair_up(_mm512_zextsi256_si512(load_bits<__m256i>(from))); }

inline __m512bh load_last(const BFloat16Paired* from) { return load_pairs(from); }

// Two rows of a panel as numbers.
struct TwoRows {
  Float first, second;
};

inline TwoRows load_two(const BFloat16* from) {
  const Bits pairs = bit_cast<Bits>(load_pairs(from));
  return {bit_cast<Float>(pairs << 16), bit_cast<Float>(pairs & 0xffff0000)};
}
#endif

// Rounded to the nearest, ties to even.

inline void put(float* to, Float x) { store(to, x); }

inline void put(BFloat16* to, Float x) {
  const Bits bits = bit_cast<Bits>(x), nan = bit_cast<Bits>(x != x);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
  __builtin_memcpy(to, &halves, sizeof(Halves));
}

// For a factor of a product only, where the processor takes numbers below 2^-126 for zeros.
template <class T>
inline void put_factor(T* to, Float x) {
  put(to, x);
}

#if defined(__AVX512BF16__)
inline void put_factor(BFloat16* to, Float x) {
  const __m256bh halves = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// Two rows of a panel as factors.
inline __m512bh pair_up(Float first, Float second) { return pair_up((__m512i)_mm512_cvtne2ps_pbh(second, first)); }
#endif

inline void put(Float16* to, Float x) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits sign = bit_cast<Bits>(x) >> 16 & 0x8000;
  const Bits bits = bit_cast<Bits>(x) & 0x7fffffff;
  const Float magnitude = bit_cast<Float>(bits);
  const Bits normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const Bits subnormal = bit_cast<Bits>(magnitude + 0.5f) - 0x3f000000;  // the addition rounds at 2^-24
  const Bits is_subnormal = bit_cast<Bits>(magnitude < 0x1p-14f), is_infinite = bit_cast<Bits>(magnitude >= 65520.0f);
  const Bits is_nan = bit_cast<Bits>(x != x);
  Bits half = (is_subnormal & subnormal) | (~is_subnormal & normal);
  half = (~is_infinite & half) | (is_infinite & 0x7c00);
  half = (~is_nan & half) | (is_nan & 0x7e00);
  const Halves halves = __builtin_convertvector(half | sign, Halves);
#endif
  __builtin_memcpy(to, &halves, sizeof(Halves));
}

inline void put(Float8E4M3* to, Float x) {  // what is larger than 448 becomes 448
  const Bits sign = bit_cast<Bits>(x) >> 24 & 0x80, is_nan = bit_cast<Bits>(x != x);
  const Bits all = bit_cast<Bits>(x) & 0x7fffffff;
  const Bits is_large = bit_cast<Bits>(bit_cast<Float>(all) > 448.0f);
  const Bits bits = (~is_large & all) | (is_large & 0x43e00000);
  const Float magnitude = bit_cast<Float>(bits);
  const Bits normal = (bits - (120u << 23) + 0x7ffff + (bits >> 20 & 1)) >> 20;
  const Bits subnormal = bit_cast<Bits>(magnitude + 0x1p14f) - 0x46800000;  // the addition rounds at 2^-9
  const Bits is_subnormal = bit_cast<Bits>(magnitude < 0x1p-6f);
  Bits byte = (is_subnormal & subnormal) | (~is_subnormal & normal);
  byte = (~is_nan & byte) | (is_nan & 0x7f);
  const Bytes bytes = __builtin_convertvector(byte | sign, Bytes);
  __builtin_memcpy(to, &bytes, sizeof(Bytes));
}

// The larger one; `b` where one is NaN.
inline Float max(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Four numbers made of a vector's by `combine`, which takes two of either.
template <class Combine>
inline float reduce(Float vector, const Combine& combine) {
  typedef float Four __attribute__((vector_size(16)));
  Four fours[kLanes / 4];
  __builtin_memcpy(fours, &vector, sizeof(Float));
  for (int half = kLanes / 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) fours[i] = combine(fours[i], fours[i + half]);
  }
  return combine(combine(fours[0][0], fours[0][1]), combine(fours[0][2], fours[0][3]));
}

inline float largest(Float vector) {
  return reduce(vector, [](auto a, auto b) { return a > b ? a : b; });
}

inline float sum(Float vector) {
  return reduce(vector, [](auto a, auto b) { return a + b; });
}

// x = whole + fraction: 2^whole, and 2^fraction - 1 by a minimax polynomial on [-1/2, 1/2].
struct Power {
  Float whole, fraction;
};

inline Power split_power(Float x) {
  const Float shifted = x + 0x1.8p23f;  // its lowest bits are x rounded to a whole number
  const Float t = x - (shifted - 0x1.8p23f);
  Float power = 1.540351254e-4f * t + 1.339073550e-3f;
  power = power * t + 9.618237495e-3f;
  power = power * t + 5.550357434e-2f;
  power = power * t + 2.402264979e-1f;
  power = power * t + 6.931471879e-1f;
  return {bit_cast<Float>((bit_cast<Bits>(shifted) << 23) + 0x3f800000), power * t};
}

// 2^x for x <= 0, within 1e-7 of its size; 0 from -126.5 down. NaN stays NaN.
[[gnu::always_inline]] inline Float exp2(Float x) {
  const Power power = split_power(max(splat(-127.0f), x));
  return power.whole * power.fraction + power.whole;
}

inline Float tanh(Float x) {
  // tanh|x| = -t / (t + 2) with t = e^-2|x| - 1, which a sum with 1 would rob of its digits where x is small.
  const Float exponent = bit_cast<Float>(bit_cast<Bits>(x) | 0x80000000u) * 2.8853900817779268f;
  const Power power = split_power(max(splat(-100.0f), exponent));
  const Float t = power.whole * power.fraction + (power.whole - 1.0f);
  const Float magnitude = -t / (t + 2.0f);
  return bit_cast<Float>(bit_cast<Bits>(magnitude) | (bit_cast<Bits>(x) & 0x80000000u));
}

}  // namespace
