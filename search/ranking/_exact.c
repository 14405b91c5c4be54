/* The cosine that decides, as `search/ranking/exact.py` says it, of many pairs and to the same bits.

   Products of two float32 are exact in float64. numpy adds up a row in pairs of parts: halves until they have at most
   128 values, and in each of these eight sums side by side. So does this.

   No part of Python is needed to compile this. Whoever changes what the functions take changes their names: a library
   from before may still lie beside newer code.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>

/* On x86-64 compiled three times; the machine takes the widest that it has. Each adds up in the same order. */
#ifdef FOR_EACH_MACHINE
/* A test chooses. */
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EACH_MACHINE
#endif

enum { AT_ONCE = 8, PART = 128 };
typedef double eight __attribute__((vector_size(AT_ONCE * sizeof(double))));
typedef float eight_narrow __attribute__((vector_size(AT_ONCE * sizeof(float))));
typedef struct {
    double dot, square;
} sums;

static inline double joined(const eight *sums) {
    eight s = *sums;
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static inline __attribute__((always_inline)) sums part_sums(const double *q, const float *x, int64_t n) {
    sums all = {0, 0};
    int64_t at = 0;
    if (n >= AT_ONCE) {
        eight dots = {0}, squares = {0};
        for (; at + AT_ONCE <= n; at += AT_ONCE) {
            eight a, b;
            eight_narrow narrow;
            memcpy(&a, q + at, sizeof a);
            memcpy(&narrow, x + at, sizeof narrow);
            b = __builtin_convertvector(narrow, eight);
            dots += a * b;
            squares += b * b;
        }
        all.dot = joined(&dots), all.square = joined(&squares);
    }
    for (; at < n; at++) {
        double value = x[at];
        all.dot += q[at] * value, all.square += value * value;
    }
    return all;
}

FOR_EACH_MACHINE static sums whole_part(const double *q, const float *x, int64_t n) { return part_sums(q, x, n); }

static sums row_sums(const double *q, const float *x, int64_t n) {
    if (n <= PART) return whole_part(q, x, n);
    int64_t half = n / 2 - n / 2 % AT_ONCE;
    sums first = row_sums(q, x, half), second = row_sums(q + half, x + half, n - half);
    return (sums){first.dot + second.dot, first.square + second.square};
}

/* Cosines of pairs of a query and a row.

   rows      [count], where each row is
   queries   [*][length]; squares: of their norms
   numbers   [count], the query of each pair
   cosines   [count], written */
void ruiji_exact_cosines(int64_t count, int64_t length, const float *const *rows, const double *queries,
                         const double *squares, const int64_t *numbers, double *cosines) {
    for (int64_t pair = 0; pair < count; pair++) {
        /* A row comes from anywhere in memory: the next one is on its way while this one is computed. */
        for (int64_t at = 0; pair + 1 < count && at < length; at += 16) __builtin_prefetch(rows[pair + 1] + at);
        sums here = row_sums(queries + numbers[pair] * length, rows[pair], length);
        double cosine = here.dot / sqrt(here.square * squares[numbers[pair]]);
        cosines[pair] = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
    }
}
