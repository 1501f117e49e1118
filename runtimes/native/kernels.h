// The two kernels, written once and compiled for each instruction set, and the table through which they are called.
//
// An instruction set is a class `Isa` of a few operations on vectors of `Isa::kLanes` floats (see portable.cpp for the
// plainest one). Nothing here may be shared between translation units: the linker keeps one copy of an inline function,
// and it could keep the one that this processor cannot execute. Hence templates over types that live in an anonymous
// namespace, no functions of the standard library, and tables that are constant expressions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define TRIM_INLINE inline __attribute__((always_inline))
#define TRIM_RESTRICT __restrict__

namespace trim {

constexpr std::int64_t kGroupRows = 4;
constexpr std::int64_t kWordColumns = 64;
constexpr std::int64_t kGroupWordValues = kGroupRows * kWordColumns;  // the most that four mask words can keep

// How values are stored; float and int8 stand for themselves.
struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

// A `TrimNativeMatrix` whose sizes were checked. What the mask says is checked by the kernels as they go.
struct Matrix {
    std::int64_t rows, columns, groups, words;
    const std::int32_t* order;
    const std::uint64_t* mask;
    const std::int64_t* group_start;
    const void* values;
    const float* scales;  // null: 1 for each row
};

// Groups first..last-1 of a matrix: what one thread does.
struct Span { std::int64_t first, last; };

// One token: y = W x. `arrange` copies x into words * 64 floats, zeros behind the last column, in the order in which
// the lanes of `multiply` want it. Each row's sum is written to outputs[order[.]]. False when mask and values disagree.
struct Decode {
    void (*arrange)(const float* inputs, const Matrix& matrix, float* arranged);
    bool (*multiply)(const Matrix& matrix, Span groups, const float* arranged, float* outputs);
};

// Several tokens: Y^T = W X^T. Tokens are taken side by side, a vector of `lanes` at a time, and up to `widest` vectors
// make a panel, so that a weight, once loaded, meets a whole row of its panel:
//
//     packed inputs   [panel][column][token of the panel]     words * 64 columns, zeros where there is nothing
//     packed outputs  [panel][row][token of the panel]        zeros at first; rows of W in their own order
//
// A panel's floats begin at (tokens of the panels before it) * (columns or rows).
struct Batch {
    std::int64_t lanes, widest;
    std::size_t scratch_bytes;  // of one thread, aligned to 64
    bool (*multiply)(const Matrix& matrix, Span groups, const float* inputs, float* outputs, std::int64_t vectors,
                     void* scratch);
};

// One instruction set; indexed by the value type.
struct Kernels {
    const char* name;
    Decode decode[4];
    Batch batch[4];
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

namespace {

// Vectors of the next panel when so many are left: as many as fit, by powers of two.
TRIM_INLINE std::int64_t panel_width(std::int64_t left, std::int64_t widest) {
    while (widest > left) widest /= 2;
    return widest;
}

TRIM_INLINE std::int64_t popcount(std::uint64_t bits) { return __builtin_popcountll(bits); }

TRIM_INLINE std::int64_t popcount4(const std::uint64_t* mask) {
    return (popcount(mask[0]) + popcount(mask[1])) + (popcount(mask[2]) + popcount(mask[3]));
}

// Whether the next four mask words keep no more values than there are. Only near the end is there anything to count.
template <typename Value>
TRIM_INLINE bool within(const std::uint64_t* mask, const Value* values, const Value* end) {
    return end - values >= kGroupWordValues || popcount4(mask) <= end - values;
}

TRIM_INLINE void prefetch(const void* stream, std::uintptr_t bytes_ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(stream) + bytes_ahead));
}

// ---- one token --------------------------------------------------------------------------------------------------

// Inputs in their own order.
inline void arrange_plainly(const float* inputs, const Matrix& matrix, float* arranged) {
    for (std::int64_t j = 0; j < matrix.columns; ++j) arranged[j] = inputs[j];
    for (std::int64_t j = matrix.columns; j < matrix.words * kWordColumns; ++j) arranged[j] = 0.0f;
}

// The values of a word are expanded to where their columns are, zeros between them, and multiplied with all 64 inputs.
template <typename Isa, typename Value>
bool decode(const Matrix& matrix, Span groups, const float* TRIM_RESTRICT inputs, float* TRIM_RESTRICT outputs) {
    const std::uint64_t* mask = matrix.mask + groups.first * matrix.words * kGroupRows;
    for (std::int64_t group = groups.first; group < groups.last; ++group) {
        const Value* values = static_cast<const Value*>(matrix.values) + matrix.group_start[group];
        const Value* const end = static_cast<const Value*>(matrix.values) + matrix.group_start[group + 1];
        typename Isa::Sum sums[kGroupRows] = {};
        for (std::int64_t word = 0; word < matrix.words; ++word, mask += kGroupRows) {
            if (!within(mask, values, end)) return false;
            // Read once, front to back: hardware prefetchers follow late, and not at all across pages.
            prefetch(mask, 2048);
            prefetch(values, 2048);
            const float* x = inputs + word * kWordColumns;
#pragma GCC unroll 4
            for (std::int64_t i = 0; i < kGroupRows; ++i) Isa::add_products(mask[i], values, x, sums[i]);
        }
        if (values != end) return false;
        for (std::int64_t i = 0; i < kGroupRows && group * kGroupRows + i < matrix.rows; ++i) {
            const std::int32_t row = matrix.order[group * kGroupRows + i];
            outputs[row] = Isa::total(sums[i]) * (matrix.scales ? matrix.scales[row] : 1.0f);
        }
    }
    return true;
}

// ---- several tokens ---------------------------------------------------------------------------------------------

constexpr std::int64_t kBlockGroups = 32;  // groups whose weights are decoded at a time
constexpr std::int64_t kBlockRows = kBlockGroups * kGroupRows;
constexpr std::int64_t kSlack = 64;  // entries that a store may write too many

// The kept weights of a block of rows in a few words of columns, as value and column. Decoded once and used for all
// tokens. Rows follow each other in the order of the layout; row_end says where their entries end. Each has an even
// number of entries, if need be with a zero at its end.
template <typename Isa, typename Value>
struct alignas(64) Tile {
    static constexpr std::int64_t kColumns = Isa::kTileWords * kWordColumns;
    static_assert(kColumns <= 256, "a column is a byte");

    float values[kBlockRows * kColumns + kSlack];
    std::uint8_t columns[kBlockRows * kColumns + kSlack];
    std::int32_t row_end[kBlockRows];
    const Value* next[kBlockGroups];  // value of each group where the next tile begins
};

template <typename Isa, typename Value>
bool decode_tile(const Matrix& matrix, Span block, Span words, Tile<Isa, Value>& tile) {
    std::int64_t entries = 0;
    for (std::int64_t group = block.first; group < block.last; ++group) {
        const std::uint64_t* const mask = matrix.mask + (group * matrix.words + words.first) * kGroupRows;
        const std::int64_t mask_words = (words.last - words.first) * kGroupRows;
        // The stream alternates between rows; what belongs to each mask word begins here:
        const Value* begins[Isa::kTileWords * kGroupRows];
        const Value*& next = tile.next[group - block.first];
        const Value* const end = static_cast<const Value*>(matrix.values) + matrix.group_start[group + 1];
        for (std::int64_t m = 0; m < mask_words; ++m) {
            if (m % kGroupRows == 0 && !within(mask + m, next, end)) return false;
            begins[m] = next;
            next += popcount(mask[m]);
        }
        // By the next tile, as many groups later as a block has: too far apart for a hardware prefetcher.
        prefetch(mask + mask_words, 0);
        for (std::uintptr_t line = 0; line < 4; ++line) prefetch(next, 64 * line);
        for (std::int64_t i = 0; i < kGroupRows; ++i) {
            for (std::int64_t m = i; m < mask_words; m += kGroupRows) {
                const std::int64_t count = popcount(mask[m]);
                Isa::store_columns(mask[m], m / kGroupRows * kWordColumns, tile.columns + entries);
                for (std::int64_t k = 0; k < count; k += Isa::kLanes) {
                    Isa::store(tile.values + entries + k, Isa::widen(begins[m] + k));
                }
                entries += count;
            }
            tile.values[entries] = 0.0f;
            tile.columns[entries] = 0;
            entries += entries % 2;
            tile.row_end[(group - block.first) * kGroupRows + i] = static_cast<std::int32_t>(entries);
        }
    }
    return true;
}

// Adds the products of a tile to one panel, `kWidth` vectors wide. Even and odd entries have a chain of sums each, so
// that an addition need not wait for the one before; both start at zero in each tile, which rounds less than one long
// chain, and makes the result independent of the number of tokens.
template <typename Isa, std::int64_t kWidth, typename Value>
void multiply_tile(const Tile<Isa, Value>& tile, std::int64_t rows, const std::int32_t* order,
                   const float* TRIM_RESTRICT inputs, float* TRIM_RESTRICT outputs) {
    constexpr std::int64_t kLanes = Isa::kLanes, kTokens = kWidth * kLanes;
    std::int64_t entry = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
        typename Isa::Vector even[kWidth] = {}, odd[kWidth] = {};
        for (const std::int64_t end = tile.row_end[i]; entry < end; entry += 2) {
            const float* x0 = inputs + tile.columns[entry] * kTokens;
            const float* x1 = inputs + tile.columns[entry + 1] * kTokens;
            const typename Isa::Vector w0 = Isa::broadcast(tile.values[entry]);
            const typename Isa::Vector w1 = Isa::broadcast(tile.values[entry + 1]);
#pragma GCC unroll 8
            for (std::int64_t v = 0; v < kWidth; ++v) {
                even[v] = Isa::multiply_add(w0, Isa::load(x0 + v * kLanes), even[v]);
                odd[v] = Isa::multiply_add(w1, Isa::load(x1 + v * kLanes), odd[v]);
            }
        }
        float* y = outputs + order[i] * kTokens;
#pragma GCC unroll 8
        for (std::int64_t v = 0; v < kWidth; ++v) {
            Isa::store(y + v * kLanes, Isa::add(Isa::load(y + v * kLanes), Isa::add(even[v], odd[v])));
        }
    }
}

template <typename Isa, typename Value>
bool multiply_batch(const Matrix& matrix, Span groups, const float* inputs, float* outputs, std::int64_t vectors,
                    void* scratch) {
    Tile<Isa, Value>& tile = *static_cast<Tile<Isa, Value>*>(scratch);
    const Value* values = static_cast<const Value*>(matrix.values);
    for (Span block{groups.first, 0}; block.first < groups.last; block.first = block.last) {
        block.last = block.first + kBlockGroups < groups.last ? block.first + kBlockGroups : groups.last;
        const std::int64_t first_row = block.first * kGroupRows;
        const std::int64_t end_row = block.last * kGroupRows < matrix.rows ? block.last * kGroupRows : matrix.rows;
        const std::int32_t* order = matrix.order + first_row;
        const std::int64_t rows = end_row - first_row;
        for (std::int64_t group = block.first; group < block.last; ++group) {
            tile.next[group - block.first] = values + matrix.group_start[group];
        }
        for (Span words{0, 0}; words.first < matrix.words; words.first = words.last) {
            words.last = words.first + Isa::kTileWords < matrix.words ? words.first + Isa::kTileWords : matrix.words;
            if (!decode_tile(matrix, block, words, tile)) return false;
            for (std::int64_t v = 0, width; v < vectors; v += width) {
                width = panel_width(vectors - v, Isa::kWidest);
                const std::int64_t before = v * Isa::kLanes, tokens = width * Isa::kLanes;
                const float* x = inputs + (before * matrix.words + tokens * words.first) * kWordColumns;
                float* y = outputs + before * matrix.rows;
                switch (width) {
                    case 8: multiply_tile<Isa, Isa::kWidest >= 8 ? 8 : 1>(tile, rows, order, x, y); break;
                    case 4: multiply_tile<Isa, 4>(tile, rows, order, x, y); break;
                    case 2: multiply_tile<Isa, 2>(tile, rows, order, x, y); break;
                    default: multiply_tile<Isa, 1>(tile, rows, order, x, y);
                }
            }
        }
        for (std::int64_t group = block.first; group < block.last; ++group) {
            if (tile.next[group - block.first] != values + matrix.group_start[group + 1]) return false;
        }
    }
    return true;
}

// ---- the table --------------------------------------------------------------------------------------------------

template <typename Isa, typename Value>
constexpr Decode decode_kernel() {
    return {Isa::arrangement(static_cast<const Value*>(nullptr)), decode<Isa, Value>};
}

template <typename Isa, typename Value>
constexpr Batch batch_kernel() {
    return {Isa::kLanes, Isa::kWidest, sizeof(Tile<Isa, Value>), multiply_batch<Isa, Value>};
}

// In the order of the value types in trim_native.h.
template <typename Isa>
constexpr Kernels kernels(const char* name) {
    return {name,
            {decode_kernel<Isa, float>(), decode_kernel<Isa, BFloat16>(), decode_kernel<Isa, Float16>(),
             decode_kernel<Isa, std::int8_t>()},
            {batch_kernel<Isa, float>(), batch_kernel<Isa, BFloat16>(), batch_kernel<Isa, Float16>(),
             batch_kernel<Isa, std::int8_t>()}};
}

}  // namespace
}  // namespace trim
