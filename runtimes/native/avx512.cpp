// AVX-512 F, BW, VL and VBMI2: Intel since Ice Lake, AMD since Zen 4. One instruction expands packed values under a
// mask; for 16-bit values VBMI2 brings it.

#include <immintrin.h>

#include "table.h"

namespace trim {
namespace {

struct Avx512 : PlainQuads {
    static constexpr std::int64_t kLanes = 16, kWidest = 8, kTileWords = 1;
    using Vector = __m512;

    static TRIM_INLINE Vector load(const float* source) { return _mm512_loadu_ps(source); }
    static TRIM_INLINE void store(float* target, Vector vector) { _mm512_storeu_ps(target, vector); }
    static TRIM_INLINE Vector broadcast(float value) { return _mm512_set1_ps(value); }
    static TRIM_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static TRIM_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

    static TRIM_INLINE Vector widen(const float* values) { return _mm512_loadu_ps(values); }
    static TRIM_INLINE Vector widen(const BFloat16* values) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
    }
    static TRIM_INLINE Vector widen(const Float16* values) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    }
    static TRIM_INLINE Vector widen(const std::int8_t* values) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(packed));
    }

    static TRIM_INLINE void store_columns(std::uint64_t bits, std::int64_t first, std::uint8_t* columns) {
        const __m512i all = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928,
                                             0x2726252423222120, 0x1f1e1d1c1b1a1918, 0x1716151413121110,
                                             0x0f0e0d0c0b0a0908, 0x0706050403020100);
        const __m512i kept = _mm512_maskz_compress_epi8(bits, all);
        _mm512_storeu_si512(columns, _mm512_add_epi8(kept, _mm512_set1_epi8(static_cast<char>(first))));
    }

    // Two chains, so that an addition need not wait for the one before.
    struct Sum { Vector even, odd; };

    static TRIM_INLINE void add_products(std::uint64_t bits, const float*& values, const float* x, Sum& sum) {
        const float* part = values;
#pragma GCC unroll 4
        for (std::int64_t quarter = 0; quarter < 4; ++quarter) {
            const __mmask16 mask = static_cast<__mmask16>(bits >> (16 * quarter));
            const Vector expanded = _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(part));
            Vector& chain = quarter % 2 ? sum.odd : sum.even;
            chain = multiply_add(expanded, load(x + 16 * quarter), chain);
            part += popcount(mask);
        }
        values = part;
    }

    // 32 columns at a time. A bfloat16 is the upper half of a float: of each 32-bit lane the lower value is shifted up
    // and the upper one left where it is, which gives the even and the odd columns; `arrange_even_odd` matches.
    static TRIM_INLINE void add_products(std::uint64_t bits, const BFloat16*& values, const float* x, Sum& sum) {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 2
        for (std::int64_t half = 0; half < 2; ++half, x += 32) {
            const __m512i pairs = expand16(bits, half, values);
            const Vector even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const Vector odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
            sum.even = multiply_add(even, load(x), sum.even);
            sum.odd = multiply_add(odd, load(x + 16), sum.odd);
        }
        values += popcount(bits);
    }

    static TRIM_INLINE void add_products(std::uint64_t bits, const Float16*& values, const float* x, Sum& sum) {
#pragma GCC unroll 2
        for (std::int64_t half = 0; half < 2; ++half, x += 32) {
            const __m512i expanded = expand16(bits, half, values);
            const Vector low = _mm512_cvtph_ps(_mm512_castsi512_si256(expanded));
            const Vector high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(expanded, 1));
            sum.even = multiply_add(low, load(x), sum.even);
            sum.odd = multiply_add(high, load(x + 16), sum.odd);
        }
        values += popcount(bits);
    }

    static TRIM_INLINE void add_products(std::uint64_t bits, const std::int8_t*& values, const float* x, Sum& sum) {
        const __m512i expanded = _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values));
        values += popcount(bits);
        sum.even = multiply_add(widen(_mm512_castsi512_si128(expanded)), load(x), sum.even);
        sum.odd = multiply_add(widen(_mm512_extracti32x4_epi32(expanded, 1)), load(x + 16), sum.odd);
        sum.even = multiply_add(widen(_mm512_extracti32x4_epi32(expanded, 2)), load(x + 32), sum.even);
        sum.odd = multiply_add(widen(_mm512_extracti32x4_epi32(expanded, 3)), load(x + 48), sum.odd);
    }

    static TRIM_INLINE float total(const Sum& sum) { return total(_mm512_add_ps(sum.even, sum.odd)); }
    static TRIM_INLINE float total(Vector vector) { return _mm512_reduce_add_ps(vector); }

    // Eight rows at one step of a list in the lower half, at the next in the upper one.
    struct BlockSums { Vector steps = broadcast(0.0f); };

    // Never chosen (see `step_cost`), so plain.
    template <typename Value>
    static TRIM_INLINE void add_slot(std::uint32_t columns, const Value* values, const float* window, BlockSums& sums,
                                     std::int64_t) {
        float weights[kLanes] = {}, inputs[kLanes] = {};
        for (std::int64_t i = 0; i < kBlockRows; ++i, columns >>= 4) {
            weights[i] = widen_one(values[i]);
            inputs[i] = window[columns & 7];
        }
        sums.steps = multiply_add(load(weights), load(inputs), sums.steps);
    }

    template <typename Value>
    static TRIM_INLINE void add_two_steps(const std::uint16_t* columns, const Value* values, const float* x,
                                          BlockSums& sums) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
        const Vector found = _mm512_i32gather_ps(_mm512_cvtepu16_epi32(both), x, sizeof(float));
        sums.steps = multiply_add(widen(values), found, sums.steps);
    }
    static TRIM_INLINE void store_rows(const BlockSums& sums, float* rows) {
        float steps[kLanes];
        store(steps, sums.steps);
        for (std::int64_t i = 0; i < kBlockRows; ++i) rows[i] = steps[i] + steps[kBlockRows + i];
    }

    template <typename Value>
    static void append_eight_steps(const std::uint32_t* columns, const Value* values, const std::uint8_t* firsts,
                                   RowEntries& rows) {
        for (std::int64_t k = 0; k < 8; ++k) append_step(columns[k], values + k * kBlockRows, firsts[k], rows);
    }
    static constexpr auto append_quad = trim::append_quad;

    static constexpr std::int64_t few_tokens(std::size_t) { return 1; }

    // Bitmaps are smaller, and expanding them costs one instruction.
    static constexpr double step_cost(std::size_t) { return __builtin_inf(); }

    template <typename Value>
    static constexpr auto arrangement(const Value*) { return arrange_plainly; }
    static constexpr auto arrangement(const BFloat16*) { return arrange_even_odd; }

  private:
    static TRIM_INLINE Vector widen(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

    // The lower or upper half of a word: packed 16-bit values to where their bits are, zeros elsewhere.
    template <typename Value>
    static TRIM_INLINE __m512i expand16(std::uint64_t bits, std::int64_t half, const Value* values) {
        const Value* part = half ? values + popcount(bits & 0xffffffff) : values;
        return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits >> (32 * half)), _mm512_loadu_si512(part));
    }

    // Of every 32 columns the 16 even ones and then the 16 odd ones.
    static void arrange_even_odd(const float* inputs, const Matrix& matrix, float* arranged) {
        const std::int64_t padded = matrix.words * kWordColumns;
        for (std::int64_t j = 0; j < padded; ++j) {
            arranged[j / 32 * 32 + j % 2 * 16 + j % 32 / 2] = j < matrix.columns ? inputs[j] : 0.0f;
        }
    }
};

}  // namespace

extern const Kernels avx512_kernels = kernels<Avx512>("avx512");

}  // namespace trim
