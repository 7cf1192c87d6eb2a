/* What stands between a layer's matrix products and attention, and the choice of greedy tokens.
 *
 * Legend: T packed tokens, M hidden size, F intermediate size, R rows of logits, V vocabulary.
 */
#include "vector.h"

#define FEW 500000 /* elements that one thread sees to: see SMALL in attention.c */

/* x += delta, where there is a delta; then normed = x / rms(x) * weight. All TM. */
void add_norm(int64_t T, int64_t M, int32_t num_threads, float eps, scalar *x, const scalar *delta, const scalar *weight_M, scalar *normed) {
#pragma omp parallel for num_threads(num_threads) if (T * M > FEW)
    for (int64_t t = 0; t < T; t++) {
        scalar *x_M = x + t * M;
        floats squares = {};
        for (int64_t m = 0; m < M; m += LANES) {
            floats numbers = load(x_M + m, M - m);
            if (delta) {
                store(x_M + m, numbers + load(delta + t * M + m, M - m), M - m);
                numbers = load(x_M + m, M - m);
            }
            squares += numbers * numbers;
        }
        const float inverse = 1 / sqrtf(sum(squares) / M + eps);
        for (int64_t m = 0; m < M; m += LANES)
            store(normed + t * M + m, load(x_M + m, M - m) * inverse * load(weight_M + m, M - m), M - m);
    }
}

/* silu(gate) * up: from gate and up side by side, T2F, to TF. */
void silu_mul(int64_t T, int64_t F, int32_t num_threads, const scalar *gate_up, scalar *out) {
#pragma omp parallel for num_threads(num_threads) if (T * F > FEW)
    for (int64_t t = 0; t < T; t++)
        for (int64_t f = 0; f < F; f += LANES) {
            floats gate = load(gate_up + 2 * t * F + f, F - f), up = load(gate_up + (2 * t + 1) * F + f, F - f);
            floats decay = exp_of_negative(choose(gate > 0, -gate, gate));
            floats sigmoid = choose(gate > 0, splat(1), decay) / (1 + decay);
            store(out + t * F + f, gate * sigmoid * up, F - f);
        }
}

/* The lowest id of the best logit of each row, and whether all of the row's logits are finite. */
void argmax(int64_t R, int64_t V, int32_t num_threads, const scalar *logits, int64_t *ids_R, uint8_t *finite_R) {
#pragma omp parallel for num_threads(num_threads) if (R * V > FEW)
    for (int64_t r = 0; r < R; r++) {
        const scalar *logits_V = logits + r * V;
        const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        floats best = splat(-INFINITY), nothing = {};
        ints best_ids = {};
        for (int64_t v = 0; v < V; v += LANES) {
            floats numbers = load(logits_V + v, V - v);
            /* Infinity and NaN times 0 are NaN, and stay so in the sum. */
            nothing += numbers * 0;
            if (V - v < LANES) numbers = choose(lane < (int)(V - v), numbers, splat(-INFINITY));
            ints beats = numbers > best;
            best = choose(beats, numbers, best);
            best_ids = (beats & (lane + (int)v)) | (~beats & best_ids);
        }
        float most = -INFINITY;
        int64_t id = 0;
        for (int i = 0; i < LANES; i++)
            if (best[i] > most || (best[i] == most && best_ids[i] < id)) most = best[i], id = best_ids[i];
        ids_R[r] = id;
        finite_R[r] = sum(nothing) == 0;
    }
}
