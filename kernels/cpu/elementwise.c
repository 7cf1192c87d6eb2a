/* What stands between a layer's matrix products and attention, and the choice of greedy tokens.
 *
 * Legend: T packed tokens, M hidden size, F intermediate size, R rows of logits, V vocabulary.
 */
#include "threads.h"
#include "vector.h"

#define FEW 50000 /* elements that one thread sees to: see SMALL in attention.c */

typedef struct {
    int64_t M;
    float eps;
    scalar *x;
    const scalar *delta, *weight_M;
    scalar *normed;
} AddNorm;

static void add_norm_row(const void *job, int64_t t) {
    const AddNorm *all = job;
    const int64_t M = all->M;
    scalar *x_M = all->x + t * M;
    floats squares = {};
    for (int64_t m = 0; m < M; m += LANES) {
        floats numbers = load(x_M + m, M - m);
        if (all->delta) {
            store(x_M + m, numbers + load(all->delta + t * M + m, M - m), M - m);
            numbers = load(x_M + m, M - m);
        }
        squares += numbers * numbers;
    }
    const float inverse = 1 / sqrtf(sum(squares) / M + all->eps);
    for (int64_t m = 0; m < M; m += LANES)
        store(all->normed + t * M + m, load(x_M + m, M - m) * inverse * load(all->weight_M + m, M - m), M - m);
}

/* x += delta, where there is a delta; then normed = x / rms(x) * weight. All TM. */
void add_norm(int64_t T, int64_t M, int32_t num_threads, float eps, scalar *x, const scalar *delta,
              const scalar *weight_M, scalar *normed) {
    const AddNorm all = {M, eps, x, delta, weight_M, normed};
    share(T, T * M > FEW ? num_threads : 1, add_norm_row, &all);
}

typedef struct {
    int64_t F;
    const scalar *gate_up;
    scalar *out;
} SiluMul;

static void silu_mul_row(const void *job, int64_t t) {
    const SiluMul *all = job;
    const int64_t F = all->F;
    const scalar *gate_F = all->gate_up + 2 * t * F, *up_F = gate_F + F;
    for (int64_t f = 0; f < F; f += LANES) {
        const floats gate = load(gate_F + f, F - f), up = load(up_F + f, F - f);
        const floats decay = exp_of_negative(choose(gate > 0, -gate, gate));
        const floats sigmoid = choose(gate > 0, splat(1), decay) / (1 + decay);
        store(all->out + t * F + f, gate * sigmoid * up, F - f);
    }
}

/* silu(gate) * up: from gate and up side by side, T2F, to TF. */
void silu_mul(int64_t T, int64_t F, int32_t num_threads, const scalar *gate_up, scalar *out) {
    const SiluMul all = {F, gate_up, out};
    share(T, T * F > FEW ? num_threads : 1, silu_mul_row, &all);
}

typedef struct {
    int64_t V;
    const scalar *logits;
    int64_t *ids_R;
    uint8_t *finite_R;
} Argmax;

static void argmax_row(const void *job, int64_t r) {
    const Argmax *all = job;
    const int64_t V = all->V;
    const scalar *logits_V = all->logits + r * V;
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats best = splat(-INFINITY), nothing = {};
    ints best_ids = {};
    for (int64_t v = 0; v < V; v += LANES) {
        floats numbers = load(logits_V + v, V - v);
        /* Infinity and NaN times 0 are NaN, and stay so in the sum. */
        nothing += numbers * 0;
        if (V - v < LANES) numbers = choose(lane < (int)(V - v), numbers, splat(-INFINITY));
        const ints beats = numbers > best;
        best = choose(beats, numbers, best);
        best_ids = (beats & (lane + (int)v)) | (~beats & best_ids);
    }
    float most = -INFINITY;
    int64_t id = 0;
    for (int i = 0; i < LANES; i++)
        if (best[i] > most || (best[i] == most && best_ids[i] < id)) most = best[i], id = best_ids[i];
    all->ids_R[r] = id;
    all->finite_R[r] = sum(nothing) == 0;
}

/* The lowest id of the best logit of each row, and whether all of the row's logits are finite. */
void argmax(int64_t R, int64_t V, int32_t num_threads, const scalar *logits, int64_t *ids_R, uint8_t *finite_R) {
    const Argmax all = {V, logits, ids_R, finite_R};
    share(R, R * V > FEW ? num_threads : 1, argmax_row, &all);
}
