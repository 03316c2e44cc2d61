// Products of small weights with a few tokens on a CPU: y [S, N] = x [S, K] * w [N, K]^T + bias, for int8 and int4.
//
// quantize.py packs the weights, builds this file and calls it. It stands beside PyTorch's kernels because those are
// far from the speed of memory (README, Performance). It knows one instruction, AVX-512's vpdpbusd: 16 times side by
// side four unsigned bytes times four signed ones, summed up without loss.
//
// The unsigned bytes are the weights' codes: w + 128 of int8, 0 to 15 of int4. The signed ones are activations, 16-bit
// numbers in two bytes each: x = step * (256 * high + low), rounded to 2^-16 of the range of their group. All sums
// within a group (of int8: the row) are exact integers, and a token's result does not depend on the tokens beside it.
//
// Shapes: S tokens, N outputs, K inputs, G groups of a row. A block is 32 outputs, two registers of 16, and the least
// that a thread gets. A turn is 8 inputs. 32 bits hold the sums of 2^16 inputs of int8, and of 2^13 in a group of int4.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <vector>

#define UNROLL _Pragma("GCC unroll 8")  // else GCC keeps the sums in memory

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 2 * LANES;
constexpr int TURN = 8;
constexpr int AHEAD = 2048;  // bytes of weights, asked for early: worth a tenth of the speed
constexpr int MAX_TOKENS = 6;  // at a time, whose sums fit the registers

// A group of a token's inputs.
struct Group {
    float step;                     // an input is step * (256 * high + low)
    float total;                    // of the inputs
    int32_t high_start, low_start;  // of the sums, because what is scaled is not a code: code - 128, code - 8
};

// Up to MAX_TOKENS tokens, as the inner loop wants them.
struct Tokens {
    int64_t count;
    std::vector<int32_t> quads;  // [K / 8, count, 4] of four bytes each: high, low, and of the next four high, low
    std::vector<Group> groups;   // [G, count]
};

// quads: where the first turn goes; stride: from there to the next.
template <int BITS>
Group split(const float* x, int64_t k, int32_t* quads, int64_t stride) {
    __m512 largest = _mm512_set1_ps(1e-30f);
    const __m512 infinity = _mm512_set1_ps(INFINITY);
    __mmask16 bad = 0;  // infinite, or not a number, which a maximum does not hand on
    for (int64_t i = 0; i < k; i += LANES) {
        const __m512 part = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        largest = _mm512_max_ps(largest, part);
        bad |= _mm512_cmp_ps_mask(part, infinity, _CMP_NLT_UQ);
    }
    if (bad) return {NAN, NAN, 0, 0};
    const float step = _mm512_reduce_max_ps(largest) / (127 * 256);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += LANES, quads += 2 * stride) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(step)));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
        high_sum = _mm512_add_epi32(high_sum, high);
        low_sum = _mm512_add_epi32(low_sum, low);
        const __m128i high_bytes = _mm512_cvtepi32_epi8(high), low_bytes = _mm512_cvtepi32_epi8(low);
        _mm_storeu_si128((__m128i*)quads, _mm_unpacklo_epi32(high_bytes, low_bytes));
        _mm_storeu_si128((__m128i*)(quads + stride), _mm_unpackhi_epi32(high_bytes, low_bytes));
    }
    const int32_t high = _mm512_reduce_add_epi32(high_sum), low = _mm512_reduce_add_epi32(low_sum);
    const float total = step * (256.0f * high + low);
    if (BITS == 8) return {step, total, -128 * high, -128 * low};
    return {step, total, 0, -8 * (256 * high + low)};  // high and low are added up before they are scaled
}

// 16 bfloat16 numbers.
inline __m512 load_bfloat16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// A block times ROWS tokens. w: [K / 8, 2, 32, 4] of int8; [K / 8, 32, 4] of int4, the first four inputs in the lower
// halves. scales: float [32] of int8; bfloat16 [G, 2, 32] of int4, scale and zero.
template <int BITS, int ROWS>
void multiply(const uint8_t* w, const void* scales, const Tokens& tokens, int64_t k, int64_t groups, __m512 y[][2]) {
    const __m512i mask = _mm512_set1_epi8(15);
    const int32_t* quads = tokens.quads.data();
    const Group* group = tokens.groups.data();
    UNROLL for (int r = 0; r < ROWS; r++) y[r][0] = y[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, group += ROWS) {
        __m512i high[ROWS][2], low[ROWS][2];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int b = 0; b < 2; b++) {
                high[r][b] = _mm512_set1_epi32(group[r].high_start);
                low[r][b] = _mm512_set1_epi32(group[r].low_start);
            }
        for (int64_t turn = 0; turn < k / groups / TURN; turn++, w += BLOCK * BITS, quads += 4 * ROWS) {
            for (int line = 0; line < BLOCK * BITS; line += 64) _mm_prefetch((const char*)w + AHEAD + line, _MM_HINT_T0);
            for (int half = 0; half < 2; half++) {
                __m512i codes[2];
                UNROLL for (int b = 0; b < 2; b++) {
                    codes[b] = _mm512_loadu_si512(w + (BITS == 8 ? 2 * half + b : b) * 64);
                    if (BITS == 4) codes[b] = _mm512_and_si512(half ? _mm512_srli_epi16(codes[b], 4) : codes[b], mask);
                }
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const __m512i h = _mm512_set1_epi32(quads[4 * r + 2 * half]);
                    const __m512i l = _mm512_set1_epi32(quads[4 * r + 2 * half + 1]);
                    UNROLL for (int b = 0; b < 2; b++) {
                        high[r][b] = _mm512_dpbusd_epi32(high[r][b], codes[b], h);
                        low[r][b] = _mm512_dpbusd_epi32(low[r][b], codes[b], l);
                    }
                }
            }
        }
        UNROLL for (int b = 0; b < 2; b++) {
            const uint16_t* lines = (const uint16_t*)scales + g * 2 * BLOCK + b * LANES;
            const __m512 scale = BITS == 8 ? _mm512_loadu_ps((const float*)scales + b * LANES) : load_bfloat16(lines);
            const __m512 zero = BITS == 8 ? scale : load_bfloat16(lines + BLOCK);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m512i h = high[r][b], l = low[r][b];
                const __m512 unit = _mm512_mul_ps(scale, _mm512_set1_ps(group[r].step));
                if (BITS == 8) {
                    const __m512 upper = _mm512_mul_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(256));
                    y[r][b] = _mm512_mul_ps(_mm512_add_ps(upper, _mm512_cvtepi32_ps(l)), unit);
                } else {
                    const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l));
                    y[r][b] = _mm512_fmadd_ps(dot, unit, y[r][b]);
                    y[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(group[r].total), zero, y[r][b]);
                }
            }
        }
    }
}

template <int BITS>
void multiply_all(int threads, const float* x, const uint8_t* w, const uint8_t* scales, const float* bias, float* y,
                  int64_t s, int64_t n, int64_t k, int64_t groups) {
    constexpr decltype(&multiply<BITS, 1>) kernels[] = {multiply<BITS, 1>, multiply<BITS, 2>, multiply<BITS, 3>,
                                                        multiply<BITS, 4>, multiply<BITS, 5>, multiply<BITS, 6>};
    std::vector<Tokens> chunks((s + MAX_TOKENS - 1) / MAX_TOKENS);
    const int64_t n_chunks = chunks.size(), width = k / groups;
#pragma omp parallel for num_threads(threads) if (n_chunks > 1)
    for (int64_t i = 0; i < n_chunks; i++) {
        const int64_t first = i * s / n_chunks, count = (i + 1) * s / n_chunks - first;  // of about the same size
        Tokens& tokens = chunks[i];
        tokens = {count, std::vector<int32_t>(k / TURN * count * 4), std::vector<Group>(groups * count)};
        for (int64_t row = 0; row < count; row++) {
            for (int64_t g = 0; g < groups; g++) {
                int32_t* quads = &tokens.quads[(g * width / TURN * count + row) * 4];
                const float* inputs = x + (first + row) * k + g * width;
                tokens.groups[g * count + row] = split<BITS>(inputs, width, quads, 4 * count);
            }
        }
    }
    const int64_t block_bytes = BLOCK * k * BITS / 8, scale_bytes = BLOCK * groups * 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + BLOCK - 1) / BLOCK; block++) {
        float* out = y;
        for (const Tokens& tokens : chunks) {
            __m512 sums[MAX_TOKENS][2];
            kernels[tokens.count - 1](w + block * block_bytes, scales + block * scale_bytes, tokens, k, groups, sums);
            for (int64_t row = 0; row < tokens.count; row++, out += n) {
                for (int64_t b = 0, first = block * BLOCK; b < 2 && first < n; b++, first += LANES) {
                    const __mmask16 real = n - first < LANES ? (1 << (n - first)) - 1 : 0xffff;
                    const __m512 offset = bias ? _mm512_maskz_loadu_ps(real, bias + first) : _mm512_setzero_ps();
                    _mm512_mask_storeu_ps(out + first, real, _mm512_add_ps(sums[row][b], offset));
                }
            }
        }
    }
}

}  // namespace

extern "C" void block_product(int bits, int threads, const float* x, const uint8_t* w, const uint8_t* scales,
                              const float* bias, float* y, int64_t s, int64_t n, int64_t k, int64_t groups) {
    (bits == 8 ? multiply_all<8> : multiply_all<4>)(threads, x, w, scales, bias, y, s, n, k, groups);
}
