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

// For the bits that say which of four slots are not zero: how many there are up to the last of them.
constexpr std::uint8_t kSlotsInUse[16] = {0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4};

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

    // Sums of eight rows, in chains, so that an addition need not wait for the one before.
    struct BlockSums { Vector chains[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)}; };

    // A window of inputs is a register; the lowest three bits of a lane say which of them it gets.
    template <typename Value>
    static TRIM_INLINE void add_slot(std::uint32_t columns, const Value* values, const float* window, BlockSums& sums,
                                     std::int64_t slot) {
        const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        const __m256i places = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(columns)), shifts);
        Vector& chain = sums.chains[slot % 4];
        chain = multiply_add(widen(values), _mm256_permutevar8x32_ps(load(window), places), chain);
    }

    template <typename Value>
    static TRIM_INLINE void add_two_steps(const std::uint16_t* columns, const Value* values, const float* x,
                                          BlockSums& sums) {
        sums.chains[0] = multiply_add(widen(values), look_up(columns, x), sums.chains[0]);
        sums.chains[1] = multiply_add(widen(values + kBlockRows), look_up(columns + kBlockRows, x), sums.chains[1]);
    }
    static TRIM_INLINE void store_rows(const BlockSums& sums, float* rows) {
        store(rows, add(add(sums.chains[0], sums.chains[1]), add(sums.chains[2], sums.chains[3])));
    }

    // A window of inputs is two registers, of lower and of upper bytes, each with all 16 in both of its halves. A byte
    // shuffle looks up 32 of them, and the bytes of an input, put next to each other, are multiplied with a value that
    // is widened to 16 bits. Pairs of products are added at once.
    static TRIM_INLINE void add_quads(const std::uint32_t* columns, const std::int8_t* values,
                                      const std::uint8_t* planes, std::int64_t windows, std::int64_t quads,
                                      std::int32_t* sums) {
        switch (quads) {
            case 1: add_quads<1>(columns, values, planes, windows, sums); break;
            case 2: add_quads<2>(columns, values, planes, windows, sums); break;
            case 3: add_quads<3>(columns, values, planes, windows, sums); break;
            default: add_quads<4>(columns, values, planes, windows, sums);
        }
    }

    static TRIM_INLINE void add_list(const std::uint16_t* columns, const std::int8_t* values, const std::int32_t* inputs,
                                     std::int64_t entries, std::int32_t* sums) {
        __m256i* const rows = reinterpret_cast<__m256i*>(sums);
        __m256i even = _mm256_loadu_si256(rows), odd = _mm256_setzero_si256();
        for (std::int64_t entry = 0; entry < entries; entry += 2 * kBlockRows) {
            prefetch(columns + entry, 1024);
            prefetch(values + entry, 512);
            even = _mm256_add_epi32(even, listed_products(columns + entry, values + entry, inputs));
            const std::int64_t next = entry + kBlockRows;
            odd = _mm256_add_epi32(odd, listed_products(columns + next, values + next, inputs));
        }
        _mm256_storeu_si256(rows, _mm256_add_epi32(even, odd));
    }

    // Values are transposed, so that a register has those of one row, and columns likewise, as bytes; then both are packed.
    template <typename Value>
    static TRIM_INLINE void append_eight_steps(const std::uint32_t* columns, const Value* values,
                                               const std::uint8_t* firsts, RowEntries& rows) {
        Vector weights[8];
        transpose(values, weights);
        alignas(32) std::uint64_t places[8];
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
        const std::uint64_t blanks = columns_of_even_rows(words, places) |
                                     columns_of_even_rows(_mm256_srli_epi32(words, 4), places + 4) << 32;
        const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(firsts));
#pragma GCC unroll 8
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const std::int64_t at = i * rows.stride + rows.counts[i], half = i % 2 * 4 + i / 2;
            const std::uint64_t kept = ~(blanks >> (8 * half)) & 0xff;
            const __m128i packing = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kCompress.positions[kept]));
            const __m128i found = _mm_add_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&places[half])), first);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(rows.columns + at), _mm_shuffle_epi8(found, packing));
            store(rows.values + at, _mm256_permutevar8x32_ps(weights[i], _mm256_cvtepu8_epi32(packing)));
            rows.counts[i] += popcount(kept);
        }
    }

    // Four values and columns of each row at once.
    static TRIM_INLINE void append_quad(const std::uint32_t* columns, const std::int8_t* values, std::uint8_t first,
                                        RowEntries& rows) {
        alignas(32) std::uint8_t places[kBlockRows * kQuadSteps];
        const __m256i found = _mm256_permute4x64_epi64(quad_places(columns), 0xd8);  // rows in their order
        const __m256i firsts = _mm256_set1_epi8(static_cast<char>(first));
        _mm256_store_si256(reinterpret_cast<__m256i*>(places), _mm256_add_epi8(found, firsts));
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        const __m256i zeros = _mm256_cmpeq_epi8(all, _mm256_setzero_si256());
        const auto blank = static_cast<std::uint32_t>(_mm256_movemask_epi8(zeros));
#pragma GCC unroll 8
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const std::int64_t at = i * rows.stride + rows.counts[i];
            std::int32_t four;
            std::memcpy(&four, values + kQuadSteps * i, sizeof four);
            _mm_storeu_ps(rows.values + at, _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four))));
            std::memcpy(rows.columns + at, places + kQuadSteps * i, kQuadSteps);
            rows.counts[i] += kSlotsInUse[~blank >> (kQuadSteps * i) & 15];
        }
    }

    // Measured on Zen 4: nine to 16 tokens together cost as much as six to eight single ones; with 8-bit values as 16.
    static constexpr std::int64_t few_tokens(std::size_t value_bytes) { return value_bytes == 1 ? 16 : 8; }

    // Measured on Zen 4 (`python -m benchmarks.cpu_layers.forms`); values in memory count beside instructions: a quad takes
    // as long as four listed weights, but as many bytes as 16.
    static constexpr double step_cost(std::size_t value_bytes) {
        return value_bytes == 4 ? 6 : value_bytes == 2 ? 4 : 2.5;
    }

    template <typename Value>
    static constexpr auto arrangement(const Value*) { return arrange_plainly; }
    static constexpr auto arrangement(const BFloat16*) { return arrange_even_odd; }

  private:
    // Eight steps of eight rows to eight rows of eight steps.
    template <typename Value>
    static TRIM_INLINE void transpose(const Value* steps, Vector (&rows)[8]) {
        Vector pairs[8], fours[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vector a = widen(steps + 2 * i * kBlockRows), b = widen(steps + (2 * i + 1) * kBlockRows);
            pairs[2 * i] = _mm256_unpacklo_ps(a, b);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(a, b);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vector a = pairs[i / 2 * 4 + i % 2], b = pairs[i / 2 * 4 + i % 2 + 2];
            fours[i / 2 * 4 + i % 2 * 2] = _mm256_shuffle_ps(a, b, 0x44);
            fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm256_shuffle_ps(a, b, 0xee);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            rows[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
            rows[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
        }
    }

    // Of eight steps the columns of rows 0, 2, 4 and 6, a byte each; and a bit for each that stands for no weight.
    static TRIM_INLINE std::uint64_t columns_of_even_rows(__m256i steps, std::uint64_t* rows) {
        const __m256i by_row = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m256i halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(steps, by_row), halves);
        _mm256_store_si256(reinterpret_cast<__m256i*>(rows), _mm256_and_si256(bytes, _mm256_set1_epi8(7)));
        return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 4)));
    }

    // Of a quad the columns, a byte each: rows 0, 1, 4, 5, then 2, 3, 6, 7.
    static TRIM_INLINE __m256i quad_places(const std::uint32_t* columns) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)));
        const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
        return _mm256_and_si256(_mm256_srlv_epi32(both, shifts), _mm256_set1_epi8(15));
    }

    template <std::int64_t kQuads>
    static TRIM_INLINE void add_quads(const std::uint32_t* TRIM_RESTRICT columns,
                                      const std::int8_t* TRIM_RESTRICT values,
                                      const std::uint8_t* TRIM_RESTRICT planes, std::int64_t windows,
                                      std::int32_t* sums) {
        constexpr std::int64_t kQuadValues = kQuadSteps * kBlockRows;
        const auto load16 = [](const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); };
        __m256i upper = _mm256_setzero_si256(), lower = upper;  // rows 0 to 3, and 4 to 7; two sums for each
        for (std::int64_t window = 0; window < windows; ++window, planes += kPlaneBytes) {
            const __m256i low = _mm256_broadcastsi128_si256(load16(planes));
            const __m256i high = _mm256_broadcastsi128_si256(load16(planes + kQuadColumns));
#pragma GCC unroll 4
            for (std::int64_t quad = 0; quad < kQuads; ++quad, columns += kQuadSteps, values += kQuadValues) {
                prefetch(columns, 768);
                prefetch(values, 1536);
                const __m256i places = quad_places(columns);
                const __m256i low_bytes = _mm256_shuffle_epi8(low, places);
                const __m256i high_bytes = _mm256_shuffle_epi8(high, places);
                const __m256i first = _mm256_cvtepi8_epi16(load16(values));
                const __m256i last = _mm256_cvtepi8_epi16(load16(values + kQuadValues / 2));
                upper = _mm256_add_epi32(upper, _mm256_madd_epi16(_mm256_unpacklo_epi8(low_bytes, high_bytes), first));
                lower = _mm256_add_epi32(lower, _mm256_madd_epi16(_mm256_unpackhi_epi8(low_bytes, high_bytes), last));
            }
        }
        const __m256i rows = _mm256_permute4x64_epi64(_mm256_hadd_epi32(upper, lower), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), rows);
    }

    static TRIM_INLINE __m256i listed_products(const std::uint16_t* columns, const std::int8_t* values,
                                               const std::int32_t* inputs) {
        // Bits are moved only: no float is read.
        const __m256i found = _mm256_castps_si256(look_up(columns, reinterpret_cast<const float*>(inputs)));
        const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        return _mm256_mullo_epi32(found, _mm256_cvtepi8_epi32(packed));
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
