/* Pillow's resizing of 8-bit pixels, with vector instructions and to the same bits.

   As in Pillow 13, each value is a sum of weights times pixels, in one pass for either direction; weights are whole
   numbers of 2^-22, and a sum is rounded and clipped to 0..255 after each pass. Which pass is first depends on the
   sizes. Sums of whole numbers do not depend on their order, so they can be taken several at a time.

   One instruction multiplies 16-bit numbers in pairs and adds each pair to 32 bits. A weight has 23 bits and a sign, so
   it is multiplied as two halves. Output rows are made in order, and between the passes only the rows are kept that the
   next output needs, so that they stay in the cache.

   Of the resized picture only a window is made, with the weights of the whole. So its pixels are those that a crop after
   resizing would have, and no others are computed.

   No part of Python is needed to compile this. Whoever changes what the functions take changes their names: a library
   from before may still lie beside newer code.
*/

#include <stddef.h>
#include <stdint.h>

/* Known by these numbers in workers/decode/resize.py. */
enum { BILINEAR = 0, BICUBIC = 1 };
enum { DONE = 0, LEFT_TO_PILLOW = 1, NO_MEMORY = 2 };

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WEIGHT_BITS = 22, LOW_BITS = 11, HALF = 1 << (WEIGHT_BITS - 1) };
/* More taps than this are left to Pillow, and so are sides that no picture has; products of sizes fit into an int. */
enum { MAX_TAPS = 1024, MAX_SIDE = 1 << 20 };

/* Where the window of each output begins, and its weights: for every two taps a pair of upper halves, then one of
   lower halves, each pair in 32 bits. All windows are `taps` long, an even number, and lie within the image. */
typedef struct {
    int taps;
    int32_t *first;
    uint32_t *weights;
} axis;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Keys' cubic convolution with a = -0.5. */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return 0;
}

/* The pixels from `*low` up to, not including, the returned one have a part in an output. */
static int window(double center, double support, int size, int *low) {
    int high = (int)(center + support + 0.5);
    *low = (int)(center - support + 0.5);
    if (*low < 0) *low = 0;
    return high < size ? high : size;
}

/* The `outputs` from number `from` on, of the `resized` that the whole side becomes. */
static int make_axis(axis *made, int size, int resized, int from, int outputs, int filter) {
    double scale = (double)size / resized, stretch = scale < 1 ? 1 : scale;
    double support = (filter == BICUBIC ? 2 : 1) * stretch, inverse = 1 / stretch;
    double raw[MAX_TAPS];
    int low, taps = 0;

    if (2 * support + 2 > MAX_TAPS) return LEFT_TO_PILLOW;
    for (int output = 0; output < outputs; output++) {
        int length = window((from + output + 0.5) * scale, support, size, &low) - low;
        if (length > taps) taps = length;
    }
    taps += taps % 2;
    if (taps > size) return LEFT_TO_PILLOW;
    made->taps = taps;
    made->first = malloc(outputs * sizeof *made->first);
    made->weights = calloc((size_t)outputs * taps, sizeof *made->weights);
    if (!made->first || !made->weights) return NO_MEMORY;

    for (int output = 0; output < outputs; output++) {
        double center = (from + output + 0.5) * scale, sum = 0;
        int high = window(center, support, size, &low);
        int first = low + taps <= size ? low : size - taps;
        uint32_t *weights = made->weights + (size_t)output * taps;

        for (int x = low; x < high; x++) {
            double distance = (x - center + 0.5) * inverse;
            raw[x - low] = filter == BICUBIC ? bicubic(distance) : bilinear(distance);
            sum += raw[x - low];
        }
        for (int x = low; x < high; x++) {
            double exact = raw[x - low] / sum * (1 << WEIGHT_BITS);
            int weight = (int)(exact < 0 ? exact - 0.5 : exact + 0.5), tap = x - first;
            weights[tap / 2 * 2] |= ((uint32_t)(weight >> LOW_BITS) & 0xffff) << 16 * (tap % 2);
            weights[tap / 2 * 2 + 1] |= (uint32_t)(weight & ((1 << LOW_BITS) - 1)) << 16 * (tap % 2);
        }
        made->first[output] = first;
    }
    return DONE;
}

static void free_axis(axis *made) {
    free(made->first);
    free(made->weights);
}

/* The sum of both halves' sums, rounded, as whole pixel values that may still be outside 0..255. */
__attribute__((target("avx2"))) static inline __m256i joined(__m256i high, __m256i low) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low), WEIGHT_BITS);
}

/* Two rows at once, each with one half of a register, for they share their weights. */
__attribute__((target("avx2"))) static void resize_rows(
    const uint8_t *upper, const uint8_t *lower, uint8_t *upper_out, uint8_t *lower_out, const axis *columns, int outputs
) {
    /* RGBX RGBX to RR GG BB XX, as 16 bits each. */
    const __m256i paired = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1)
    );
    const uint32_t *weights = columns->weights;

    for (int output = 0; output < outputs; output++) {
        const uint8_t *one = upper + 4 * (ptrdiff_t)columns->first[output];
        const uint8_t *other = lower + 4 * (ptrdiff_t)columns->first[output];
        __m256i high = _mm256_setzero_si256(), low = _mm256_set1_epi32(HALF);

        for (int tap = 0; tap < columns->taps; tap += 2, one += 8, other += 8, weights += 2) {
            __m256i pixels = _mm256_set_m128i(
                _mm_loadl_epi64((const __m128i *)other), _mm_loadl_epi64((const __m128i *)one)
            );
            pixels = _mm256_shuffle_epi8(pixels, paired);
            high = _mm256_add_epi32(high, _mm256_madd_epi16(pixels, _mm256_set1_epi32((int)weights[0])));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(pixels, _mm256_set1_epi32((int)weights[1])));
        }
        __m256i sums = joined(high, low);
        sums = _mm256_packs_epi32(sums, sums);
        sums = _mm256_packus_epi16(sums, sums);
        int pixel = _mm256_extract_epi32(sums, 0);
        memcpy(upper_out + 4 * output, &pixel, 4);
        pixel = _mm256_extract_epi32(sums, 4);
        memcpy(lower_out + 4 * output, &pixel, 4);
    }
}

/* One output row, number y, of `length` bytes, at least 16, from a ring of rows that has those of its window; from one
   row to the next it is `stride` bytes. */
__attribute__((target("avx2"))) static void resize_columns(
    const uint8_t *ring, int ring_rows, ptrdiff_t stride, int length, const axis *rows, int y, uint8_t *out
) {
    const uint32_t *weights = rows->weights + (ptrdiff_t)y * rows->taps;

    for (int next = 0; next < length; next += 16) {
        /* The last 16 bytes may have been begun before. */
        int start = next + 16 <= length ? next : length - 16, row = rows->first[y] % ring_rows;
        __m256i high_a = _mm256_setzero_si256(), low_a = _mm256_set1_epi32(HALF), high_b = high_a, low_b = low_a;

        for (int tap = 0; tap < rows->taps; tap += 2) {
            __m128i one = _mm_loadu_si128((const __m128i *)(ring + row * stride + start));
            row = row + 1 < ring_rows ? row + 1 : 0;
            __m128i other = _mm_loadu_si128((const __m128i *)(ring + row * stride + start));
            row = row + 1 < ring_rows ? row + 1 : 0;
            __m256i a = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, other));
            __m256i b = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, other));
            __m256i high = _mm256_set1_epi32((int)weights[tap]), low = _mm256_set1_epi32((int)weights[tap + 1]);
            high_a = _mm256_add_epi32(high_a, _mm256_madd_epi16(a, high));
            high_b = _mm256_add_epi32(high_b, _mm256_madd_epi16(b, high));
            low_a = _mm256_add_epi32(low_a, _mm256_madd_epi16(a, low));
            low_b = _mm256_add_epi32(low_b, _mm256_madd_epi16(b, low));
        }
        __m256i words = _mm256_packs_epi32(joined(high_a, low_a), joined(high_b, low_b));
        words = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
        __m128i values = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(out + start), values);
    }
}

static uint8_t *without_fourth(const uint8_t *row, int width, uint8_t *out) {
    for (int x = 0; x < width; x++, out += 3) memcpy(out, row + 4 * x, 3);
    return out;
}

static int rows_first(
    const uint8_t *pixels, int height, int width, uint8_t *out, int out_height, int out_width,
    const axis *rows, const axis *columns
) {
    /* One row more than a window has, since they come two at a time; and the output's. */
    int ring_rows = rows->taps + 1, ready = rows->first[0];
    ptrdiff_t length = 4 * (ptrdiff_t)width, out_length = 4 * (ptrdiff_t)out_width;
    uint8_t *ring = malloc((ring_rows + 1) * out_length);

    if (!ring) return NO_MEMORY;
    uint8_t *row = ring + ring_rows * out_length;
    for (int y = 0; y < out_height; y++) {
        for (; ready < rows->first[y] + rows->taps; ready += 2) {
            int below = ready + 1 < height ? ready + 1 : ready;
            resize_rows(
                pixels + ready * length, pixels + below * length, ring + ready % ring_rows * out_length,
                ring + (ready + 1) % ring_rows * out_length, columns, out_width
            );
        }
        resize_columns(ring, ring_rows, out_length, (int)out_length, rows, y, row);
        out = without_fourth(row, out_width, out);
    }
    free(ring);
    return DONE;
}

static int columns_first(
    const uint8_t *pixels, int height, int width, uint8_t *out, int out_height, int out_width,
    const axis *rows, const axis *columns
) {
    /* The columns that any output needs, and four at least. */
    int end = columns->first[out_width - 1] + columns->taps, start = columns->first[0];
    if (start > end - 4) start = end > 4 ? end - 4 : 0;
    if (end < start + 4) end = start + 4;
    ptrdiff_t stride = 4 * (ptrdiff_t)width, length = 4 * (ptrdiff_t)(end - start), out_length = 4 * (ptrdiff_t)out_width;
    uint8_t *between = malloc(2 * (length + out_length));

    if (!between) return NO_MEMORY;
    uint8_t *resized = between + 2 * length;
    for (int x = 0; x < out_width; x++) columns->first[x] -= start;
    for (int y = 0; y < out_height; y += 2) {
        int count = y + 1 < out_height ? 2 : 1;
        for (int n = 0; n < count; n++)
            resize_columns(pixels + 4 * start, height, stride, (int)length, rows, y + n, between + n * length);
        resize_rows(between, between + (count - 1) * length, resized, resized + out_length, columns, out_width);
        for (int n = 0; n < count; n++) out = without_fourth(resized + n * out_length, out_width, out);
    }
    free(between);
    return DONE;
}

static int resize(
    const uint8_t *pixels, int height, int width, int resized_height, int resized_width,
    uint8_t *out, int top, int left, int out_height, int out_width, int filter
) {
    axis columns = {0}, rows = {0};
    int outcome = LEFT_TO_PILLOW;

    /* Four pixels are a vector. */
    if (width >= 4 && out_width >= 4 && width <= MAX_SIDE && resized_width <= MAX_SIDE)
        outcome = make_axis(&columns, width, resized_width, left, out_width, filter);
    if (outcome == DONE) outcome = make_axis(&rows, height, resized_height, top, out_height, filter);
    if (outcome == DONE) {
        /* Pillow 13's rule, of the whole picture; before, rows always came first. */
        int by_columns = height > resized_height && height - resized_height > 2 * (width - resized_width);
        outcome = (by_columns ? columns_first : rows_first)(
            pixels, height, width, out, out_height, out_width, &rows, &columns
        );
    }
    free_axis(&columns);
    free_axis(&rows);
    return outcome;
}

static int supported(void) {
    return __builtin_cpu_supports("avx2") != 0;
}

#else

static int resize(
    const uint8_t *pixels, int height, int width, int resized_height, int resized_width,
    uint8_t *out, int top, int left, int out_height, int out_width, int filter
) {
    return LEFT_TO_PILLOW;
}

static int supported(void) {
    return 0;
}

#endif

/* Whether this processor has the instructions. */
int ruiji_resize_supported(void) {
    return supported();
}

/* uint8[height, width, 4], brought to [resized_height, resized_width], of which the window from (top, left) on becomes
   uint8[out_height, out_width, 3]. The fourth channel is left out. Sizes are at least 1, the window lies within. */
int ruiji_resize_window(
    const uint8_t *pixels, int height, int width, int resized_height, int resized_width,
    uint8_t *out, int top, int left, int out_height, int out_width, int filter
) {
    return resize(pixels, height, width, resized_height, resized_width, out, top, left, out_height, out_width, filter);
}
