// AVX2 with FMA and F16C (which every processor with AVX2 has): Intel since Haswell, AMD since Excavator.
//
// AVX2 cannot expand packed values under a mask. It can permute eight of them by a table that has an entry for each byte
// of a mask: place j of the entry names the packed value that belongs to column j.

#include <immintrin.h>

#include "table.h"

namespace trim {
namespace {

// For each mask byte and lane: where bit j is set, the number of set bits below it, and the highest bit, so that the
// entry is a mask too; elsewhere 0. Permutation looks at the lowest three bits only.
struct alignas(32) ExpandTable { std::uint32_t lanes[256][8]; };

constexpr ExpandTable make_expand_table() {
    ExpandTable table{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t rank = 0;
        for (std::uint32_t lane = 0; lane < 8; ++lane) {
            if (byte >> lane & 1) table.lanes[byte][lane] = 0x80000000u | rank++;
        }
    }
    return table;
}

// The same for values of kBytes bytes, as byte shuffles; a byte of 0x80 gives zero.
template <int kBytes>
struct alignas(16) ShuffleTable { std::uint8_t bytes[256][8 * kBytes]; };

template <int kBytes>
constexpr ShuffleTable<kBytes> make_shuffle_table() {
    ShuffleTable<kBytes> table{};
    for (std::uint32_t mask = 0; mask < 256; ++mask) {
        std::uint32_t rank = 0;
        for (std::uint32_t place = 0; place < 8; ++place) {
            const bool kept = mask >> place & 1;
            for (std::uint32_t b = 0; b < kBytes; ++b) {
                table.bytes[mask][kBytes * place + b] = static_cast<std::uint8_t>(kept ? kBytes * rank + b : 0x80);
            }
            rank += kept;
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
constexpr ShuffleTable<1> kShuffle8 = make_shuffle_table<1>();
constexpr ShuffleTable<2> kShuffle16 = make_shuffle_table<2>();
constexpr CompressTable kCompress = make_compress_table();

struct Avx2 {
    static constexpr std::int64_t kLanes = 8, kWidest = 4, kTileWords = 4;
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

    static TRIM_INLINE void add_products(std::uint64_t bits, const float*& values, const float* x, Sum& sum) {
#pragma GCC unroll 4
        for (std::int64_t byte = 0; byte < 8; byte += 2, bits >>= 16) {
            sum.even = multiply_add(expand(bits & 0xff, values), load(x + 8 * byte), sum.even);
            sum.odd = multiply_add(expand(bits >> 8 & 0xff, values), load(x + 8 * byte + 8), sum.odd);
        }
    }

    // 16 columns at a time. A bfloat16 is the upper half of a float: of each 32-bit lane the lower value is shifted up
    // and the upper one left where it is, which gives the even and the odd columns; `arrange_even_odd` matches.
    static TRIM_INLINE void add_products(std::uint64_t bits, const BFloat16*& values, const float* x, Sum& sum) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 4
        for (std::int64_t part = 0; part < 4; ++part, bits >>= 16, x += 16) {
            const __m128i low = expand16(bits & 0xff, values), high = expand16(bits >> 8 & 0xff, values);
            const __m256i pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            sum.even = multiply_add(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), load(x), sum.even);
            sum.odd = multiply_add(_mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), load(x + 8), sum.odd);
        }
    }

    static TRIM_INLINE void add_products(std::uint64_t bits, const Float16*& values, const float* x, Sum& sum) {
#pragma GCC unroll 4
        for (std::int64_t byte = 0; byte < 8; byte += 2, bits >>= 16) {
            sum.even = multiply_add(_mm256_cvtph_ps(expand16(bits & 0xff, values)), load(x + 8 * byte), sum.even);
            sum.odd = multiply_add(_mm256_cvtph_ps(expand16(bits >> 8 & 0xff, values)), load(x + 8 * byte + 8), sum.odd);
        }
    }

    static TRIM_INLINE void add_products(std::uint64_t bits, const std::int8_t*& values, const float* x, Sum& sum) {
#pragma GCC unroll 4
        for (std::int64_t byte = 0; byte < 8; byte += 2, bits >>= 16) {
            sum.even = multiply_add(widen(expand8(bits & 0xff, values)), load(x + 8 * byte), sum.even);
            sum.odd = multiply_add(widen(expand8(bits >> 8 & 0xff, values)), load(x + 8 * byte + 8), sum.odd);
        }
    }

    static TRIM_INLINE float total(const Sum& sum) { return total(_mm256_add_ps(sum.even, sum.odd)); }
    static TRIM_INLINE float total(Vector all) {
        __m128 part = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        part = _mm_add_ps(part, _mm_movehl_ps(part, part));
        return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
    }

    // A chain for each slot of the eight rows.
    struct BlockSums { Vector slots[kRowSlots]; };

    // Bytes of the inputs of a window lie together: the lowest of all sixteen, then the next ones, up to the highest. One
    // instruction looks up such a byte for 32 slots, and interleaving gives floats: first of the first slot of each row.
    template <typename Value>
    static TRIM_INLINE void add_slots(const std::uint8_t* columns, const Value* values, const float* window,
                                      BlockSums& sums) {
        const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
        const __m256i places = _mm256_and_si256(_mm256_srlv_epi32(broadcast16(columns), halves), _mm256_set1_epi8(15));
        __m256i bytes[4];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) bytes[b] = _mm256_shuffle_epi8(broadcast16(window + 4 * b), places);
        const __m256i lower01 = _mm256_unpacklo_epi8(bytes[0], bytes[1]);
        const __m256i upper01 = _mm256_unpacklo_epi8(bytes[2], bytes[3]);
        const __m256i lower23 = _mm256_unpackhi_epi8(bytes[0], bytes[1]);
        const __m256i upper23 = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
        add_slot(_mm256_unpacklo_epi16(lower01, upper01), values, sums.slots[0]);
        add_slot(_mm256_unpackhi_epi16(lower01, upper01), values + kBlockRows, sums.slots[1]);
        add_slot(_mm256_unpacklo_epi16(lower23, upper23), values + 2 * kBlockRows, sums.slots[2]);
        add_slot(_mm256_unpackhi_epi16(lower23, upper23), values + 3 * kBlockRows, sums.slots[3]);
    }

    template <typename Value>
    static TRIM_INLINE void add_two_steps(const std::uint16_t* columns, const Value* values, const float* x,
                                          BlockSums& sums) {
        sums.slots[0] = multiply_add(widen(values), look_up(columns, x), sums.slots[0]);
        sums.slots[1] = multiply_add(widen(values + kBlockRows), look_up(columns + kBlockRows, x), sums.slots[1]);
    }
    static TRIM_INLINE void store_rows(const BlockSums& sums, float* rows) {
        store(rows, add(add(sums.slots[0], sums.slots[1]), add(sums.slots[2], sums.slots[3])));
    }

    // Measured on Zen 4. Values in memory count as much as instructions.
    static constexpr double step_cost(std::size_t value_bytes) { return value_bytes < 4 ? 12 : 24; }

    static void arrange_windows(const float* inputs, const Matrix& matrix, float* arranged) {
        const std::int64_t whole = matrix.columns / kWindowColumns;
        for (std::int64_t window = 0; window < whole; ++window) {
            arrange_window(inputs + window * kWindowColumns, arranged + window * kWindowColumns);
        }
        if (whole < matrix.windows) {
            float last[kWindowColumns] = {};
            for (std::int64_t j = whole * kWindowColumns; j < matrix.columns; ++j) last[j % kWindowColumns] = inputs[j];
            arrange_window(last, arranged + whole * kWindowColumns);
        }
    }

    template <typename Value>
    static constexpr auto arrangement(const Value*) { return arrange_plainly; }
    static constexpr auto arrangement(const BFloat16*) { return arrange_even_odd; }

  private:
    static TRIM_INLINE __m256i broadcast16(const void* bytes) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
    }
    template <typename Value>
    static TRIM_INLINE void add_slot(__m256i inputs, const Value* values, Vector& sum) {
        sum = multiply_add(widen(values), _mm256_castsi256_ps(inputs), sum);
    }

    // 16 floats to four times 16 bytes.
    static TRIM_INLINE void arrange_window(const float* inputs, float* arranged) {
        const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m128i four[4];
        for (int i = 0; i < 4; ++i) {
            four[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(inputs + 4 * i)), by_byte);
        }
        const __m128i low01 = _mm_unpacklo_epi32(four[0], four[1]), low23 = _mm_unpacklo_epi32(four[2], four[3]);
        const __m128i high01 = _mm_unpackhi_epi32(four[0], four[1]), high23 = _mm_unpackhi_epi32(four[2], four[3]);
        __m128i* const to = reinterpret_cast<__m128i*>(arranged);
        _mm_storeu_si128(to, _mm_unpacklo_epi64(low01, low23));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi64(low01, low23));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi64(high01, high23));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi64(high01, high23));
    }

    // Eight columns: packed values to where their bits are, zeros elsewhere.
    static TRIM_INLINE Vector expand(std::uint64_t byte, const float*& values) {
        const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpand.lanes[byte]));
        const Vector expanded = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
        values += popcount(byte);
        return _mm256_blendv_ps(_mm256_setzero_ps(), expanded, _mm256_castsi256_ps(lanes));
    }
    template <typename Value>
    static TRIM_INLINE __m128i expand16(std::uint64_t byte, const Value*& values) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        values += popcount(byte);
        return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle16.bytes[byte])));
    }
    static TRIM_INLINE __m128i expand8(std::uint64_t byte, const std::int8_t*& values) {
        const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        values += popcount(byte);
        return _mm_shuffle_epi8(packed, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffle8.bytes[byte])));
    }
    static TRIM_INLINE Vector widen(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

    // The inputs of eight columns. Single loads are faster than the gather instruction (Zen 4: 0.35 and 0.5 ns each).
    static TRIM_INLINE Vector look_up(const std::uint16_t* columns, const float* x) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(look_up4(columns, x)), look_up4(columns + 4, x), 1);
    }
    static TRIM_INLINE __m128 look_up4(const std::uint16_t* columns, const float* x) {
        std::uint64_t four;
        std::memcpy(&four, columns, sizeof four);
        __m128 found = _mm_load_ss(x + (four & 0xffff));
        found = _mm_insert_ps(found, _mm_load_ss(x + (four >> 16 & 0xffff)), 0x10);
        found = _mm_insert_ps(found, _mm_load_ss(x + (four >> 32 & 0xffff)), 0x20);
        return _mm_insert_ps(found, _mm_load_ss(x + (four >> 48)), 0x30);
    }

    // Of every 16 columns the eight even ones and then the eight odd ones.
    static void arrange_even_odd(const float* inputs, const Matrix& matrix, float* arranged) {
        const std::int64_t padded = matrix.words * kWordColumns;
        for (std::int64_t j = 0; j < padded; ++j) {
            arranged[j / 16 * 16 + j % 2 * 8 + j % 16 / 2] = j < matrix.columns ? inputs[j] : 0.0f;
        }
    }
};

}  // namespace

extern const Kernels avx2_kernels = kernels<Avx2>("avx2");

}  // namespace trim
