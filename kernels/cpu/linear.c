/* Products with a bf16 weight that was packed once, for processors that have AVX512_BF16 and no AMX, whose
 * tiles oneDNN uses.
 *
 * Legend: T packed tokens, I inputs, O outputs.
 *
 * The weight lies in *panels* of OUTPUTS rows, padded with zeros: for each two inputs the OUTPUTS pairs of
 * elements side by side. So a step of a few tokens reads each weight once, in order, and multiplies it with
 * TOKENS of them while it is in a register.
 */
#include "dots.h"
#include "threads.h"

#define OUTPUTS 64 /* four vectors of pairs */
#define VECTORS (OUTPUTS / LANES)
#define TOKENS 6 /* with four vectors 24 sums: with the weights and a pair, 29 of 32 registers */
/* Multiplications that one thread sees to: see SMALL in attention.c. Fewer than READING tokens take no less
 * time, since then the weight's way from memory is what takes it. */
#define FEW_PRODUCTS 5000000
#define READING 4
#define LINE 64 /* bytes of memory that come together */
#define LINES 2 /* of the next panel, fetched with each two inputs of this one */

#if defined(SCALAR_BF16) && defined(__AVX512BF16__) && !defined(__AMX_BF16__)

typedef struct {
    int64_t T, I, O, num_panels;
    int num_threads; /* that share the panels */
    const scalar *x, *panels, *bias_O;
    scalar *out;
} Product;

/* Memory to fetch, a few lines at a time, before it is read. */
typedef struct {
    const char *from, *end;
} Ahead;

static inline void fetch(Ahead *ahead) {
    if (ahead->from == ahead->end) return;
    for (int line = 0; line < LINES; line++, ahead->from += LINE) __builtin_prefetch(ahead->from, 0, 2);
}

/* This thread's next panel, by all likelihood. While several rounds of tokens multiply a panel, memory has
 * nothing to do but in the first: with 12 to 16 tokens the products of a 0.5B model took 0.92 of the time. With
 * one round it has no rest, and fetching early took 4% longer. */
static inline Ahead next_panel(const Product *product, int64_t panel) {
    const int64_t next = panel + product->num_threads, size = OUTPUTS * product->I;
    const int is_worth_it = product->T > TOKENS && next < product->num_panels;
    const scalar *from = product->panels + (is_worth_it ? next * size : 0);
    return (Ahead){(const char *)from, (const char *)(is_worth_it ? from + size : from)};
}

/* A constant number of tokens from t on, so that the sums stay in registers; meanwhile what lies `ahead`
 * is fetched. */
static inline __attribute__((always_inline)) void multiply(
    const Product *product, int64_t panel, int64_t t, const int num_tokens, Ahead *ahead) {
    const int64_t I = product->I, O = product->O;
    const scalar *weight = product->panels + panel * OUTPUTS * I, *x = product->x + t * I;
    floats sums[TOKENS][VECTORS] = {};
    for (int64_t i = 0; i < I; i += 2, weight += 2 * OUTPUTS) {
        floats pairs[VECTORS];
        fetch(ahead);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) memcpy(&pairs[v], weight + 2 * LANES * v, sizeof pairs[v]);
#pragma GCC unroll 8
        for (int n = 0; n < num_tokens; n++) {
            unit pair;
            memcpy(&pair, x + n * I + i, sizeof pair);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[n][v] = add_product(sums[n][v], pair, pairs[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
        const int64_t o = panel * OUTPUTS + v * LANES, count = O - o > 0 ? O - o : 0;
        const floats bias = product->bias_O ? load(product->bias_O + o, count) : (floats){};
#pragma GCC unroll 8
        for (int n = 0; n < num_tokens; n++) store(product->out + (t + n) * O + o, sums[n][v] + bias, count);
    }
}

static void multiply_panel(const void *job, int64_t panel) {
    const Product *product = job;
    const int64_t T = product->T;
    Ahead ahead = next_panel(product, panel);
    int64_t t = 0;
    for (; t + TOKENS <= T; t += TOKENS) multiply(product, panel, t, TOKENS, &ahead);
    switch (T - t) {
        case 1: multiply(product, panel, t, 1, &ahead); break;
        case 2: multiply(product, panel, t, 2, &ahead); break;
        case 3: multiply(product, panel, t, 3, &ahead); break;
        case 4: multiply(product, panel, t, 4, &ahead); break;
        case 5: multiply(product, panel, t, 5, &ahead); break;
    }
}

/* x TI times the packed weight, plus the bias O where there is one, to TO. I is even. */
void linear(int64_t T, int64_t I, int64_t O, int32_t num_threads, const scalar *x, const scalar *panels,
            const scalar *bias_O, scalar *out) {
    const int64_t num_panels = (O + OUTPUTS - 1) / OUTPUTS;
    const int64_t products = (T < READING ? READING : T) * I * O;
    const int wanted = products > FEW_PRODUCTS ? num_threads : 1;
    const Product product = {T, I, O, num_panels, wanted, x, panels, bias_O, out};
    share(num_panels, wanted, multiply_panel, &product);
}

#endif
