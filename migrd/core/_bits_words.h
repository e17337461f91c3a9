/* SPDX-License-Identifier: Apache-2.0
 *
 * Loops over 64-bit words, without anything of Python: what _bits.c is made of.
 *
 * Memory is read and written as words at any address. Each loop that a wider processor can do much
 * faster is there twice, "portable" and "avx2"; `struct level` holds one set of them. All loops go
 * through memory once. Nothing here allocates, and nothing reads a byte that was not asked for.
 *
 * Edges: w ^ (w << 1 | last bit of the word before) has a bit wherever a run of ones begins or
 * ends. Zeros and ones have none, so that both are skipped by the same test, many words at a time.
 */

#ifndef MIGRD_BITS_WORDS_H
#define MIGRD_BITS_WORDS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are little-endian: on this machine numpy does it"
#endif

typedef uint64_t word __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define ALL_ONES UINT64_MAX
/* A block stays in the first-level cache while several sources go into it. */
enum { BLOCK_WORDS = 2048, SOURCES_AT_ONCE = 4 };

/* Where a search for extents stands; `first` and `length` are pairs in `out`. */
struct search {
    word *out;
    size_t room, found;
    uint64_t gap;
    uint64_t first, end; /* of the last extent found */
    int open;            /* its end is not known yet */
    int64_t next;        /* where the first one begins that has no room, or -1 */
};

struct level {
    const char *name;
    /* dst |= all sources, 0 to SOURCES_AT_ONCE of them; how many are set then. */
    uint64_t (*or_sources)(word *dst, const word *const *sources, size_t count, size_t words);
    /* dst |= bits from bit `shift` (0 to 7) of src on; how many are new. */
    uint64_t (*or_shifted)(word *dst, const unsigned char *src, unsigned shift, size_t words);
    uint64_t (*count)(const word *src, size_t words);
    /* Take up the edges of words [begin, end); there is a word before `begin`. 0: out of room. */
    int (*search)(struct search *at, const word *src, size_t begin, size_t end);
};

INLINE uint64_t low_bits(unsigned bits)
{
    return bits >= 64 ? ALL_ONES : ((uint64_t)1 << bits) - 1;
}

INLINE uint64_t ones(uint64_t w)
{
    w -= w >> 1 & 0x5555555555555555u;
    w = (w & 0x3333333333333333u) + (w >> 2 & 0x3333333333333333u);
    w = (w + (w >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (w * 0x0101010101010101u) >> 56;
}

/* --- extents ------------------------------------------------------------------------------- */

INLINE int begin_run(struct search *at, uint64_t page)
{
    if (at->found && page - at->end <= at->gap) {
        at->open = 1;
        return 1;
    }
    if (at->found == at->room) {
        at->next = (int64_t)page;
        return 0;
    }
    at->out[2 * at->found++] = at->first = page;
    at->open = 1;
    return 1;
}

INLINE void end_run(struct search *at, uint64_t page)
{
    at->out[2 * at->found - 1] = page - at->first;
    at->end = page;
    at->open = 0;
}

/* The edges of one word; they begin and end runs by turns. 0: out of room. */
INLINE int take_edges(struct search *at, uint64_t edges, uint64_t page)
{
    if (edges && at->open) {
        end_run(at, page + (uint64_t)__builtin_ctzll(edges));
        edges &= edges - 1;
    }
    while (edges) {
        if (!begin_run(at, page + (uint64_t)__builtin_ctzll(edges)))
            return 0;
        edges &= edges - 1;
        if (!edges)
            break;
        end_run(at, page + (uint64_t)__builtin_ctzll(edges));
        edges &= edges - 1;
    }
    return 1;
}

INLINE uint64_t edges_of(const word *src, size_t at)
{
    return src[at] ^ (src[at] << 1 | src[at - 1] >> 63);
}

INLINE int search_one_by_one(struct search *at, const word *src, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; i++)
        if (!take_edges(at, edges_of(src, i), (uint64_t)i * 64))
            return 0;
    return 1;
}

/* --- portable ------------------------------------------------------------------------------ */

INLINE uint64_t or_one(word *dst, const word *const *sources, size_t count, size_t at)
{
    uint64_t w = dst[at];
    for (size_t s = 0; s < count; s++)
        w |= sources[s][at];
    return dst[at] = w;
}

static uint64_t portable_or_sources(word *dst, const word *const *sources, size_t count,
                                    size_t words)
{
    uint64_t total = 0;
    for (size_t i = 0; i < words; i++)
        total += ones(or_one(dst, sources, count, i));
    return total;
}

INLINE uint64_t shifted_word(const unsigned char *src, unsigned shift, size_t i)
{
    const word *first = (const word *)(src + 8 * i), *second = (const word *)(src + 8 * i + 1);
    return shift ? *first >> shift | *second << (8 - shift) : *first;
}

static uint64_t portable_or_shifted(word *dst, const unsigned char *src, unsigned shift,
                                    size_t words)
{
    uint64_t newly = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t new = shifted_word(src, shift, i) & ~dst[i];
        dst[i] |= new;
        newly += ones(new);
    }
    return newly;
}

static uint64_t portable_count(const word *src, size_t words)
{
    uint64_t total = 0;
    for (size_t i = 0; i < words; i++)
        total += ones(src[i]);
    return total;
}

static int portable_search(struct search *at, const word *src, size_t begin, size_t end)
{
    size_t i = begin;
    for (; end - i >= 8; i += 8) {
        uint64_t any = 0;
        for (size_t j = i; j < i + 8; j++)
            any |= edges_of(src, j);
        if (any && !search_one_by_one(at, src, i, i + 8))
            return 0;
    }
    return search_one_by_one(at, src, i, end);
}

static const struct level portable = {
    "portable", portable_or_sources, portable_or_shifted, portable_count, portable_search,
};

/* --- avx2 ---------------------------------------------------------------------------------- */

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,popcnt,bmi")))

/* Counts of eight bits stay below 256 for that many pairs of vectors; a pair is a cache line. */
enum { PAIRS_PER_SUM = 15, PAIR_WORDS = 8, AHEAD_WORDS = 32 };

AVX2 INLINE __m256i load(const word *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

AVX2 INLINE __m256i byte_ones(__m256i v)
{
    const __m256i of = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2,
                                        1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_add_epi8(
        _mm256_shuffle_epi8(of, _mm256_and_si256(v, low)),
        _mm256_shuffle_epi8(of, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
}

AVX2 INLINE uint64_t lanes(__m256i sums)
{
    return (uint64_t)_mm256_extract_epi64(sums, 0) + (uint64_t)_mm256_extract_epi64(sums, 1) +
           (uint64_t)_mm256_extract_epi64(sums, 2) + (uint64_t)_mm256_extract_epi64(sums, 3);
}

AVX2 INLINE __m256i add_bytes(__m256i sums, __m256i bytes)
{
    return _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
}

/* Asked for ahead of the processor's own guess, which stops at the end of each page and when a branch
   was guessed wrong. It may be beyond the buffer: that is no access. */
INLINE void ahead(const word *from)
{
    __builtin_prefetch(from + AHEAD_WORDS);
}

/* As many words of `words` as may be counted in bytes. */
INLINE size_t whole_pairs(size_t words)
{
    size_t pairs = words / PAIR_WORDS;
    return PAIR_WORDS * (pairs < PAIRS_PER_SUM ? pairs : PAIRS_PER_SUM);
}

AVX2 INLINE __m256i or_four(word *dst, const word *const *sources, size_t count, size_t at)
{
    __m256i w = load(dst + at);
    for (size_t s = 0; s < count; s++)
        w = _mm256_or_si256(w, load(sources[s] + at));
    _mm256_storeu_si256((__m256i *)(dst + at), w);
    return byte_ones(w);
}

AVX2 INLINE uint64_t or_known(word *dst, const word *const *sources, const size_t count,
                              size_t words)
{
    __m256i total = _mm256_setzero_si256();
    size_t i = 0;
    while (words - i >= PAIR_WORDS) {
        __m256i bytes = _mm256_setzero_si256();
        for (size_t stop = i + whole_pairs(words - i); i < stop; i += PAIR_WORDS) {
            ahead(dst + i);
            for (size_t s = 0; s < count; s++)
                ahead(sources[s] + i);
            __m256i first = or_four(dst, sources, count, i);
            __m256i second = or_four(dst, sources, count, i + 4);
            bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(first, second));
        }
        total = add_bytes(total, bytes);
    }
    uint64_t sum = lanes(total);
    for (; i < words; i++)
        sum += (uint64_t)__builtin_popcountll(or_one(dst, sources, count, i));
    return sum;
}

AVX2 static uint64_t avx2_or_sources(word *dst, const word *const *sources, size_t count,
                                     size_t words)
{
    /* Known to the compiler, so that the pointers stay in registers. */
    switch (count) {
    case 1: {
        const word *const one[] = {sources[0]};
        return or_known(dst, one, 1, words);
    }
    case 2: {
        const word *const two[] = {sources[0], sources[1]};
        return or_known(dst, two, 2, words);
    }
    case 3: {
        const word *const three[] = {sources[0], sources[1], sources[2]};
        return or_known(dst, three, 3, words);
    }
    case 4: {
        const word *const four[] = {sources[0], sources[1], sources[2], sources[3]};
        return or_known(dst, four, 4, words);
    }
    default:
        return or_known(dst, sources, 0, words);
    }
}

AVX2 INLINE __m256i load_shifted(const unsigned char *src, __m128i down, __m128i up)
{
    return _mm256_or_si256(_mm256_srl_epi64(load((const word *)src), down),
                           _mm256_sll_epi64(load((const word *)(src + 1)), up));
}

AVX2 INLINE __m256i or_new(word *dst, __m256i more)
{
    __m256i old = load(dst);
    _mm256_storeu_si256((__m256i *)dst, _mm256_or_si256(old, more));
    return byte_ones(_mm256_andnot_si256(old, more));
}

AVX2 INLINE uint64_t or_shifted(word *dst, const unsigned char *src, unsigned shift,
                                const int is_shifted, size_t words)
{
    const __m128i down = _mm_cvtsi32_si128((int)shift), up = _mm_cvtsi32_si128(8 - (int)shift);
    __m256i newly = _mm256_setzero_si256();
    size_t i = 0;
    while (words - i >= PAIR_WORDS) {
        __m256i bytes = _mm256_setzero_si256();
        for (size_t stop = i + whole_pairs(words - i); i < stop; i += PAIR_WORDS) {
            const unsigned char *from = src + 8 * i;
            __m256i first, second;
            ahead(dst + i);
            ahead((const word *)from);
            if (is_shifted) {
                first = load_shifted(from, down, up);
                second = load_shifted(from + 32, down, up);
            } else {
                first = load((const word *)from);
                second = load((const word *)(from + 32));
            }
            bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(or_new(dst + i, first),
                                                           or_new(dst + i + 4, second)));
        }
        newly = add_bytes(newly, bytes);
    }
    return lanes(newly) + portable_or_shifted(dst + i, src + 8 * i, shift, words - i);
}

AVX2 static uint64_t avx2_or_shifted(word *dst, const unsigned char *src, unsigned shift,
                                     size_t words)
{
    return shift ? or_shifted(dst, src, shift, 1, words) : or_shifted(dst, src, 0, 0, words);
}

AVX2 static uint64_t avx2_count(const word *src, size_t words)
{
    __m256i total = _mm256_setzero_si256();
    size_t i = 0;
    while (words - i >= PAIR_WORDS) {
        __m256i bytes = _mm256_setzero_si256();
        for (size_t stop = i + whole_pairs(words - i); i < stop; i += PAIR_WORDS)
            bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(byte_ones(load(src + i)),
                                                           byte_ones(load(src + i + 4))));
        total = add_bytes(total, bytes);
    }
    uint64_t sum = lanes(total);
    for (; i < words; i++)
        sum += (uint64_t)__builtin_popcountll(src[i]);
    return sum;
}

AVX2 INLINE __m256i edges_of_four(const word *src)
{
    __m256i before = _mm256_srli_epi64(load(src - 1), 63), w = load(src);
    return _mm256_xor_si256(w, _mm256_or_si256(_mm256_slli_epi64(w, 1), before));
}

/* Which of four words are not zero, as four bits. */
AVX2 INLINE unsigned which(__m256i words)
{
    __m256i none = _mm256_cmpeq_epi64(words, _mm256_setzero_si256());
    return 15u ^ (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(none));
}

AVX2 static int avx2_search(struct search *where, const word *src, size_t begin, size_t end)
{
    struct search at = *where; /* by itself in registers: `out` may alias everything else */
    size_t i = begin;
    int has_room = 1;
    for (; end - i >= 16 && has_room; i += 16) {
        ahead(src + i);
        ahead(src + i + PAIR_WORDS);
        __m256i a = edges_of_four(src + i), b = edges_of_four(src + i + 4);
        __m256i c = edges_of_four(src + i + 8), d = edges_of_four(src + i + 12);
        __m256i any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if (_mm256_testz_si256(any, any))
            continue;
        unsigned words = which(a) | which(b) << 4 | which(c) << 8 | which(d) << 12;
        for (; words && has_room; words &= words - 1) {
            size_t j = i + (size_t)__builtin_ctz(words);
            has_room = take_edges(&at, edges_of(src, j), (uint64_t)j * 64);
        }
    }
    if (has_room)
        has_room = search_one_by_one(&at, src, i, end);
    *where = at;
    return has_room;
}

static const struct level avx2 = {
    "avx2", avx2_or_sources, avx2_or_shifted, avx2_count, avx2_search,
};
#endif

/* --- what is the same at every level ------------------------------------------------------- */

/* `bits` (1 to 64) from anywhere; reads only the bytes that they are in. */
static uint64_t take_bits(const unsigned char *src, uint64_t from, unsigned bits)
{
    const unsigned shift = from & 7;
    const unsigned bytes = (shift + bits + 7) / 8;
    uint64_t w = 0;
    src += from >> 3;
    memcpy(&w, src, bytes < 8 ? bytes : 8);
    w >>= shift;
    if (bytes > 8)
        w |= (uint64_t)src[8] << (64 - shift);
    return w & low_bits(bits);
}

INLINE uint64_t or_word(word *dst, uint64_t bits)
{
    uint64_t new = bits & ~*dst;
    *dst |= new;
    return ones(new);
}

static uint64_t or_fine(const struct level *level, word *dst, uint64_t to, uint64_t pages,
                        const unsigned char *src, uint64_t from)
{
    uint64_t newly = 0;
    const unsigned offset = to & 63;
    dst += to >> 6;
    if (offset && pages) {
        const unsigned step = pages < 64 - offset ? (unsigned)pages : 64 - offset;
        newly += or_word(dst++, take_bits(src, from, step) << offset);
        from += step;
        pages -= step;
    }
    newly += level->or_shifted(dst, src + (from >> 3), from & 7, pages >> 6);
    if (pages & 63)
        newly += or_word(dst + (pages >> 6),
                         take_bits(src, from + (pages & ~(uint64_t)63), pages & 63));
    return newly;
}

/* Set bits [to, to + pages); how many are new. */
static uint64_t set_range(const struct level *level, word *dst, uint64_t to, uint64_t pages)
{
    uint64_t newly = 0;
    const unsigned offset = to & 63;
    dst += to >> 6;
    if (offset && pages) {
        const unsigned step = pages < 64 - offset ? (unsigned)pages : 64 - offset;
        newly += or_word(dst++, low_bits(step) << offset);
        pages -= step;
    }
    for (size_t words = pages >> 6, step; words; words -= step, dst += step) {
        step = words < BLOCK_WORDS ? words : BLOCK_WORDS;
        newly += 64 * (uint64_t)step - level->count(dst, step);
        memset(dst, 0xff, step * 8);
    }
    if (pages & 63)
        newly += or_word(dst, low_bits(pages & 63));
    return newly;
}

static uint64_t count_range(const struct level *level, const word *src, uint64_t first,
                            uint64_t pages)
{
    uint64_t total = 0;
    const unsigned offset = first & 63;
    src += first >> 6;
    if (offset && pages) {
        const unsigned step = pages < 64 - offset ? (unsigned)pages : 64 - offset;
        total += ones(*src++ >> offset & low_bits(step));
        pages -= step;
    }
    total += level->count(src, pages >> 6);
    if (pages & 63)
        total += ones(src[pages >> 6] & low_bits(pages & 63));
    return total;
}

/* Extents of bits [first, end) into `at`. */
static void find_extents(const struct level *level, struct search *at, const word *src,
                         uint64_t first, uint64_t end)
{
    if (first >= end)
        return;
    const size_t begin = first >> 6, last = (end - 1) >> 6;
    uint64_t w = src[begin] & ~low_bits(first & 63);
    const uint64_t tail = low_bits((unsigned)((end - 1) & 63) + 1);
    if (begin == last)
        w &= tail;
    if (!take_edges(at, w ^ w << 1, (uint64_t)begin * 64))
        return;
    if (begin < last) {
        if (!level->search(at, src, begin + 1, last))
            return;
        w = src[last] & tail;
        if (!take_edges(at, w ^ (w << 1 | src[last - 1] >> 63), (uint64_t)last * 64))
            return;
    }
    if (at->open)
        end_run(at, end);
}

/* Each bit of src as `bit_pages` bits of dst. The bits come through a small copy, because src need
   not be whole words. */
static uint64_t or_coarse(const struct level *level, word *dst, uint64_t to, uint64_t pages,
                          const unsigned char *src, uint64_t from, uint64_t bit_pages)
{
    enum { BITS = 4096, RUNS = 64 };
    uint64_t some[BITS / 64], runs[2 * RUNS], newly = 0;
    for (uint64_t bits = (pages - 1) / bit_pages + 1, step; pages && bits; bits -= step) {
        step = bits < BITS ? bits : BITS;
        for (uint64_t i = 0; i < step; i += 64)
            some[i / 64] = take_bits(src, from + i, step - i < 64 ? (unsigned)(step - i) : 64);
        struct search at = {.out = (word *)runs, .room = RUNS, .next = 0};
        while (at.next >= 0) {
            uint64_t first = (uint64_t)at.next;
            at.found = 0, at.open = 0, at.next = -1;
            find_extents(level, &at, (const word *)some, first, step);
            for (size_t r = 0; r < at.found; r++) {
                uint64_t begin = runs[2 * r] * bit_pages, length = runs[2 * r + 1] * bit_pages;
                newly += set_range(level, dst, to + begin,
                                   length < pages - begin ? length : pages - begin);
            }
        }
        from += step;
        if (bits > step) {
            to += step * bit_pages;
            pages -= step * bit_pages;
        }
    }
    return newly;
}

/* The first `pages` bits of dst |= those of all sources; how many of them are set then. */
static uint64_t or_all(const struct level *level, word *dst, uint64_t pages,
                       const word *const *sources, size_t count)
{
    uint64_t total = 0;
    const size_t words = pages >> 6;
    const size_t most = count > SOURCES_AT_ONCE ? BLOCK_WORDS : words;
    for (size_t i = 0, step; i < words; i += step) {
        const word *some[SOURCES_AT_ONCE];
        uint64_t set;
        size_t taken = 0;
        step = words - i < most ? words - i : most;
        do {
            size_t n = 0;
            while (n < SOURCES_AT_ONCE && taken < count)
                some[n++] = sources[taken++] + i;
            set = level->or_sources(dst + i, some, n, step);
        } while (taken < count);
        total += set;
    }
    if (pages & 63) {
        uint64_t more = 0;
        for (size_t s = 0; s < count; s++)
            more |= sources[s][words];
        or_word(dst + words, more & low_bits(pages & 63));
        total += ones(dst[words] & low_bits(pages & 63));
    }
    return total;
}

static void and_not(word *dst, uint64_t pages, const word *src)
{
    const size_t words = pages >> 6;
    for (size_t i = 0; i < words; i++)
        dst[i] &= ~src[i];
    if (pages & 63)
        dst[words] &= ~(src[words] & low_bits(pages & 63));
}

static void move_bits(word *dst, uint64_t pages, word *src)
{
    const size_t words = pages >> 6;
    for (size_t i = 0; i < words; i++) {
        dst[i] |= src[i];
        src[i] = 0;
    }
    if (pages & 63) {
        dst[words] |= src[words] & low_bits(pages & 63);
        src[words] &= ~low_bits(pages & 63);
    }
}

#endif
