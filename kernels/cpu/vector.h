/* Sixteen numbers at a time, on any processor: GCC's and Clang's vector extensions, which the compiler turns
 * into one AVX-512 register, two of AVX or four of NEON.
 *
 * The file is compiled for one element type of model and cache: -DSCALAR_BF16, -DSCALAR_FP16 or
 * -DSCALAR_FP32. Elements become fp32 as they are read and are rounded to the nearest, ties to even, as they
 * are written; everything between is fp32.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16

typedef float floats __attribute__((vector_size(64), may_alias));
typedef int32_t ints __attribute__((vector_size(64), may_alias));
typedef uint32_t words __attribute__((vector_size(64), may_alias));
typedef uint16_t halfwords __attribute__((vector_size(32)));

#if defined(SCALAR_BF16)

typedef uint16_t scalar;

static inline words widened(halfwords raw) {
#ifdef __AVX512F__
    return (words)_mm512_cvtepu16_epi32((__m256i)raw); /* GCC 12 makes five instructions of the other */
#else
    return __builtin_convertvector(raw, words);
#endif
}

static inline floats from_scalars(const scalar *source) {
    halfwords raw;
    memcpy(&raw, source, sizeof raw);
    return (floats)(widened(raw) << 16);
}

static inline void to_scalars(scalar *target, floats numbers) {
    words bits = (words)numbers;
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words is_nan = (words)(numbers != numbers);
    /* Rounding could carry a NaN over into a number. */
    halfwords raw = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), halfwords);
    memcpy(target, &raw, sizeof raw);
}

#elif defined(SCALAR_FP16)

typedef _Float16 scalar;
typedef _Float16 scalars __attribute__((vector_size(32)));

static inline floats from_scalars(const scalar *source) {
    scalars raw;
    memcpy(&raw, source, sizeof raw);
    return __builtin_convertvector(raw, floats);
}

static inline void to_scalars(scalar *target, floats numbers) {
    scalars raw = __builtin_convertvector(numbers, scalars);
    memcpy(target, &raw, sizeof raw);
}

#elif defined(SCALAR_FP32)

typedef float scalar;

static inline floats from_scalars(const scalar *source) {
    floats numbers;
    memcpy(&numbers, source, sizeof numbers);
    return numbers;
}

static inline void to_scalars(scalar *target, floats numbers) { memcpy(target, &numbers, sizeof numbers); }

#endif

static inline floats splat(float number) { return number - (floats){}; }

static inline floats choose(ints where, floats yes, floats no) {
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

static inline floats larger(floats a, floats b) { return choose(a > b, a, b); }

/* `count` elements, at most LANES; the other lanes are 0, and nothing behind the elements is touched. */
static inline floats load(const scalar *source, int count) {
    if (count >= LANES) return from_scalars(source);
    scalar padded[LANES] = {0};
    memcpy(padded, source, count * sizeof *source);
    return from_scalars(padded);
}

static inline void store(scalar *target, floats numbers, int count) {
    if (count >= LANES) {
        to_scalars(target, numbers);
        return;
    }
    scalar padded[LANES];
    to_scalars(padded, numbers);
    memcpy(target, padded, count * sizeof *target);
}

static inline floats load_floats(const float *source, int count) {
    floats numbers = {};
    memcpy(&numbers, source, (count < LANES ? count : LANES) * sizeof *source);
    return numbers;
}

/* e to the x for x <= 0, to 2 units in the last place; exactly 0 below -87, and NaN of NaN. */
static inline floats exp_of_negative(floats x) {
    ints vanishes = x < -87.0f;
    floats safe = choose(vanishes, splat(-87.0f), x);
    /* Adding 1.5 * 2**23 rounds to an integer, which then stands in the low bits. */
    floats shifted = safe * 1.44269504f + 12582912.0f;
    floats whole = shifted - 12582912.0f;
    floats rest = safe - whole * 0.693359375f + whole * 2.12194440e-4f;
    /* Minimax polynomial of Cephes' expf on [-ln(2)/2, ln(2)/2]. */
    floats series = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    floats power_of_two = (floats)(((ints)shifted << 23) + (127 << 23));
    return choose(vanishes, (floats){}, series * power_of_two);
}

#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

/* Rows become columns: four rounds, each of which exchanges halves of groups of 16, 8, 4 and 2 lanes. */
static inline void transpose(floats rows[LANES]) {
    floats other[LANES];
    for (int i = 0; i < 8; i++) {
        other[i] = MIX(rows[i], rows[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        other[i + 8] = MIX(rows[i], rows[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int j = 0; j < 16; j += 8)
        for (int i = j; i < j + 4; i++) {
            rows[i] = MIX(other[i], other[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            rows[i + 4] = MIX(other[i], other[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int j = 0; j < 16; j += 4)
        for (int i = j; i < j + 2; i++) {
            other[i] = MIX(rows[i], rows[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            other[i + 2] = MIX(rows[i], rows[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < 16; i += 2) {
        rows[i] = MIX(other[i], other[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        rows[i + 1] = MIX(other[i], other[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
}

/* Across the lanes of one vector. */
static inline float sum(floats numbers) {
    numbers += MIX(numbers, numbers, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    numbers += MIX(numbers, numbers, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    return (numbers[0] + numbers[1]) + (numbers[2] + numbers[3]);
}

static inline float maximum(floats numbers) {
    numbers = larger(MIX(numbers, numbers, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), numbers);
    numbers = larger(MIX(numbers, numbers, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3), numbers);
    return fmaxf(fmaxf(numbers[0], numbers[1]), fmaxf(numbers[2], numbers[3]));
}
