/* Rotary embedding, KV write and paged attention of one layer, straight from and to the pool.
 *
 * Legend: T packed tokens, S sequences, M columns of the block tables, H query heads, K KV heads,
 * G = H / K query heads a KV head, X = H + 2K heads of the fused projection, D head size, F = D / 2,
 * B positions a block. Compiled for one head size: -DHEAD_DIM.
 *
 * The queries of one KV head and one sequence, G for each token, are its *rows*. ROWS of them at a time, a
 * *tile*, walk over the sequence's keys and values with a running softmax (Milakov and Gimelshein, 2018).
 */
#include "dots.h"
#include "threads.h"

#define ROWS 16
#define SPAN 128 /* positions between two corrections of the running softmax */
/* Tiles times positions times D below which one thread does it all: about a tenth of a millisecond of work.
 * A helper must be woken first, and where cores are scarce that may be onto this very core. With half a
 * millisecond instead, decoding 24 sequences of a 5M model left the second core idle: 5,600 against 6,800
 * tokens a second. */
#define SMALL 150000
#define HALF_DIM (HEAD_DIM / 2)
#define PARTS ((HEAD_DIM + LANES - 1) / LANES) /* vectors that hold one head */
#define TAIL(part) (HEAD_DIM - (part) * LANES) /* elements from that vector on */

typedef struct {
    int32_t num_seqs, num_heads, num_kv_heads, block_bits, table_width, num_threads;
    int64_t block_stride, value_stride, head_stride; /* of the pool, in elements */
    const int64_t *query_starts;                     /* S + 1 */
    const int64_t *context_lens;                     /* S, this step's tokens included */
    const int32_t *block_tables;                     /* S, M */
    const int64_t *tile_starts;                      /* S + 1: tiles before each sequence, of one KV head */
    const float *angles;                             /* position, 2, F: cosines, then sines */
    int64_t window; /* positions that a query sees, its own included; more than there are: all before it */
    float scale;
} Step;

typedef floats Head[PARTS];
typedef floats Scores[SPAN / LANES];

/* Where the key of a position of KV head k begins; its value lies `value_stride` behind. */
static inline int64_t place(const Step *step, const int32_t *table_M, int k, int64_t position) {
    const int64_t block = table_M[position >> step->block_bits];
    const int64_t offset = position & ((1 << step->block_bits) - 1);
    return block * step->block_stride + k * step->head_stride + offset * HEAD_DIM;
}

static void rotate(scalar *target_D, const scalar *head_D, const float *angles_2F) {
    for (int i = 0; i < HALF_DIM; i += LANES) {
        const int count = HALF_DIM - i;
        const floats cosine = load_floats(angles_2F + i, count);
        const floats sine = load_floats(angles_2F + HALF_DIM + i, count);
        const floats first = load(head_D + i, count), second = load(head_D + HALF_DIM + i, count);
        store(target_D + i, first * cosine - second * sine, count);
        store(target_D + HALF_DIM + i, second * cosine + first * sine, count);
    }
}

/* Turn a token's query heads where they stand, and write its keys and values to the pool. */
static void prepare_token(
    const Step *step, scalar *heads_XD, scalar *kv, const int32_t *table_M, int64_t position) {
    const int H = step->num_heads, K = step->num_kv_heads;
    const float *angles_2F = step->angles + position * HEAD_DIM;
    for (int h = 0; h < H; h++) rotate(heads_XD + h * HEAD_DIM, heads_XD + h * HEAD_DIM, angles_2F);
    for (int k = 0; k < K; k++) {
        scalar *key_D = kv + place(step, table_M, k, position);
        rotate(key_D, heads_XD + (H + k) * HEAD_DIM, angles_2F);
        memcpy(key_D + step->value_stride, heads_XD + (H + K + k) * HEAD_DIM, HEAD_DIM * sizeof(scalar));
    }
}

/* The rows of a tile: [first, end) of KV head k of sequence s. */
typedef struct {
    const Step *step;
    int64_t s, first, end;
    int k, num_rows;
    int64_t past; /* positions before the sequence's first query */
    const int32_t *table_M;
    int64_t seen_from; /* the first position that any row sees */
} Tile;

static inline int64_t token_of(const Tile *tile, int r) {
    return (tile->first + r) / (tile->step->num_heads / tile->step->num_kv_heads);
}

static inline int head_of(const Tile *tile, int r) {
    const int G = tile->step->num_heads / tile->step->num_kv_heads;
    return tile->k * G + (tile->first + r) % G;
}

/* Row r sees the positions [first_seen, seen_by). */
static inline int64_t seen_by(const Tile *tile, int r) { return tile->past + token_of(tile, r) + 1; }

static inline int64_t first_seen(const Tile *tile, int r) {
    const int64_t first = seen_by(tile, r) - tile->step->window;
    return first > 0 ? first : 0;
}

/* The two halves of LANES positions from x on. Behind `end`, and before all that any row sees, there may be
 * no block: then the other half again. */
static inline void find(const Tile *tile, const scalar *kv, int64_t x, int64_t end, const scalar *halves[2]) {
    const scalar *last = kv + place(tile->step, tile->table_M, tile->k, x + 8 < end ? x + 8 : x);
    halves[0] = x + 8 > tile->seen_from ? kv + place(tile->step, tile->table_M, tile->k, x) : last;
    halves[1] = last;
}

/* Blocks lie anywhere in memory, so no processor guesses the next one. */
static inline void fetch_early(const scalar *const halves[2]) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 8 * HEAD_DIM; i += 64 / sizeof(scalar)) __builtin_prefetch(halves[half] + i);
}

static inline void score(
    const Tile *tile, const scalar *kv, const Query *query, int64_t from, int64_t upto, int64_t end,
    Scores *scores) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t x = from; x < upto; x += LANES) {
        const int column = (x - from) / LANES;
        const scalar *halves[2], *next[2];
        Keys keys;
        find(tile, kv, x, end, halves);
        if (x + LANES < end) {
            find(tile, kv, x + LANES, end, next);
            fetch_early(next);
        }
        find(tile, kv + tile->step->value_stride, x, end, next);
        fetch_early(next);
        load_keys(keys, halves[0], halves[1]);
        for (int r = 0; r < tile->num_rows; r += 4) {
            floats scores_4[4];
            dot(scores_4, query + r, keys);
            for (int i = 0; i < 4; i++) scores[r + i][column] = scores_4[i] * tile->step->scale;
        }
        if (x + LANES > seen_by(tile, 0) || x < first_seen(tile, tile->num_rows - 1))
            for (int r = 0; r < tile->num_rows; r++) {
                const int upto_seen = seen_by(tile, r) - x;
                const int64_t before = first_seen(tile, r) - x;
                const ints visible = (lane < upto_seen) & (lane >= (int)(before < LANES ? before : LANES));
                scores[r][column] = choose(visible, scores[r][column], splat(-INFINITY));
            }
    }
}

/* Scores become weights relative to the best so far; what was summed up by then is scaled to match. */
static inline void soften(Scores scores, int columns, float *best, float *total, Head sum_D) {
    floats most = scores[0], weights = {};
    for (int c = 1; c < columns; c++) most = larger(scores[c], most);
    const float now = fmaxf(*best, maximum(most)), kept = expf(*best - now);
    for (int c = 0; c < columns; c++) weights += scores[c] = exp_of_negative(scores[c] - now);
    for (int part = 0; part < PARTS; part++) sum_D[part] *= kept;
    *total = *total * kept + sum(weights);
    *best = now;
}

static inline void add_values(
    const Tile *tile, const scalar *kv, int64_t from, int64_t upto, const Scores *weights, Head *sums) {
    for (int64_t x = from; x < upto; x += LANES) {
        const int column = (x - from) / LANES;
        const scalar *halves[2];
        Head values[LANES];
        find(tile, kv + tile->step->value_stride, x, upto, halves);
        for (int i = 0; i < LANES; i++)
            for (int part = 0; part < PARTS; part++) {
                const scalar *value = halves[i / 8] + i % 8 * HEAD_DIM + part * LANES;
                /* What lies outside of what is seen may be NaN, which a weight of 0 would not silence. */
                const int is_seen = x + i >= tile->seen_from && x + i < upto;
                values[i][part] = is_seen ? load(value, TAIL(part)) : (floats){};
            }
        for (int r = 0; r < tile->num_rows; r += 2) { /* two sums at once, to keep the multipliers busy */
            const floats a = weights[r][column], b = weights[r + 1][column];
            for (int part = 0; part < PARTS; part++) {
                floats sum_a = sums[r][part], sum_b = sums[r + 1][part];
                for (int i = 0; i < LANES; i++) {
                    sum_a += a[i] * values[i][part];
                    sum_b += b[i] * values[i][part];
                }
                sums[r][part] = sum_a, sums[r + 1][part] = sum_b;
            }
        }
    }
}

static void attend_tile(const Tile *tile, const scalar *qkv, const scalar *kv, scalar *out) {
    const Step *step = tile->step;
    const int64_t start = step->query_starts[tile->s], end = seen_by(tile, tile->num_rows - 1);
    const int token_stride = (step->num_heads + 2 * step->num_kv_heads) * HEAD_DIM;
    Query query[ROWS] = {};
    Scores scores[ROWS] = {};
    Head sums[ROWS] = {};
    float best[ROWS], total[ROWS] = {};
    for (int r = 0; r < tile->num_rows; r++) {
        const int64_t token = start + token_of(tile, r);
        load_query(query[r], qkv + token * token_stride + head_of(tile, r) * HEAD_DIM);
        best[r] = -INFINITY;
    }
    /* The windows of a tile's rows begin within fewer than SPAN - LANES positions of one another: each row
     * finds one in the first span, and so a best score that is finite. */
    for (int64_t from = tile->seen_from / LANES * LANES; from < end; from += SPAN) {
        const int64_t upto = from + SPAN < end ? from + SPAN : end;
        score(tile, kv, (const Query *)query, from, upto, end, scores);
        for (int r = 0; r < tile->num_rows; r++)
            soften(scores[r], (upto - from + LANES - 1) / LANES, best + r, total + r, sums[r]);
        add_values(tile, kv, from, upto, (const Scores *)scores, sums);
    }
    for (int r = 0; r < tile->num_rows; r++) {
        const int64_t token = start + token_of(tile, r);
        scalar *out_D = out + (token * step->num_heads + head_of(tile, r)) * HEAD_DIM;
        for (int part = 0; part < PARTS; part++)
            store(out_D + part * LANES, sums[r][part] * (1 / total[r]), TAIL(part));
    }
}

static Tile find_tile(const Step *step, int64_t number, int k) {
    int64_t s = 0, behind = step->num_seqs;
    while (behind - s > 1) {
        const int64_t middle = (s + behind) / 2;
        if (step->tile_starts[middle] <= number) s = middle;
        else behind = middle;
    }
    const int64_t count = step->query_starts[s + 1] - step->query_starts[s];
    const int64_t num_rows = count * (step->num_heads / step->num_kv_heads);
    const int64_t first = (number - step->tile_starts[s]) * ROWS;
    const int64_t end = first + ROWS < num_rows ? first + ROWS : num_rows;
    Tile tile = {step, s, first, end, k, end - first, step->context_lens[s] - count,
                 step->block_tables + s * step->table_width, 0};
    tile.seen_from = first_seen(&tile, 0);
    return tile;
}

/* One layer of a step: what its turns share. */
typedef struct {
    const Step *step;
    scalar *qkv, *kv, *out;
} Layer;

static void prepare_sequence(const void *job, int64_t s) {
    const Layer *layer = job;
    const Step *step = layer->step;
    const int token_stride = (step->num_heads + 2 * step->num_kv_heads) * HEAD_DIM;
    const int64_t start = step->query_starts[s], end = step->query_starts[s + 1];
    const int32_t *table_M = step->block_tables + s * step->table_width;
    for (int64_t t = start; t < end; t++)
        prepare_token(step, layer->qkv + t * token_stride, layer->kv, table_M, step->context_lens[s] - end + t);
}

static void attend_item(const void *job, int64_t item) {
    const Layer *layer = job;
    const int K = layer->step->num_kv_heads;
    const Tile tile = find_tile(layer->step, item / K, item % K);
    attend_tile(&tile, layer->qkv, layer->kv, layer->out);
}

/* qkv: TXD, its query heads are turned in place. kv: the layer's place in the pool. out: THD. */
void attend(const Step *step, scalar *qkv, scalar *kv, scalar *out) {
    const int64_t S = step->num_seqs, K = step->num_kv_heads;
    const Layer layer = {step, qkv, kv, out};
    int64_t work = 0;
    for (int64_t s = 0; s < S; s++) {
        const int64_t seen = step->context_lens[s] < step->window ? step->context_lens[s] : step->window;
        work += (step->tile_starts[s + 1] - step->tile_starts[s]) * seen * K * HEAD_DIM;
    }
    const int num_threads = work > SMALL ? step->num_threads : 1;
    share(S, num_threads, prepare_sequence, &layer);
    share(step->tile_starts[S] * K, num_threads, attend_item, &layer);
}
