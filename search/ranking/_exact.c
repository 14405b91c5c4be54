/* The cosine that decides, as `search/ranking/exact.py` says it, of many pairs and to the same bits.

   Products of two float32 are exact in float64. numpy adds up a row in pairs of parts: halves until they have at most
   128 values, and in each of these eight sums side by side. So does this.

   No part of Python is needed to compile this. Whoever changes what the functions take changes their names: a library
   from before may still lie beside newer code.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>

/* On x86-64 compiled twice; the machine takes the wider one that it has. Both add up in the same order. */
#ifdef FOR_EACH_MACHINE
/* A test chooses. */
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("default", "avx2")))
#else
#define FOR_EACH_MACHINE
#endif

/* Eight sums side by side are twice four: what is wider than the machine, gcc 12 keeps in memory, and takes 3 times as
   long. */
enum { AT_ONCE = 8, HALF = 4, PART = 128 };
typedef double four __attribute__((vector_size(HALF * sizeof(double))));
typedef float four_narrow __attribute__((vector_size(HALF * sizeof(float))));
typedef struct {
    double dot, square;
} sums;

static inline __attribute__((always_inline)) double joined(const four *first, const four *second) {
    four a = *first, b = *second;
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]));
}

static inline __attribute__((always_inline)) void add(const float *q, const float *x, four *dots, four *squares) {
    four_narrow narrow_a, narrow_b;
    memcpy(&narrow_a, q, sizeof narrow_a);
    memcpy(&narrow_b, x, sizeof narrow_b);
    four a = __builtin_convertvector(narrow_a, four), b = __builtin_convertvector(narrow_b, four);
    *dots += a * b;
    *squares += b * b;
}

/* A row comes from anywhere in memory: while one is computed, the same part of the next one is on its way. */
static inline __attribute__((always_inline)) sums part_sums(const float *q, const float *x, const float *next, int64_t n) {
    sums all = {0, 0};
    int64_t at = 0;
    if (n >= AT_ONCE) {
        four dots = {0}, squares = {0}, more_dots = {0}, more_squares = {0};
        for (; at + AT_ONCE <= n; at += AT_ONCE) {
            __builtin_prefetch(next + at);
            add(q + at, x + at, &dots, &squares);
            add(q + at + HALF, x + at + HALF, &more_dots, &more_squares);
        }
        all.dot = joined(&dots, &more_dots), all.square = joined(&squares, &more_squares);
    }
    for (; at < n; at++) {
        double value = x[at];
        all.dot += q[at] * value, all.square += value * value;
    }
    return all;
}

FOR_EACH_MACHINE static sums whole_part(const float *q, const float *x, const float *next, int64_t n) {
    return part_sums(q, x, next, n);
}

static sums row_sums(const float *q, const float *x, const float *next, int64_t n) {
    if (n <= PART) return whole_part(q, x, next, n);
    int64_t half = n / 2 - n / 2 % AT_ONCE;
    sums first = row_sums(q, x, next, half), second = row_sums(q + half, x + half, next + half, n - half);
    return (sums){first.dot + second.dot, first.square + second.square};
}

/* Cosines of pairs of a query and a row.

   rows      [count], where each row is
   queries   [*][length]; squares: of their norms
   numbers   [count], the query of each pair
   cosines   [count], written */
void ruiji_cosines_of_pairs(int64_t count, int64_t length, const float *const *rows, const float *queries,
                            const double *squares, const int64_t *numbers, double *cosines) {
    for (int64_t pair = 0; pair < count; pair++) {
        const float *next = rows[pair + 1 < count ? pair + 1 : pair];
        sums here = row_sums(queries + numbers[pair] * length, rows[pair], next, length);
        double cosine = here.dot / sqrt(here.square * squares[numbers[pair]]);
        cosines[pair] = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
    }
}
