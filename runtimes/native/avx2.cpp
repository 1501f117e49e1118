// AVX2 with FMA and F16C (which every processor with AVX2 has): Intel since Haswell, AMD since Excavator.
//
// AVX2 cannot expand packed values under a mask. It can permute eight lanes by a table that has an entry for each byte
// of a mask: lane j of the entry names the packed value that belongs to column j.

#include <immintrin.h>

#include "kernels.h"

namespace trim {
namespace {

// For each mask byte and lane: where bit j is set, the number of set bits below it, and all bits from the fourth on, so
// that the entry is a mask too; elsewhere 0. Permutation looks at the lowest three bits only.
struct alignas(32) ExpandTable { std::uint32_t lanes[256][8]; };

constexpr ExpandTable make_expand_table() {
    ExpandTable table{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t rank = 0;
        for (std::uint32_t lane = 0; lane < 8; ++lane) {
            if (byte >> lane & 1) table.lanes[byte][lane] = 0xfffffff8u | rank++;
        }
    }
    return table;
}

// For each mask byte: the positions of its set bits, packed into bytes.
struct CompressTable { std::uint64_t positions[256]; };

constexpr CompressTable make_compress_table() {
    CompressTable table{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t rank = 0;
        for (std::uint64_t lane = 0; lane < 8; ++lane) {
            if (byte >> lane & 1) table.positions[byte] |= lane << (8 * rank++);
        }
    }
    return table;
}

constexpr ExpandTable kExpand = make_expand_table();
constexpr CompressTable kCompress = make_compress_table();

struct Avx2 {
    static constexpr std::int64_t kLanes = 8, kWidest = 4, kTileWords = 2;
    using Vector = __m256;

    static TRIM_INLINE Vector load(const float* source) { return _mm256_loadu_ps(source); }
    static TRIM_INLINE void store(float* target, Vector vector) { _mm256_storeu_ps(target, vector); }
    static TRIM_INLINE Vector broadcast(float value) { return _mm256_set1_ps(value); }
    static TRIM_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static TRIM_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

    static TRIM_INLINE Vector widen(const float* values) { return _mm256_loadu_ps(values); }
    static TRIM_INLINE Vector widen(const BFloat16* values) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
    }
    static TRIM_INLINE Vector widen(const Float16* values) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    }
    static TRIM_INLINE Vector widen(const std::int8_t* values) {
        const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(packed));
    }

    static TRIM_INLINE void store_columns(std::uint64_t bits, std::int64_t first, std::uint8_t* columns) {
        constexpr std::uint64_t kEach = 0x0101010101010101;
        std::uint64_t offset = static_cast<std::uint64_t>(first) * kEach;
#pragma GCC unroll 8
        for (int byte = 0; byte < 8; ++byte, bits >>= 8, offset += 8 * kEach) {
            const std::uint64_t positions = kCompress.positions[bits & 0xff] + offset;
            std::memcpy(columns, &positions, sizeof positions);
            columns += popcount(bits & 0xff);
        }
    }

    // Two chains, so that an addition need not wait for the one before.
    struct Sum { Vector even, odd; };

    template <typename Value>
    static TRIM_INLINE void add_products(std::uint64_t bits, const Value*& values, const float* x, Sum& sum) {
#pragma GCC unroll 4
        for (std::int64_t byte = 0; byte < 8; byte += 2) {
            sum.even = multiply_add(expand(bits >> (8 * byte) & 0xff, values), load(x + 8 * byte), sum.even);
            sum.odd = multiply_add(expand(bits >> (8 * byte + 8) & 0xff, values), load(x + 8 * byte + 8), sum.odd);
        }
    }
    static TRIM_INLINE float total(const Sum& sum) {
        const Vector all = _mm256_add_ps(sum.even, sum.odd);
        __m128 part = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        part = _mm_add_ps(part, _mm_movehl_ps(part, part));
        return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
    }

    template <typename Value>
    static constexpr auto arrangement(const Value*) { return arrange_plainly; }

  private:
    // Eight columns: packed values to where their bits are, zeros elsewhere.
    template <typename Value>
    static TRIM_INLINE Vector expand(std::uint64_t byte, const Value*& values) {
        const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpand.lanes[byte]));
        const Vector expanded = _mm256_permutevar8x32_ps(widen(values), lanes);
        values += popcount(byte);
        return select(expanded, lanes, static_cast<const Value*>(nullptr));
    }
    static TRIM_INLINE Vector select(Vector expanded, __m256i lanes, const float*) {
        return _mm256_and_ps(expanded, _mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)));
    }
    // Widened from a narrower type, a float has its lowest three bits zero: the table entry itself is the mask.
    template <typename Value>
    static TRIM_INLINE Vector select(Vector expanded, __m256i lanes, const Value*) {
        return _mm256_and_ps(expanded, _mm256_castsi256_ps(lanes));
    }
};

}  // namespace

extern const Kernels avx2_kernels = kernels<Avx2>("avx2");

}  // namespace trim
