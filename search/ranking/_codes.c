/* Queries are multiplied with rows that are kept in 8 bits, which are read once and as they are.

   A query comes as 16-bit integers, so that each product is exact, and so are their sums in 32 bits: whoever makes these
   integers sees to it (`CodeQueries` in compiled.py). AVX2 multiplies 16 pairs at once and adds each two next to each other.

   No part of Python is needed to compile this. Whoever changes what the functions take changes their names: a library
   from before may still lie beside newer code.
*/

#include <stdint.h>

/* Rows that stay in the nearest cache while all queries come; rows and queries that share what is loaded. */
enum { PANEL = 16, ROWS = 2, QUERIES = 4 };

/* RUIJI_PLAIN is for tests: the same without AVX2. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(RUIJI_PLAIN)

#include <immintrin.h>

#define ON_AVX2 __attribute__((target("avx2")))
enum { AT_ONCE = 16 };

/* Whether this CPU can. */
int ruiji_multiplies_codes(void) { return __builtin_cpu_supports("avx2") != 0; }

ON_AVX2 static inline int32_t total(__m256i sums) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

/* Sums of `height` rows with `width` queries, [height][width]; compiled for each of the few numbers, whose sums then are
   in registers. */
ON_AVX2 static inline __attribute__((always_inline)) void multiply(
    int64_t length, const int8_t *rows, int height, const int16_t *queries, int width, int32_t *sums) {
    __m256i parts[ROWS][QUERIES];
    int64_t at = 0;
#pragma GCC unroll 2
    for (int row = 0; row < height; row++)
#pragma GCC unroll 4
        for (int query = 0; query < width; query++) parts[row][query] = _mm256_setzero_si256();
    for (; at + AT_ONCE <= length; at += AT_ONCE) {
        __m256i wide[ROWS];
#pragma GCC unroll 2
        for (int row = 0; row < height; row++)
            wide[row] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(rows + row * length + at)));
#pragma GCC unroll 4
        for (int query = 0; query < width; query++) {
            __m256i values = _mm256_loadu_si256((const __m256i *)(queries + query * length + at));
#pragma GCC unroll 2
            for (int row = 0; row < height; row++)
                parts[row][query] = _mm256_add_epi32(parts[row][query], _mm256_madd_epi16(wide[row], values));
        }
    }
#pragma GCC unroll 2
    for (int row = 0; row < height; row++)
#pragma GCC unroll 4
        for (int query = 0; query < width; query++) {
            int32_t sum = total(parts[row][query]);
            for (int64_t rest = at; rest < length; rest++) sum += rows[row * length + rest] * queries[query * length + rest];
            sums[row * width + query] = sum;
        }
}

#else

#define ON_AVX2

#ifdef RUIJI_PLAIN
int ruiji_multiplies_codes(void) { return 1; }
#else
int ruiji_multiplies_codes(void) { return 0; }
#endif

static void multiply(int64_t length, const int8_t *rows, int height, const int16_t *queries, int width, int32_t *sums) {
    for (int row = 0; row < height; row++)
        for (int query = 0; query < width; query++) {
            int32_t sum = 0;
            for (int64_t at = 0; at < length; at++) sum += rows[row * length + at] * queries[query * length + at];
            sums[row * width + query] = sum;
        }
}

#endif

/* Dot products of queries and rows.

   rows      [count][length]
   queries   [asked][length]; steps: [asked], what their integers are multiplied by
   products  [asked][stride], of which the first `count` of each are written */
ON_AVX2 void ruiji_multiply_codes(int64_t count, int64_t length, const int8_t *rows, int64_t asked,
                                  const int16_t *queries, const float *steps, float *products, int64_t stride) {
    for (int64_t panel = 0; panel < count; panel += PANEL) {
        int64_t end = panel + PANEL < count ? panel + PANEL : count;
        int height, width;
        for (int64_t query = 0; query < asked; query += width) {
            const int16_t *some = queries + query * length;
            width = asked - query >= QUERIES ? QUERIES : asked - query >= 2 ? 2 : 1;
            for (int64_t row = panel; row < end; row += height) {
                const int8_t *here = rows + row * length;
                int32_t sums[ROWS * QUERIES];
                height = end - row >= ROWS ? ROWS : 1;
                if (width == QUERIES && height == ROWS) multiply(length, here, ROWS, some, QUERIES, sums);
                else if (width == QUERIES) multiply(length, here, 1, some, QUERIES, sums);
                else if (width == 2 && height == ROWS) multiply(length, here, ROWS, some, 2, sums);
                else if (width == 2) multiply(length, here, 1, some, 2, sums);
                else if (height == ROWS) multiply(length, here, ROWS, some, 1, sums);
                else multiply(length, here, 1, some, 1, sums);
                for (int i = 0; i < height; i++)
                    for (int j = 0; j < width; j++)
                        products[(query + j) * stride + row + i] = (float)sums[i * width + j] * steps[query + j];
            }
        }
    }
}
