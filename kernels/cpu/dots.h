/* Dot products of a few queries with the keys of LANES positions, for heads of HEAD_DIM elements.
 *
 * Keys are transposed once for all queries, so that a score needs no sum across lanes. They are multiplied
 * a *unit* at a time: one element in fp32, or, with AVX512_BF16, two bf16 elements as they lie in memory.
 */
#pragma once

#include "vector.h"

#if defined(SCALAR_BF16) && defined(__AVX512BF16__)

typedef uint32_t unit;

static inline floats load_units(const scalar *source, int count) {
    floats raw = {};
    memcpy(&raw, source, (count < LANES ? count : LANES) * sizeof(unit));
    return raw;
}

static inline floats add_product(floats sum, unit query, floats keys) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)keys, (__m512bh)_mm512_set1_epi32((int)query));
}

#define UNIT_SIZE 2

#else

typedef float unit;

static inline floats load_units(const scalar *source, int count) { return load(source, count); }

static inline floats add_product(floats sum, unit query, floats keys) { return sum + query * keys; }

#define UNIT_SIZE 1

#endif

#define UNITS (HEAD_DIM / UNIT_SIZE)
#define UNIT_PARTS ((UNITS + LANES - 1) / LANES)

typedef unit Query[UNIT_PARTS * LANES];
typedef floats Keys[UNIT_PARTS * LANES];

static inline void load_query(Query query, const scalar *head_D) {
    for (int part = 0; part < UNIT_PARTS; part++) {
        floats units = load_units(head_D + part * LANES * UNIT_SIZE, UNITS - part * LANES);
        memcpy(query + part * LANES, &units, sizeof units);
    }
}

/* The first half of the positions lies at `near`, the second at `far`: a block may hold no more than 8. */
static inline void load_keys(Keys keys, const scalar *near, const scalar *far) {
    for (int part = 0; part < UNIT_PARTS; part++) {
        const int first = part * LANES * UNIT_SIZE, count = UNITS - part * LANES;
        for (int i = 0; i < 8; i++) {
            keys[part * LANES + i] = load_units(near + i * HEAD_DIM + first, count);
            keys[part * LANES + i + 8] = load_units(far + i * HEAD_DIM + first, count);
        }
        transpose(keys + part * LANES);
    }
}

/* Four queries at once, so that as many sums are under way as a multiplier takes steps. */
static inline void dot(floats scores_4[4], const Query *query_4, const Keys keys) {
    floats s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int i = 0; i < UNITS; i++) {
        s0 = add_product(s0, query_4[0][i], keys[i]);
        s1 = add_product(s1, query_4[1][i], keys[i]);
        s2 = add_product(s2, query_4[2][i], keys[i]);
        s3 = add_product(s3, query_4[3][i], keys[i]);
    }
    scores_4[0] = s0, scores_4[1] = s1, scores_4[2] = s2, scores_4[3] = s3;
}
