// What is faster here than in PyTorch's CPU kernels: products of bfloat16, int8 and int4 weights, attention, and what a
// layer does between them, as operators that PyTorch calls without Python. cpu.py builds this file for the CPU at hand.
// One source serves every CPU: vectors are the compiler's (GCC's and clang's vector extensions), as wide as the CPU's
// registers.
//
// Shapes: S tokens. Products: N outputs, K inputs, G groups of a row. Attention: H query heads, G heads of keys and
// values, T slots, d head width.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")  // without it GCC keeps the sums in memory
// Who loads what, against GCC's wish to keep more than there are registers: a value that is used twice is loaded once,
// one that is used again later is loaded again. 22 GMAC/s of 6 tokens in bfloat16 become 28.
#ifdef __SSE2__
#define KEEP(x) asm("" : "+x"(x))
#else
#define KEEP(x) asm("" : "+w"(x))
#endif
#define ANEW(pointer) asm("" : "+r"(pointer))

namespace at {
int get_num_threads();  // PyTorch's
}

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using bfloat16 = uint16_t;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t words __attribute__((vector_size(4 * LANES)));

template <class Value>
inline Value load(const void* p) {
    Value value;
    memcpy(&value, p, sizeof value);
    return value;
}

template <class Value>
inline void store(void* p, Value value) {
    memcpy(p, &value, sizeof value);
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    return load<float>(&bits);
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, bfloat16* p) {  // to the nearest, ties to even; the sum could make an infinity of a NaN
    const uint32_t bits = load<uint32_t>(&x);
    *p = (x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits) >> 16;
}

// A register of bfloat16 numbers is 2 * LANES columns, in pairs; shifting and masking make floats of either half.
inline floats even(ints pairs) { return (floats)(pairs << 16); }
inline floats odd(ints pairs) { return (floats)(pairs & (int32_t)0xffff0000); }

inline ints load_pairs(const bfloat16* p, int64_t n) {  // n: numbers left in this row; zeros follow them
    if (n >= 2 * LANES) return load<ints>(p);
    ints pairs = {};
    memcpy(&pairs, p, 2 * n);
    return pairs;
}

// Back to pairs, rounded to the nearest, ties to even.
inline ints narrow(floats even, floats odd) {
    const auto round = [](floats x) {
        const ints bits = (ints)x;
        return bits + ((x == x) & (0x7fff + (bits >> 16 & 1)));  // the sum could make an infinity of a NaN
    };
    return (round(even) >> 16 & 0xffff) | (round(odd) & (int32_t)0xffff0000);
}

inline float sum_lanes(floats x) {
    float parts[LANES];
    store(parts, x);
    UNROLL for (int n = LANES / 2; n > 0; n /= 2)
        UNROLL for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return parts[0];
}

template <class Function>
inline void with_constant(int64_t n, Function run) {  // run(n), n from 1 to 6, known to the compiler
    switch (n) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        case 4: return run(std::integral_constant<int, 4>());
        case 5: return run(std::integral_constant<int, 5>());
        case 6: return run(std::integral_constant<int, 6>());
    }
}

// Calls run(i) for i below n, in shares of successive ones. This is GCC's `#pragma omp parallel`, called by hand
// because clang's calls another library than PyTorch's: the same threads do both.
extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);

template <class Function>
void parallel(int threads, int64_t n, int64_t share, Function run) {
    struct Work {
        std::atomic<int64_t> next;
        int64_t n, share;
        Function& run;
    } work{{0}, n, share, run};
    const auto take_shares = [](void* data) {
        Work& work = *(Work*)data;
        for (int64_t first; (first = work.next.fetch_add(work.share)) < work.n;)
            for (int64_t i = first; i < std::min(first + work.share, work.n); i++) work.run(i);
    };
    if (n > share && threads > 1)
        GOMP_parallel(take_shares, &work, threads, 0);
    else
        take_shares(&work);
}

// ---- Products: y [S, N] = x [S, K] * w [N, K]^T + bias.
//
// Up to 6 tokens, a chunk, are multiplied at a time by a block of outputs: their sums fit 16 registers. A format says
// how a chunk is laid out for its inner loop, and multiplies.

constexpr int MAX_TOKENS = 6;
constexpr int PREFETCH = 2048;  // bytes ahead of the weights in use

// Weights that are read once go past the L2 cache, which stays with the rest of the program: an eager step in int8
// takes 35 ms instead of 39 (AMD EPYC, Zen 1).
inline void prefetch(const void* p, bool once) { once ? __builtin_prefetch(p, 0, 0) : __builtin_prefetch(p); }

template <class Format, class Number>
void multiply_all(int threads, const Format& format, const Number* x, const float* bias, Number* y, int64_t s,
                  int64_t n) {
    const int64_t n_chunks = (s + MAX_TOKENS - 1) / MAX_TOKENS;
    std::vector<typename Format::Chunk> chunks(n_chunks);
    parallel(threads, n_chunks, 1, [&](int64_t i) {
        const int64_t first = i * s / n_chunks, count = (i + 1) * s / n_chunks - first;  // of about the same size
        chunks[i] = format.lay_out(x + first * format.k, count);
    });
    const int64_t n_blocks = (n + Format::BLOCK - 1) / Format::BLOCK;
    parallel(threads, n_blocks, (n_blocks + threads - 1) / threads, [&](int64_t block) {
        const int64_t start = block * Format::BLOCK, size = std::min<int64_t>(Format::BLOCK, n - start);
        Number* out = y + start;
        for (const auto& chunk : chunks) {
            float sums[MAX_TOKENS][Format::BLOCK];
            with_constant(chunk.count, [&](auto count) {
                format.template multiply<count>(chunk, start, size, n_chunks == 1, sums);
            });
            for (int64_t t = 0; t < chunk.count; t++, out += n)
                for (int64_t i = 0; i < size; i++) narrow(sums[t][i] + (bias ? bias[start + i] : 0), out + i);
        }
    });
}

// bfloat16 as checkpoints hold it, row after row.
struct Bfloat16 {
    static constexpr int BLOCK = 32;
    struct Chunk {
        int64_t count;
        std::vector<float> x;  // [K / (2 * LANES), 2, count, LANES]: the even columns, the odd columns
    };
    const bfloat16* w;
    int64_t k;

    template <class Number>
    Chunk lay_out(const Number* x, int64_t count) const {
        Chunk chunk{count, std::vector<float>((k + 2 * LANES - 1) / (2 * LANES) * (2 * LANES) * count)};
        for (int64_t t = 0; t < count; t++, x += k) {
            float* out = &chunk.x[t * LANES];
            for (int64_t i = 0; i < k; i += 2 * LANES, out += count * 2 * LANES)
                for (int64_t j = 0; j < std::min<int64_t>(2 * LANES, k - i); j++)
                    out[j % 2 * count * LANES + j / 2] = widen(x[i + j]);
        }
        return chunk;
    }

    // A chunk's columns that fit the L1 cache are multiplied by all rows of the block before the next.
    template <int TOKENS>
    void multiply(const Chunk& chunk, int64_t start, int64_t size, bool once, float sums[][BLOCK]) const {
        constexpr int ROWS = TOKENS > 3 ? 2 : TOKENS > 2 ? 3 : 4;  // at a time
        const int64_t n_parts = TOKENS == 1 ? 1 : (k + 1023) / 1024, registers = (k + 2 * LANES - 1) / (2 * LANES);
        const int64_t width = (registers + n_parts - 1) / std::max<int64_t>(n_parts, 1) * 2 * LANES;
        std::fill(sums[0], sums[TOKENS], 0);
        for (int64_t first = 0, last; first < k; first = last) {
            last = std::min(k, first + width);
            int64_t row = 0;
            for (; row + ROWS <= size; row += ROWS) add_rows<TOKENS, ROWS>(chunk, start, row, first, last, once, sums);
            for (; row < size; row++) add_rows<TOKENS, 1>(chunk, start, row, first, last, once, sums);
        }
    }

    template <int TOKENS, int ROWS>
    void add_rows(const Chunk& chunk, int64_t start, int64_t row, int64_t first, int64_t last, bool once,
                  float out[][BLOCK]) const {
        floats sums[ROWS][TOKENS] = {};
        const float* x = &chunk.x[first * TOKENS];
        const bfloat16* w = this->w + (start + row) * k;
        // Prefetched are the rows that follow, PREFETCH bytes or more behind: 13.7 GB/s become 17 with it.
        const int64_t ahead = (PREFETCH / 2 + ROWS * k - 1) / (ROWS * k) * (ROWS * k);
        int64_t i = first;
        const auto add = [&](auto load_line) {
            UNROLL for (int half = 0; half < 2; half++) {
                const bfloat16* again = w + i;
                ANEW(again);
                floats line[ROWS];
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const ints pairs = load_line(again + r * k);
                    line[r] = half ? odd(pairs) : even(pairs);
                }
                UNROLL for (int t = 0; t < TOKENS; t++, x += LANES) {
                    floats inputs = load<floats>(x);
                    KEEP(inputs);
                    UNROLL for (int r = 0; r < ROWS; r++) sums[r][t] += line[r] * inputs;
                }
            }
        };
        for (; i + 2 * LANES <= last; i += 2 * LANES) {
            if (i % 32 == 0)
                UNROLL for (int r = 0; r < ROWS; r++) prefetch(w + r * k + i + ahead, once);
            add([](const bfloat16* line) { return load<ints>(line); });
        }
        if (i < last) add([&](const bfloat16* line) { return load_pairs(line, last - i); });
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int t = 0; t < TOKENS; t++) out[t][row + r] += sum_lanes(sums[r][t]);
    }
};

// int8 and int4, whose sums within a group (of int8: within a row) are exact integers on every CPU. An activation is a
// 16-bit number: x = step * whole, rounded to 2^-16 of the range of its group. A block is two registers of outputs; a
// 32-bit lane has an output's next codes (w + 128 of int8, 0 to 15 of int4), which shifting and masking turn into pairs
// of 16-bit numbers.

// Adds a * b, pair by pair, to 32-bit sums. No vector expression becomes these instructions: the one below, which
// serves CPUs without them, makes int8 2.2 times and int4 2.9 times slower on AVX2, and 6 tokens 8 to 17 times.
inline ints add_pairs(ints sums, words a, words b) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sums + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sums + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sums + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const ints first = ((ints)a << 16 >> 16) * ((ints)b << 16 >> 16);
    return sums + first + ((ints)a >> 16) * ((ints)b >> 16);
#endif
}

// The same numbers with and without fused multiply-adds. (clang fuses nothing across statements by itself.)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

template <int BITS>
struct Integer {
    static constexpr int BLOCK = 2 * LANES;
    static constexpr int TURN = 8;  // inputs at a time
    // Sums of these many inputs fit 32 bits: 128 * 255 * 2^15 / 2 pairs of int8. Python's side keeps groups below.
    static constexpr int MOST = BITS == 8 ? 256 : 4096;
    struct Group {          // of a token's inputs
        float step, total;  // total: of the inputs
        int64_t sum;        // of the 16-bit numbers
    };
    struct Chunk {
        int64_t count;
        std::vector<int16_t> x;  // [K / 8, count, 8]
        std::vector<Group> groups;  // [G, count]
    };
    const uint8_t* w;      // [N / BLOCK, K * BITS / 32, BLOCK, 4 bytes]
    const uint8_t* scales;  // float [N] of int8; bfloat16 [N / BLOCK, G, BLOCK, 2] of int4, scale and zero
    int64_t k, groups;

    template <class Number>
    Chunk lay_out(const Number* x, int64_t count) const {
        const int64_t width = k / groups;
        Chunk chunk{count, std::vector<int16_t>(k * count), std::vector<Group>(groups * count)};
        for (int64_t t = 0; t < count; t++)
            for (int64_t g = 0; g < groups; g++)
                chunk.groups[g * count + t] =
                    round_group(x + t * k + g * width, width, &chunk.x[(g * width * count) + t * TURN], count * TURN);
        return chunk;
    }

    template <class Number>
    static Group round_group(const Number* x, int64_t n, int16_t* out, int64_t stride) {
        int32_t largest = 0;  // as bits, which order like the numbers, infinity and NaN last
        for (int64_t i = 0; i < n; i++) {
            const float value = widen(x[i]);
            largest = std::max(largest, load<int32_t>(&value) & 0x7fffffff);
        }
        const float most = load<float>(&largest);
        if (!(most < INFINITY)) return {NAN, NAN, 0};
        const float step = std::max(most, 1e-30f) / (127 * 256);
        int64_t sum = 0;
        for (int64_t i = 0; i < n; i += TURN, out += stride) {
            int32_t part = 0;
            UNROLL for (int j = 0; j < TURN; j++) {
                const float nearest = widen(x[i + j]) / step + 12582912.0f;  // 1.5 * 2^23: its unit is 1
                part += out[j] = load<int32_t>(&nearest);
            }
            sum += part;
        }
        return {step, step * sum, sum};
    }

    template <int TOKENS>
    void multiply(const Chunk& chunk, int64_t start, int64_t, bool once, float out[][BLOCK]) const {
        const uint8_t* codes = w + start * k * BITS / 8;
        const int16_t* x = chunk.x.data();
        const int64_t width = k / groups;
        floats sums[TOKENS][2] = {};
        doubles exact[TOKENS][2] = {};
        for (int64_t g = 0; g < groups; g++) {
            const Group* group = &chunk.groups[g * TOKENS];
            for (int64_t i = 0; i < width; i += MOST) {
                ints dots[TOKENS][2], others[TOKENS][2] = {};  // others: see multiply_turn
                UNROLL for (int t = 0; t < TOKENS; t++)
                    dots[t][0] = dots[t][1] = ints{} + (BITS == 4 ? int32_t(-8 * group[t].sum) : 0);
                const int64_t n = std::min<int64_t>(MOST, width - i) / TURN;
                for (int64_t turn = 0; turn < n; turn++, codes += BLOCK * BITS, x += TOKENS * TURN)
                    multiply_turn<TOKENS>(codes, x, once, dots, others);
                UNROLL for (int t = 0; t < TOKENS; t++)
                    UNROLL for (int b = 0; b < 2; b++) dots[t][b] += others[t][b];
                if (BITS == 8)
                    UNROLL for (int t = 0; t < TOKENS; t++)
                        UNROLL for (int b = 0; b < 2; b++)
                            exact[t][b] += __builtin_convertvector(dots[t][b], doubles);
                else
                    scale_group<TOKENS>(g, start, group, dots, sums);
            }
        }
        if (BITS == 8) scale_rows<TOKENS>(start, chunk.groups.data(), exact, sums);
        UNROLL for (int t = 0; t < TOKENS; t++)
            UNROLL for (int b = 0; b < 2; b++) store(out[t] + b * LANES, sums[t][b]);
    }

    // With few tokens every second pair has sums of its own, so that additions need not wait for each other.
    template <int TOKENS>
    static inline void multiply_turn(const uint8_t* codes, const int16_t* x, bool once, ints dots[TOKENS][2],
                                     ints others[TOKENS][2]) {
        constexpr bool TWO_CHAINS = 4 * TOKENS <= (LANES == 16 ? 20 : 8);
        for (int i = 0; i < BLOCK * BITS; i += 64) prefetch(codes + PREFETCH + i, once);
        UNROLL for (int part = 0; part < (BITS == 8 ? 2 : 1); part++) {
            words lanes[2];
            UNROLL for (int b = 0; b < 2; b++) lanes[b] = load<words>(codes + (2 * part + b) * 4 * LANES);
            UNROLL for (int pair = 0; pair < 16 / BITS; pair++) {
                words numbers[2];
                UNROLL for (int b = 0; b < 2; b++) {
                    numbers[b] = pair ? lanes[b] >> pair * BITS : lanes[b];
                    if (pair < 16 / BITS - 1) numbers[b] &= uint16_t((1 << BITS) - 1);
                }
                UNROLL for (int t = 0; t < TOKENS; t++) {
                    const ints inputs = ints{} + load<int32_t>(x + t * TURN + 4 * part + 2 * pair);
                    ints(&sums)[2] = TWO_CHAINS && pair % 2 ? others[t] : dots[t];
                    UNROLL for (int b = 0; b < 2; b++) sums[b] = add_pairs(sums[b], numbers[b], (words)inputs);
                }
            }
        }
    }

    template <int TOKENS>
    void scale_rows(int64_t start, const Group* group, doubles exact[TOKENS][2], floats sums[TOKENS][2]) const {
        UNROLL for (int t = 0; t < TOKENS; t++)
            UNROLL for (int b = 0; b < 2; b++) {
                const floats whole = __builtin_convertvector(exact[t][b] - 128.0 * group[t].sum, floats);
                sums[t][b] = whole * (load<floats>((const float*)scales + start + b * LANES) * group[t].step);
            }
    }

    template <int TOKENS>
    void scale_group(int64_t g, int64_t start, const Group* group, ints dots[TOKENS][2], floats sums[TOKENS][2]) const {
        UNROLL for (int b = 0; b < 2; b++) {
            const ints pairs = load<ints>(scales + (start * groups + g * BLOCK + b * LANES) * 4);
            const floats scale = even(pairs), zero = odd(pairs);
            UNROLL for (int t = 0; t < TOKENS; t++) {
                const floats product = __builtin_convertvector(dots[t][b], floats) * (scale * group[t].step);
                const floats offset = zero * group[t].total;
                sums[t][b] = sums[t][b] + product;
                sums[t][b] = sums[t][b] + offset;
            }
        }
    }
};

#pragma GCC pop_options

// ---- Attention: y [S, H, d] of queries q [H, S, d] to keys and values [G, T, d], all bfloat16.
//
// H/G query heads share one head of keys and values, and with S tokens they are the H/G * S rows of this head. Up to 64
// rows read it together, 128 slots at a time, with a softmax that is corrected as larger scores come up (online
// normalizer, arXiv 1805.02867). If there are fewer such tiles of rows than threads, the slots are cut into parts, so
// that every thread has work.

constexpr int TILE = 64;                   // rows
constexpr int SLOTS = 128;                 // at a time
constexpr int MAX_ROWS = 6;                // at a time, whose sums fit 16 registers
constexpr int COLUMNS = 2 * LANES;         // a register of bfloat16 numbers
constexpr int MAX_WIDTH = 256;             // of a head
constexpr int STRIDE = MAX_WIDTH + LANES;  // between queries, not a power of two
constexpr float LEAST = -1e30f;            // below every score

inline floats select(ints mask, floats a, floats b) { return (floats)((mask & (ints)a) | (~mask & (ints)b)); }

// 2^x for x <= 0: the whole part by the exponent, the rest by the series of e^y, whose next term is below 2e-7.
inline floats exp2(floats x) {
    const floats none = {}, one = none + 1, least = none - 126;
    x = select(x < least, least, select(x > none, none, x));  // NaN stays
    const floats shifted = x + 12582912.0f, y = (x - (shifted - 12582912.0f)) * (float)M_LN2;  // 1.5 * 2^23
    floats sum = one;
    UNROLL for (int i = 6; i > 0; i--) sum = y * (1.0f / i) * sum + one;
    return (floats)((ints)sum + ((ints)shifted << 23));
}

// Lanes whose number has HALF in it change places: of the first register with those HALF before of the second.
template <int HALF, int... I>
inline void exchange(ints& a, ints& b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    const ints first = __builtin_shufflevector(a, b, (I & HALF ? LANES + I - HALF : I)...);
    b = __builtin_shufflevector(a, b, (I & HALF ? LANES + I : I + HALF)...);
#else
    const ints first = __builtin_shuffle(a, b, ints{(I & HALF ? LANES + I - HALF : I)...});
    b = __builtin_shuffle(a, b, ints{(I & HALF ? LANES + I : I + HALF)...});
#endif
    a = first;
}

// Lane j of line i changes places with lane i of line j.
template <int HALF = LANES / 2>
inline void transpose(ints lines[LANES]) {
    UNROLL for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) exchange<HALF>(lines[i], lines[i + HALF], std::make_integer_sequence<int, LANES>());
    if constexpr (HALF > 1) transpose<HALF / 2>(lines);
}

// A query and what it has seen of a part of the slots. A slot weighs 2^(score - largest).
struct Row {
    const bfloat16* q;
    const uint8_t* mask;   // [T] whether it sees a slot; null: it does
    int64_t n_seen;        // but never one behind these
    float* sums;           // [d, filled up to whole registers] of values by weights, each register's even columns first
    float largest, total;  // of the scores, of the weights
    float shrink;          // what earlier weights are multiplied with, since largest has grown
};

// Scores of COLUMNS slots. q: [ROWS, STRIDE]; keys: [d, COLUMNS]; scores: [ROWS, SLOTS] from the first on.
template <int ROWS>
void score(const float* q, const floats* keys, int64_t width, float* scores) {
    floats sums[ROWS][2] = {};
    for (int64_t i = 0; i < width; i++, keys += 2)
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int b = 0; b < 2; b++) sums[r][b] += q[r * STRIDE + i] * keys[b];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int b = 0; b < 2; b++) store(scores + r * SLOTS + b * LANES, sums[r][b]);
}

// Which of n slots a row sees, as -1 and 0; whether it sees any.
bool look(const Row& row, int64_t first, int64_t n, int32_t* seen) {
    int32_t any = 0;
    std::fill(seen, seen + SLOTS, 0);
    n = std::min(n, row.n_seen - first);
    for (int64_t t = 0; t < n; t++) any |= seen[t] = row.mask ? -(row.mask[first + t] != 0) : -1;
    return any;
}

// Turns a row's scores of n slots into weights.
void weigh(Row& row, float* scores, int64_t n, const int32_t* seen) {
    floats largest = floats{} + row.largest, total = {};
    for (int64_t t = 0; t < n; t += LANES) {
        const floats x = load<floats>(scores + t);
        largest = select(load<ints>(seen + t) & (x > largest), x, largest);
    }
    float top = row.largest;
    UNROLL for (int i = 0; i < LANES; i++) top = std::max(top, largest[i]);
    for (int64_t t = 0; t < n; t += LANES) {
        const floats weight = select(load<ints>(seen + t), exp2(load<floats>(scores + t) - top), floats{});
        total += weight;
        store(scores + t, weight);
    }
    row.shrink = std::exp2(row.largest - top);
    row.total = row.total * row.shrink + sum_lanes(total);
    row.largest = top;
}

// Adds COLUMNS columns of n values to the sums. v: [n, d] from its column on; weights: [ROWS, SLOTS].
template <int ROWS>
void mix(const Row* rows, const bfloat16* v, int64_t column, int64_t n, int64_t width, const float* weights) {
    floats sums[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int b = 0; b < 2; b++)
            sums[r][b] = load<floats>(rows[r].sums + column + b * LANES) * rows[r].shrink;
    for (int64_t t = 0; t < n; t++) {
        const ints pairs = load_pairs(v + t * width + column, width - column);
        const floats values[2] = {even(pairs), odd(pairs)};
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int b = 0; b < 2; b++) sums[r][b] += weights[r * SLOTS + t] * values[b];
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int b = 0; b < 2; b++) store(rows[r].sums + column + b * LANES, sums[r][b]);
}

// COLUMNS slots' keys, one below the other: [d, COLUMNS]; those behind the last slot are copies of it.
void turn_keys(const bfloat16* k, int64_t first, int64_t last, int64_t width, floats* keys) {
    for (int64_t column = 0; column < width; column += COLUMNS, keys += 2 * COLUMNS) {
        for (int b = 0; b < 2; b++) {
            ints lines[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                lines[i] = load_pairs(k + std::min(first + b * LANES + i, last - 1) * width + column, width - column);
            transpose(lines);
            UNROLL for (int i = 0; i < LANES; i++) {
                keys[4 * i + b] = even(lines[i]);
                keys[4 * i + 2 + b] = odd(lines[i]);
            }
        }
    }
}

inline void prefetch_all(const bfloat16* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) prefetch(p + i, false);
}

// Rows of one head look at its slots first to last.
void attend_part(Row* rows, int64_t n_rows, const bfloat16* k, const bfloat16* v, int64_t first, int64_t last,
                 int64_t width) {
    const float scale = M_LOG2E / std::sqrt((float)width);
    std::vector<float> q(n_rows * STRIDE), scores(n_rows * SLOTS);
    std::vector<int32_t> seen(n_rows * SLOTS);
    floats keys[MAX_WIDTH * 2];
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t i = 0; i < width; i++) q[r * STRIDE + i] = widen(rows[r].q[i]) * scale;
    const auto each_rows = [&](auto run) {
        const int64_t n_passes = (n_rows + MAX_ROWS - 1) / MAX_ROWS;  // of about as many rows
        for (int64_t i = 0, r = 0, next; i < n_passes; i++, r = next) {
            next = (i + 1) * n_rows / n_passes;
            with_constant(next - r, [&](auto count) { run(r, count); });
        }
    };
    for (int64_t start = first; start < last; start += SLOTS) {
        const int64_t n = std::min<int64_t>(SLOTS, last - start);
        bool any = false;
        for (int64_t r = 0; r < n_rows; r++) any |= look(rows[r], start, n, &seen[r * SLOTS]);
        if (!any) continue;
        for (int64_t t = 0; t < n; t += COLUMNS) {
            prefetch_all(k + (start + t + 2 * COLUMNS) * width, COLUMNS * width);
            prefetch_all(v + (start + t) * width, COLUMNS * width);
            turn_keys(k, start + t, last, width, keys);
            each_rows([&](int64_t r, auto count) {
                score<count>(&q[r * STRIDE], keys, width, &scores[r * SLOTS + t]);
            });
        }
        for (int64_t r = 0; r < n_rows; r++) weigh(rows[r], &scores[r * SLOTS], n, &seen[r * SLOTS]);
        for (int64_t column = 0; column < width; column += COLUMNS)
            each_rows([&](int64_t r, auto count) {
                mix<count>(rows + r, v + start * width, column, n, width, &scores[r * SLOTS]);
            });
    }
}

// A query's result from its rows, one a part, `stride` apart.
void join(Row* rows, int64_t n_parts, int64_t stride, int64_t width, bfloat16* y) {
    float largest = LEAST, total = 0;
    for (int64_t i = 0; i < n_parts; i++) largest = std::max(largest, rows[i * stride].largest);
    for (int64_t i = 0; i < n_parts; i++) {
        rows[i * stride].shrink = std::exp2(rows[i * stride].largest - largest);
        total += rows[i * stride].total * rows[i * stride].shrink;
    }
    for (int64_t column = 0; column < width; column++) {
        const int64_t place = column / COLUMNS * COLUMNS + column % 2 * LANES + column % COLUMNS / 2;
        float sum = 0;
        for (int64_t i = 0; i < n_parts; i++) sum += rows[i * stride].sums[place] * (rows[i * stride].shrink / total);
        narrow(sum, y + column);
    }
}

// Numbers [heads, tokens, d].
struct Heads {
    const bfloat16* data;
    int64_t head, token;  // how far a head is from the next, and a token
    const bfloat16* at(int64_t h, int64_t t) const { return data + h * head + t * token; }
};

// y [S, H, d]. Each token of q sees the slots before n_seen, the token after it one more; mask [S, T]: and only these.
void attend(Heads q, Heads k, Heads v, const uint8_t* mask, int64_t mask_stride, int64_t n_seen, bfloat16* y,
            int64_t n_heads, int64_t groups, int64_t s, int64_t n_slots, int64_t width) {
    const int threads = at::get_num_threads();
    const int64_t share = n_heads / groups, n_rows = share * s, n_tiles = (n_rows + TILE - 1) / TILE;
    const int64_t n_blocks = (n_slots + SLOTS - 1) / SLOTS, padded = (width + COLUMNS - 1) / COLUMNS * COLUMNS;
    const int64_t n_tasks = groups * n_tiles;
    const int64_t n_parts = std::min((threads + n_tasks - 1) / n_tasks, (n_blocks + 3) / 4);  // of 4 blocks or more
    std::vector<Row> rows(groups * n_parts * n_rows);  // [G, parts, rows]
    std::vector<float> sums(rows.size() * padded);
    parallel(threads, n_tasks * n_parts, 1, [&](int64_t i) {
        const int64_t tile = i % n_tiles, part = i / n_tiles % n_parts, group = i / n_tiles / n_parts;
        const int64_t first_row = tile * TILE, last_row = std::min(n_rows, first_row + TILE);
        Row* own = &rows[(group * n_parts + part) * n_rows];
        for (int64_t r = first_row; r < last_row; r++) {
            const int64_t head = group * share + r / s, token = r % s;
            own[r] = {q.at(head, token), mask ? mask + token * mask_stride : nullptr, n_seen + token,
                      &sums[(own + r - &rows[0]) * padded], LEAST, 0, 0};
        }
        const int64_t first = part * n_blocks / n_parts * SLOTS, last = (part + 1) * n_blocks / n_parts * SLOTS;
        attend_part(own + first_row, last_row - first_row, k.at(group, 0), v.at(group, 0), first,
                    std::min(n_slots, last), width);
    });
    parallel(n_tiles > 1 ? threads : 1, groups * n_rows, TILE, [&](int64_t i) {
        const int64_t group = i / n_rows, r = i % n_rows;
        join(&rows[group * n_parts * n_rows + r], n_parts, n_rows, width,
             y + (r % s * n_heads + group * share + r / s) * width);
    });
}

// ---- What stands between these in a layer, for eager steps: compiled ones get such loops from Inductor.

// y [K] = weight * x / sqrt(mean of x^2 + eps)
void normalize(const bfloat16* x, const bfloat16* weight, float eps, bfloat16* y, int64_t k) {
    floats squares = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
        const ints pairs = load<ints>(x + i);
        squares += even(pairs) * even(pairs) + odd(pairs) * odd(pairs);
    }
    float sum = sum_lanes(squares);
    for (; i < k; i++) sum += widen(x[i]) * widen(x[i]);
    const float factor = 1 / std::sqrt(sum / k + eps);
    for (i = 0; i < k; i++) narrow(widen(x[i]) * factor * widen(weight[i]), y + i);
}

inline floats silu(floats x) {
    const floats none = {}, least = none - 100;
    x = select(x < least, least, x);  // where e^x would not be small enough for the largest x
    const floats power = exp2(select(x < none, x, -x) * (float)M_LOG2E);  // e^-|x|
    return x * select(x < none, power, none + 1) / (power + 1);
}

// y [K] = silu(gate) * up
void activate(const bfloat16* gate, const bfloat16* up, bfloat16* y, int64_t k) {
    for (int64_t i = 0; i < k; i += 2 * LANES) {
        const int64_t n = std::min<int64_t>(2 * LANES, k - i);
        const ints gates = load_pairs(gate + i, n), ups = load_pairs(up + i, n);
        const ints result = narrow(silu(even(gates)) * even(ups), silu(odd(gates)) * odd(ups));
        if (n == 2 * LANES)
            store(y + i, result);
        else
            memcpy(y + i, &result, n * sizeof *y);
    }
}

// y [d] = model.rotate of x, a head
void rotate(const bfloat16* x, const float* cos, const float* sin, bfloat16* y, int64_t width) {
    for (int64_t i = 0, half = width / 2; i < half; i++) {
        const float first = widen(x[i]), second = widen(x[half + i]);
        narrow(first * cos[i] + second * sin[i], y + i);
        narrow(second * cos[half + i] + first * sin[half + i], y + half + i);
    }
}

// ---- The operators, whose schemas cpu.py has. PyTorch calls them, and they call it, through its C interface, shim.h,
// of which they use what has been there since 2.8. Arguments lie on a stack; who takes them from there owns them.

void check(bool right, const char* what) {
    if (!right) throw std::runtime_error(what);
}

struct Free {
    void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};

struct Tensor {
    std::unique_ptr<AtenTensorOpaque, Free> handle;  // null: no tensor was given
    int64_t *sizes = nullptr, *strides = nullptr;
    void* memory = nullptr;
    int32_t dtype = 0;

    explicit Tensor(StableIValue given) : handle((AtenTensorHandle)given) {
        if (handle)
            check(!aoti_torch_get_sizes(handle.get(), &sizes) && !aoti_torch_get_strides(handle.get(), &strides) &&
                      !aoti_torch_get_data_ptr(handle.get(), &memory) && !aoti_torch_get_dtype(handle.get(), &dtype),
                  "not a tensor in memory");
    }

    static Tensor optional(StableIValue given) {
        const std::unique_ptr<StableIValue> inner((StableIValue*)given);
        return Tensor(inner ? *inner : 0);
    }

    static Tensor empty(int64_t n, int64_t width, int32_t dtype) {
        const int64_t sizes[] = {n, width}, strides[] = {width, 1};
        AtenTensorHandle made = nullptr;
        check(!aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made), "no memory");
        return Tensor((StableIValue)made);
    }

    StableIValue release() { return (StableIValue)handle.release(); }

    // This one, or a copy whose numbers lie one behind the other.
    Tensor contiguous() {
        bool is = false;
        if (!aoti_torch_is_contiguous(handle.get(), &is) && is) return std::move(*this);
        StableIValue stack[] = {release(), (StableIValue)aoti_torch_memory_format_contiguous_format()};
        check(!aoti_torch_call_dispatcher("aten::contiguous", "", stack), "no memory");
        return Tensor(stack[0]);
    }

    template <class Number>
    Number* data() const {
        return (Number*)memory;
    }
    bool is_float32() const { return dtype == aoti_torch_dtype_float32(); }
    bool is_bfloat16() const { return dtype == aoti_torch_dtype_bfloat16(); }
    Heads heads() const { return {data<bfloat16>(), strides[0], strides[1]}; }
};

void product(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = Tensor(stack[0]).contiguous(), weight(stack[1]);
    const Tensor scale = Tensor::optional(stack[2]), bias = Tensor::optional(stack[3]);
    const int bits = !scale.handle ? 16 : scale.is_float32() ? 8 : 4;
    const int64_t n = stack[4], s = x.sizes[0], k = x.sizes[1], columns = weight.sizes[1] * (bits == 4 ? 2 : 1);
    if (k != columns)
        throw std::runtime_error(std::to_string(k) + " columns times weights of " + std::to_string(columns));
    bool fits = (x.is_float32() || x.is_bfloat16()) && n <= weight.sizes[0];
    fits = fits && (bits == 16 ? weight.is_bfloat16() : weight.dtype == aoti_torch_dtype_uint8());
    fits = fits && (bits != 4 || scale.is_bfloat16()) && (!bias.handle || (bias.is_float32() && bias.sizes[0] >= n));
    check(fits, "a product of another dtype or size");
    Tensor y = Tensor::empty(s, n, x.dtype);
    const auto run = [&](auto number) {
        using Number = decltype(number);
        const auto multiply = [&](const auto& format) {
            multiply_all(at::get_num_threads(), format, x.data<Number>(), bias.data<float>(), y.data<Number>(), s, n);
        };
        const auto *codes = weight.data<uint8_t>(), *scales = scale.data<uint8_t>();
        if (bits == 16) multiply(Bfloat16{weight.data<bfloat16>(), k});
        if (bits == 8) multiply(Integer<8>{codes, scales, k, 1});
        if (bits == 4) multiply(Integer<4>{codes, scales, k, scale.sizes[1]});
    };
    if (s > 0) x.is_float32() ? run(float()) : run(bfloat16());
    stack[0] = y.release();
}

constexpr int64_t SLAB = 1024;  // tokens that attention works on at a time, so that what it needs meanwhile stays small

Tensor attend_slabs(Heads q, Heads k, Heads v, const Tensor& mask, int64_t n_heads, int64_t groups, int64_t s,
                    int64_t n_slots, int64_t width) {
    Tensor y = Tensor::empty(s, n_heads * width, aoti_torch_dtype_bfloat16());
    for (int64_t i = 0; i < s; i += SLAB) {
        const int64_t stride = mask.handle ? mask.strides[0] : 0;
        const uint8_t* seen = mask.handle ? mask.data<uint8_t>() + i * stride : nullptr;
        attend({q.at(0, i), q.head, q.token}, k, v, seen, stride, seen ? n_slots : i + 1,
               y.data<bfloat16>() + i * n_heads * width, n_heads, groups, std::min(SLAB, s - i), n_slots, width);
    }
    return y;
}

// Calls run(t) for each of s tokens, whose work is small.
template <class Function>
void each_token(int64_t s, Function run) {
    parallel(s < 16 ? 1 : at::get_num_threads(), s, 8, run);
}

Tensor take_mask(StableIValue given, int64_t s) {  // [S, T], each row in one piece; or none
    Tensor mask = Tensor::optional(given);
    if (!mask.handle) return mask;
    check(mask.dtype == aoti_torch_dtype_bool() && mask.sizes[0] == s, "a mask of another dtype or size");
    return mask.strides[1] == 1 ? std::move(mask) : mask.contiguous();
}

void attention(StableIValue* stack, uint64_t, uint64_t) {
    Tensor q(stack[0]), k(stack[1]), v(stack[2]);
    const int64_t n_heads = q.sizes[0], groups = k.sizes[0], s = q.sizes[1], n_slots = k.sizes[1], width = q.sizes[2];
    const Tensor mask = take_mask(stack[3], s);
    bool fits = q.is_bfloat16() && k.is_bfloat16() && v.is_bfloat16() && width <= MAX_WIDTH && k.sizes[2] == width;
    fits = fits && std::equal(k.sizes, k.sizes + 3, v.sizes) && n_heads % groups == 0;
    check(fits && n_slots == (mask.handle ? mask.sizes[1] : s), "attention of another dtype or size");
    if (q.strides[2] != 1) q = q.contiguous();
    for (Tensor* cache : {&k, &v})  // parts of caches are read where they are
        if (cache->strides[1] != width || cache->strides[2] != 1) *cache = cache->contiguous();
    stack[0] = attend_slabs(q.heads(), k.heads(), v.heads(), mask, n_heads, groups, s, n_slots, width).release();
}

void self_attention(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = Tensor(stack[0]).contiguous(), cos = Tensor(stack[1]).contiguous();
    const Tensor sin = Tensor(stack[2]).contiguous(), input_pos = Tensor(stack[3]).contiguous();
    const Tensor k_cache(stack[4]), v_cache(stack[5]), mask = take_mask(stack[6], x.sizes[0]);
    const int64_t s = x.sizes[0], groups = k_cache.sizes[0], room = k_cache.sizes[1], width = k_cache.sizes[2];
    const int64_t n_heads = x.sizes[1] / width - 2 * groups, n_slots = mask.handle ? mask.sizes[1] : s;
    const int64_t* slots = input_pos.data<int64_t>();
    bool fits = x.is_bfloat16() && k_cache.is_bfloat16() && v_cache.is_bfloat16() && width <= MAX_WIDTH;
    fits = fits && n_heads > 0 && n_heads % groups == 0 && x.sizes[1] == (n_heads + 2 * groups) * width;
    fits = fits && std::equal(k_cache.sizes, k_cache.sizes + 3, v_cache.sizes);
    for (const Tensor* cache : {&k_cache, &v_cache})
        fits = fits && cache->strides[1] == width && cache->strides[2] == 1;
    for (const Tensor* angles : {&cos, &sin})
        fits = fits && angles->is_float32() && angles->sizes[0] == s && angles->sizes[1] == width;
    fits = fits && input_pos.dtype == aoti_torch_dtype_int64() && input_pos.sizes[0] == s && n_slots <= room;
    check(fits, "attention of another dtype or size");
    for (int64_t t = 0; t < s; t++)
        check(mask.handle ? 0 <= slots[t] && slots[t] < room : slots[t] == t, "no such slot in a cache of this size");
    const std::unique_ptr<bfloat16[]> q(new bfloat16[s * n_heads * width]);
    each_token(s, [&](int64_t t) {
        const bfloat16* head = x.data<bfloat16>() + t * x.sizes[1];
        const float *c = cos.data<float>() + t * width, *i = sin.data<float>() + t * width;
        const int64_t slot = slots[t] * width;
        for (int64_t h = 0; h < n_heads; h++, head += width) rotate(head, c, i, &q[(t * n_heads + h) * width], width);
        for (int64_t g = 0; g < groups; g++, head += width)
            rotate(head, c, i, k_cache.data<bfloat16>() + g * k_cache.strides[0] + slot, width);
        for (int64_t g = 0; g < groups; g++, head += width)
            memcpy(v_cache.data<bfloat16>() + g * v_cache.strides[0] + slot, head, width * sizeof *head);
    });
    const Heads turned{q.get(), width, n_heads * width};
    stack[0] =
        attend_slabs(turned, k_cache.heads(), v_cache.heads(), mask, n_heads, groups, s, n_slots, width).release();
}

// Calls run(row, result) for each row of x; the results are the rows of a tensor of this width.
template <class Function>
Tensor each_row(const Tensor& x, int64_t width, Function run) {
    const int64_t s = x.sizes[0];
    check(x.is_bfloat16(), "rows of another dtype");
    Tensor y = Tensor::empty(s, width, x.dtype);
    each_token(s, [&](int64_t t) {
        run(x.data<bfloat16>() + t * x.sizes[1], y.data<bfloat16>() + t * width);
    });
    return y;
}

void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = Tensor(stack[0]).contiguous(), weight(stack[1]);
    const int64_t k = x.sizes[1];
    double eps;
    memcpy(&eps, &stack[2], sizeof eps);
    check(weight.is_bfloat16() && weight.sizes[0] == k, "a norm of another dtype or size");
    const auto run = [&](const bfloat16* x, bfloat16* y) { normalize(x, weight.data<bfloat16>(), eps, y, k); };
    stack[0] = each_row(x, k, run).release();
}

void silu_product(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = Tensor(stack[0]).contiguous();
    const int64_t k = x.sizes[1] / 2;
    stack[0] = each_row(x, k, [&](const bfloat16* x, bfloat16* y) { activate(x, x + k, y, k); }).release();
}

}  // namespace

extern "C" {

int block_outputs() { return 2 * LANES; }

const char* instruction_set() {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return "AVX-512 VNNI";
#elif defined(__AVX512BW__)
    return "AVX-512";
#elif defined(__AVXVNNI__) && defined(__AVX2__)
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__SSE2__)
    return "SSE2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "any CPU";
#endif
}

// From now on these serve, not those of another build. Returns whether PyTorch takes them.
bool register_operators() {
    static TorchLibraryHandle library = nullptr;
    if (library) aoti_torch_delete_library_object(library);
    return !aoti_torch_library_init_impl("multimodal_gpt_fast", "CPU", __FILE__, __LINE__, &library) &&
           !aoti_torch_library_impl(library, "product", product) &&
           !aoti_torch_library_impl(library, "attention", attention) &&
           !aoti_torch_library_impl(library, "self_attention", self_attention) &&
           !aoti_torch_library_impl(library, "rms_norm", rms_norm) &&
           !aoti_torch_library_impl(library, "silu_product", silu_product);
}

}  // extern "C"
