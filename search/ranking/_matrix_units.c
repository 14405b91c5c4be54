/* Rows are multiplied with queries by a CPU's matrix units, and the products looked at while they are in its cache.

   AMX multiplies a tile of 16 rows by 32 values with one of 32 values by 16 queries, in bfloat16, and adds the products
   to 16 x 16 sums in float32. Rows are kept tile by tile, so that each is 1 kB in one piece: of 16 rows the first 32
   values, then the next 32, and so on; of the queries each tile has 16 pairs of values, of all 16 queries. What is
   missing to a whole tile is zero. The first value of a row that is not to be found is NaN, and so are its sums.

   For each query there is room for some rows that could be among its best k. If many have come, the k-th largest sum
   tells a cut that k rows reach for certain, and those that cannot reach it are left out. So has `faiss` its reservoirs.

   No part of Python is needed to compile this. Whoever changes what the functions take changes their names: a library
   from before may still lie beside newer code.
*/

/* For `syscall`. */
#define _GNU_SOURCE

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Rows and queries of a tile, and its values of each; rows and queries that are multiplied in one go. */
enum { SIDE = 16, WIDTH = 32, TILE = SIDE * WIDTH, GO = 2 * SIDE };
/* Rows that stay in the second cache while all queries come: 650 kB for 1280 values. Known in compiled.py. With few
   queries it is these that stay there, and fewer rows at once are quicker. */
enum { PANEL = 256, FEW_QUERIES = 128, SMALL_PANEL = 64 };
/* NaN in bfloat16. */
enum { NONE = 0x7fc0 };

/* RUIJI_PLAIN is for tests: the same without matrix units. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(RUIJI_PLAIN)
#if __has_include(<amxbf16intrin.h>)
#define MATRIX_UNITS
#endif
#endif

#ifdef MATRIX_UNITS

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ON_MATRIX_UNITS __attribute__((target("amx-tile,amx-bf16,avx512f")))

/* Whether this process may use them. Linux gives each process the room for tiles when it asks. */
int ruiji_matrix_units(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d >> 22 & 1) || !(d >> 24 & 1) || !__builtin_cpu_supports("avx512f")) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* A constant: gcc 12 is told that the instruction reads the first 8 bytes, and left out what was written behind them.
   Eight tiles of 16 rows of 64 bytes; the fields are those of the processor's palette 1. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
} SHAPE = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};

ON_MATRIX_UNITS static void begin(void) { _tile_loadconfig(&SHAPE); }

ON_MATRIX_UNITS static void end(void) { _tile_release(); }

/* Sums of 32 rows with 32 queries, or with 16: [32][32]. */
ON_MATRIX_UNITS static void multiply(
    const uint16_t *rows, const uint16_t *queries, int64_t tiles, int wide, float *sums) {
    const uint16_t *more_rows = rows + tiles * TILE, *more_queries = queries + tiles * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < tiles * TILE; at += TILE) {
        _tile_loadd(4, rows + at, 64);
        _tile_loadd(6, queries + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, more_rows + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (wide) {
            _tile_loadd(7, more_queries + at, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * GO);
    _tile_stored(2, sums + SIDE * GO, 4 * GO);
    if (wide) {
        _tile_stored(1, sums + SIDE, 4 * GO);
        _tile_stored(3, sums + SIDE * GO + SIDE, 4 * GO);
    }
}

/* Which of 16 sums are not below; bit by bit. */
ON_MATRIX_UNITS static uint32_t reaching(const float *sums, const float *least) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(sums), _mm512_loadu_ps(least), _CMP_GE_OQ);
}

#else

#define ON_MATRIX_UNITS

#ifdef RUIJI_PLAIN
int ruiji_matrix_units(void) { return 1; }
#else
int ruiji_matrix_units(void) { return 0; }
#endif

static void begin(void) {}
static void end(void) {}

static float widened(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static void multiply(const uint16_t *rows, const uint16_t *queries, int64_t tiles, int wide, float *sums) {
    for (int row = 0; row < GO; row++)
        for (int query = 0; query < (wide ? GO : SIDE); query++) {
            const uint16_t *some = rows + row / SIDE * tiles * TILE + row % SIDE * WIDTH;
            const uint16_t *others = queries + query / SIDE * tiles * TILE + query % SIDE * 2;
            float sum = 0;
            for (int64_t value = 0; value < tiles * WIDTH; value++) {
                int64_t tile = value / WIDTH * TILE, inside = value % WIDTH;
                sum += widened(some[tile + inside]) * widened(others[tile + inside / 2 * GO + inside % 2]);
            }
            sums[row * GO + query] = sum;
        }
}

static uint32_t reaching(const float *sums, const float *least) {
    uint32_t found = 0;
    for (int query = 0; query < SIDE; query++) found |= (uint32_t)(sums[query] >= least[query]) << query;
    return found;
}

#endif

/* Round 32 finite values divided by a norm, to the nearest, and of two as near to the even one; adds the squares of what
   that takes from them. */
ON_MATRIX_UNITS static void put_values(const float *values, float norm, uint16_t *into, float *squares) {
    float units[WIDTH], kept[WIDTH];
    uint32_t bits[WIDTH];
    for (int at = 0; at < WIDTH; at++) units[at] = values[at] / norm;
    memcpy(bits, units, sizeof bits);
    for (int at = 0; at < WIDTH; at++) bits[at] = (bits[at] + 0x7fff + (bits[at] >> 16 & 1)) & 0xffff0000u;
    memcpy(kept, bits, sizeof kept);
    for (int at = 0; at < WIDTH; at++) into[at] = (uint16_t)(bits[at] >> 16);
    for (int at = 0; at < WIDTH; at++) squares[at] += (units[at] - kept[at]) * (units[at] - kept[at]);
}

/* Write rows as unit vectors in bfloat16.

   usable   of each row: 0 if it is not to be found
   into     the tiles of all rows, zero before; the first of these rows is row `first` there
   Returns the largest norm of what rounding took from a row. */
double ruiji_round_rows(int64_t count, int64_t length, const float *rows, const float *norms, const uint8_t *usable,
                        uint16_t *into, int64_t first) {
    int64_t tiles = (length + WIDTH - 1) / WIDTH;
    float largest = 0;
    for (int64_t row = 0; row < count; row++) {
        uint16_t *tile = into + (first + row) / SIDE * tiles * TILE + (first + row) % SIDE * WIDTH;
        const float *values = rows + row * length;
        float squares[WIDTH] = {0}, last[WIDTH] = {0}, sum = 0;
        if (!usable[row]) {
            for (int64_t at = 0; at < tiles; at++) memset(tile + at * TILE, 0, WIDTH * sizeof *tile);
            tile[0] = NONE;
            continue;
        }
        int64_t start = 0;
        for (; start + WIDTH <= length; start += WIDTH, tile += TILE) put_values(values + start, norms[row], tile, squares);
        if (start < length) {
            memcpy(last, values + start, (length - start) * sizeof *last);
            put_values(last, norms[row], tile, squares);
        }
        for (int at = 0; at < WIDTH; at++) sum += squares[at];
        if (sum > largest) largest = sum;
    }
    return sqrt(largest);
}

/* A row of the gallery that was found, and its sum with a query; together, since each is written where nothing is near. */
typedef struct {
    float sum;
    int32_t row;
} hit;

/* The k-th largest of some sums; those before it are then not smaller, and those behind it not larger. */
static float kth(hit *hits, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        float pivot = hits[low + (high - low) / 2].sum;
        int64_t i = low, j = high;
        while (i <= j) {
            while (hits[i].sum > pivot) i++;
            while (hits[j].sum < pivot) j--;
            if (i > j) break;
            hit one = hits[i];
            hits[i++] = hits[j];
            hits[j--] = one;
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
    return hits[k - 1].sum;
}

/* No smaller sum can reach a cut. */
static float least_of(double cut, double margin) { return nextafterf((float)(cut - margin), -INFINITY); }

/* Leave out the rows of a query that cannot be among the best k; returns how many are left. */
static int32_t cut_off(hit *hits, int32_t count, int64_t k, double margin, double *cut) {
    if (count < k) return count;
    double reached = kth(hits, count, k) - margin;
    if (reached > *cut) *cut = reached;
    float least = least_of(*cut, margin);
    int32_t left = 0;
    for (int32_t at = 0; at < count; at++)
        if (hits[at].sum >= least) hits[left++] = hits[at];
    return left;
}

/* Find the rows whose sum with a query can reach its cut.

   rows       tiles of `count` rows of `tiles` tiles each; the first is row `first` of the gallery
   from       where to begin, a multiple of 32
   queries    tiles of `asked` queries
   k          raise the cuts so that the best k are found; 0: leave them as they are
   margin     how far a sum can be off
   cuts       [asked], raised
   room       for so many rows of each query, at least `PANEL`
   counts     [asked], rows that were found
   limits     [asked], if there are more, they are looked through; raised
   found      [asked][room], written
   least      [asked, as a multiple of 32], for use here
   Returns where to go on after the rows that were found were taken: `count` if there is nothing left to do. */
int64_t ruiji_find_hits(const uint16_t *rows, int64_t count, int64_t tiles, int64_t first, int64_t from,
                        const uint16_t *queries, int64_t asked, int64_t k, double margin, double *cuts, int64_t room,
                        int32_t *counts, int32_t *limits, hit *found, float *least) {
    float here[GO * GO];
    int64_t panel = from, step;
    for (int64_t query = 0; query < (asked + GO - 1) / GO * GO; query++)
        least[query] = query < asked ? least_of(cuts[query], margin) : INFINITY;
    begin();
    for (; panel < count; panel += step) {
        int full = 0;
        /* Without a cut all rows are found: let there be few. */
        step = asked <= FEW_QUERIES || (k && isinf(cuts[0])) ? SMALL_PANEL : PANEL;
        for (int64_t query = 0; query < asked; query++) {
            if (k && counts[query] > limits[query]) {
                counts[query] = cut_off(found + query * room, counts[query], k, margin, cuts + query);
                least[query] = least_of(cuts[query], margin);
                /* If nearly all are still there, not again at once. */
                if (2 * counts[query] > limits[query]) limits[query] = 2 * counts[query];
            }
            full |= counts[query] + step > room;
        }
        if (full) break;
        int64_t panel_end = panel + step < count ? panel + step : count;
        for (int64_t query = 0; query < asked; query += GO)
            for (int64_t row = panel; row < panel_end; row += GO) {
                int wide = asked - query > SIDE;
                int64_t some = panel_end - row < GO ? panel_end - row : GO;
                multiply(rows + row * tiles * WIDTH, queries + query * tiles * WIDTH, tiles, wide, here);
                for (int64_t i = 0; i < some; i++)
                    for (int half = 0; half <= wide; half++) {
                        uint32_t hits = reaching(here + i * GO + half * SIDE, least + query + half * SIDE);
                        for (; hits; hits &= hits - 1) {
                            int64_t column = half * SIDE + __builtin_ctz(hits), one = query + column;
                            found[one * room + counts[one]++] = (hit){here[i * GO + column], (int32_t)(first + row + i)};
                        }
                    }
            }
    }
    end();
    if (panel < count) return panel;
    for (int64_t query = 0; k && query < asked; query++)
        counts[query] = cut_off(found + query * room, counts[query], k, margin, cuts + query);
    return count;
}
