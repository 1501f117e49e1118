// The kernels, written once and compiled for each instruction set, and the table through which they are called.
//
// An instruction set is a class `Isa` of a few operations on vectors of `Isa::kLanes` floats (see portable.cpp for the
// plainest one). Nothing here may be shared between translation units: the linker keeps one copy of an inline function,
// and it could keep the one that this processor cannot execute. Hence templates over types that live in an anonymous
// namespace, no functions of the standard library, and tables that are constant expressions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define TRIM_INLINE inline __attribute__((always_inline))
#define TRIM_RESTRICT __restrict__

namespace trim {

constexpr std::int64_t kGroupRows = 4;
constexpr std::int64_t kWordColumns = 64;
constexpr std::int64_t kListRows = 8;
constexpr std::int64_t kGroupWordValues = kGroupRows * kWordColumns;  // the most that four mask words can keep

// How values are stored; float and int8 stand for themselves.
struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

// A `TrimNativeMatrix` whose sizes were checked. What mask and lists say is checked by the kernels as they go.
struct Matrix {
    std::int64_t rows, columns, words;
    const std::int32_t* order;
    std::int64_t groups;  // of four rows each, as a bitmap
    const std::uint64_t* mask;
    const std::int64_t* group_start;
    const void* values;
    std::int64_t blocks;  // of eight rows each, as lists
    const std::int64_t* list_start;
    const std::uint16_t* list_columns;
    const void* list_values;
    const float* scales;  // null: 1 for each row
};

// A `TrimNativeDense` whose sizes were checked.
struct DenseMatrix {
    std::int64_t rows, columns;
    const void* values;
    const float* scales;
};

// Some of the groups, blocks or rows of a matrix, first..last-1: what one thread does.
struct Span { std::int64_t first, last; };

// Floats that the inputs of lists must have room for: a 16-bit column, right or wrong, is then always inside.
constexpr std::int64_t kListInputs = 65536;

// One token: y = W x, and for a dense W several without gaps. `arrange` copies x into words * 64 floats, zeros behind the last column, in the order in which
// the lanes of `bitmap` want it; the others take x as it is. Each row's sum is written to outputs[order[.]]. False when
// mask and values disagree.
struct Decode {
    void (*arrange)(const float* inputs, const Matrix& matrix, float* arranged);
    bool (*bitmap)(const Matrix& matrix, Span groups, const float* arranged, float* outputs);
    void (*lists)(const Matrix& matrix, Span blocks, const float* inputs, float* outputs);
    void (*dense)(const DenseMatrix& matrix, Span rows, const float* inputs, float* outputs);
    void (*dense_tokens)(const DenseMatrix& matrix, Span rows, const float* inputs, std::int64_t tokens, float* outputs);
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
    bool (*bitmap)(const Matrix& matrix, Span groups, const float* inputs, float* outputs, std::int64_t vectors,
                   void* scratch);
    bool (*lists)(const Matrix& matrix, Span blocks, const float* inputs, float* outputs, std::int64_t vectors,
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

TRIM_INLINE std::int64_t length(Span span) { return span.last - span.first; }

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

// ---- values one by one --------------------------------------------------------------------------------------------

TRIM_INLINE float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

TRIM_INLINE float widen_one(float value) { return value; }
TRIM_INLINE float widen_one(std::int8_t value) { return value; }
TRIM_INLINE float widen_one(BFloat16 value) { return from_bits(static_cast<std::uint32_t>(value.bits) << 16); }

// IEEE half precision. Exponent and mantissa keep their places when shifted by 13 bits; 2^112 then corrects the bias,
// which also makes subnormal numbers right. Infinity and NaN have the largest exponent in both formats.
TRIM_INLINE float widen_one(Float16 value) {
#ifdef __F16C__
    return _cvtsh_ss(value.bits);
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float scaled = from_bits(rest << 13) * 0x1p112f;
    return from_bits(sign) + (sign ? -scaled : scaled);
#endif
}

// ---- one token --------------------------------------------------------------------------------------------------

// Inputs in their own order.
inline void arrange_plainly(const float* inputs, const Matrix& matrix, float* arranged) {
    for (std::int64_t j = 0; j < matrix.columns; ++j) arranged[j] = inputs[j];
    for (std::int64_t j = matrix.columns; j < matrix.words * kWordColumns; ++j) arranged[j] = 0.0f;
}

TRIM_INLINE float scale_of(const float* scales, std::int64_t row) { return scales ? scales[row] : 1.0f; }

// The values of a word are expanded to where their columns are, zeros between them, and multiplied with all 64 inputs.
template <typename Isa, typename Value>
bool decode_bitmap(const Matrix& matrix, Span groups, const float* TRIM_RESTRICT inputs,
                   float* TRIM_RESTRICT outputs) {
    const std::uint64_t* mask = matrix.mask + groups.first * matrix.words * kGroupRows;
    for (std::int64_t group = groups.first; group < groups.last; ++group) {
        const Value* values = static_cast<const Value*>(matrix.values) + matrix.group_start[group];
        const Value* const end = static_cast<const Value*>(matrix.values) + matrix.group_start[group + 1];
        typename Isa::Sum sums[kGroupRows] = {};
        for (std::int64_t word = 0; word < matrix.words; ++word, mask += kGroupRows) {
            if (!within(mask, values, end)) return false;
            // Read once, front to back: hardware prefetchers follow late, and not at all across pages.
            prefetch(mask, 2048);
            for (std::uintptr_t line = 0; line < sizeof(Value); ++line) prefetch(values, 2048 + 64 * line);
            const float* x = inputs + word * kWordColumns;
#pragma GCC unroll 4
            for (std::int64_t i = 0; i < kGroupRows; ++i) Isa::add_products(mask[i], values, x, sums[i]);
        }
        if (values != end) return false;
        for (std::int64_t i = 0; i < kGroupRows && group * kGroupRows + i < matrix.rows; ++i) {
            const std::int32_t row = matrix.order[group * kGroupRows + i];
            outputs[row] = Isa::total(sums[i]) * scale_of(matrix.scales, row);
        }
    }
    return true;
}

// The input of each listed column is looked up; eight rows side by side.
template <typename Isa, typename Value>
void decode_lists(const Matrix& matrix, Span blocks, const float* TRIM_RESTRICT inputs, float* TRIM_RESTRICT outputs) {
    const Value* const values = static_cast<const Value*>(matrix.list_values);
    for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
        typename Isa::ListSums sums = {};
        const std::int64_t end = matrix.list_start[block + 1];
        for (std::int64_t entry = matrix.list_start[block]; entry < end; entry += 2 * kListRows) {
            prefetch(matrix.list_columns + entry, 1024);
            prefetch(values + entry, 2048);
            Isa::add_two_steps(matrix.list_columns + entry, values + entry, inputs, sums);
        }
        float rows[kListRows];
        Isa::store_rows(sums, rows);
        const std::int64_t place = matrix.groups * kGroupRows + block * kListRows;
        for (std::int64_t i = 0; i < kListRows && place + i < matrix.rows; ++i) {
            const std::int32_t row = matrix.order[place + i];
            outputs[row] = rows[i] * scale_of(matrix.scales, row);
        }
    }
}

// A dense matrix, row after row: one stream that prefetchers follow.
template <typename Isa, typename Value>
void decode_dense(const DenseMatrix& matrix, Span rows, const float* TRIM_RESTRICT inputs,
                  float* TRIM_RESTRICT outputs) {
    constexpr std::int64_t kChains = 4, kLanes = Isa::kLanes;
    const std::int64_t columns = matrix.columns, whole = columns / kLanes * kLanes;
    float last_inputs[kLanes] = {};
    for (std::int64_t j = whole; j < columns; ++j) last_inputs[j - whole] = inputs[j];
    const Value* values = static_cast<const Value*>(matrix.values) + rows.first * columns;
    for (std::int64_t row = rows.first; row < rows.last; ++row, values += columns) {
        typename Isa::Vector sums[kChains] = {};
        std::int64_t j = 0;
        for (; j + kChains * kLanes <= whole; j += kChains * kLanes) {
            for (std::uintptr_t line = 0; line < sizeof(Value); ++line) prefetch(values + j, 2048 + 64 * line);
#pragma GCC unroll 4
            for (std::int64_t i = 0; i < kChains; ++i) {
                const std::int64_t at = j + i * kLanes;
                sums[i] = Isa::multiply_add(Isa::widen(values + at), Isa::load(inputs + at), sums[i]);
            }
        }
        for (; j < whole; j += kLanes) {
            sums[0] = Isa::multiply_add(Isa::widen(values + j), Isa::load(inputs + j), sums[0]);
        }
        if (whole < columns) {
            Value last[kLanes] = {};
            std::memcpy(last, values + whole, static_cast<std::size_t>(columns - whole) * sizeof(Value));
            sums[0] = Isa::multiply_add(Isa::widen(last), Isa::load(last_inputs), sums[0]);
        }
        const typename Isa::Vector all = Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3]));
        outputs[row] = Isa::total(all) * scale_of(matrix.scales, row);
    }
}

// A few rows of a dense matrix by a few tokens: each weight that is loaded meets every token, each input every row.
template <typename Isa, typename Value, std::int64_t kRows, std::int64_t kTokens>
void multiply_dense(const DenseMatrix& matrix, std::int64_t row, const float* TRIM_RESTRICT inputs,
                    float* TRIM_RESTRICT outputs) {
    constexpr std::int64_t kLanes = Isa::kLanes;
    const std::int64_t columns = matrix.columns, whole = columns / kLanes * kLanes;
    const Value* values = static_cast<const Value*>(matrix.values) + row * columns;
    typename Isa::Vector sums[kRows][kTokens] = {};
    for (std::int64_t j = 0; j < whole; j += kLanes) {
        typename Isa::Vector weights[kRows];
#pragma GCC unroll 8
        for (std::int64_t r = 0; r < kRows; ++r) weights[r] = Isa::widen(values + r * columns + j);
#pragma GCC unroll 8
        for (std::int64_t t = 0; t < kTokens; ++t) {
            const typename Isa::Vector x = Isa::load(inputs + t * columns + j);
#pragma GCC unroll 8
            for (std::int64_t r = 0; r < kRows; ++r) sums[r][t] = Isa::multiply_add(weights[r], x, sums[r][t]);
        }
    }
    for (std::int64_t r = 0; r < kRows; ++r) {
        for (std::int64_t t = 0; t < kTokens; ++t) {
            float sum = Isa::total(sums[r][t]);
            for (std::int64_t j = whole; j < columns; ++j) {
                sum += widen_one(values[r * columns + j]) * inputs[t * columns + j];
            }
            outputs[t * matrix.rows + row + r] = sum * scale_of(matrix.scales, row + r);
        }
    }
}

template <typename Isa, typename Value, std::int64_t kRows>
void dense_tokens(const DenseMatrix& matrix, Span rows, const float* inputs, std::int64_t tokens, float* outputs) {
    constexpr std::int64_t kTokens = 4;
    std::int64_t t = 0;
    for (; t + kTokens <= tokens; t += kTokens) {
        for (std::int64_t row = rows.first; row + kRows <= rows.last; row += kRows) {
            multiply_dense<Isa, Value, kRows, kTokens>(matrix, row, inputs + t * matrix.columns, outputs + t * matrix.rows);
        }
    }
    for (; t < tokens; ++t) {
        for (std::int64_t row = rows.first; row + kRows <= rows.last; row += kRows) {
            multiply_dense<Isa, Value, kRows, 1>(matrix, row, inputs + t * matrix.columns, outputs + t * matrix.rows);
        }
    }
}

template <typename Isa, typename Value>
void decode_dense_tokens(const DenseMatrix& matrix, Span rows, const float* inputs, std::int64_t tokens,
                         float* outputs) {
    const std::int64_t paired = rows.first + length(rows) / 2 * 2;
    dense_tokens<Isa, Value, 2>(matrix, {rows.first, paired}, inputs, tokens, outputs);
    dense_tokens<Isa, Value, 1>(matrix, {paired, rows.last}, inputs, tokens, outputs);
}

// ---- several tokens ---------------------------------------------------------------------------------------------

constexpr std::int64_t kTileRows = 128;  // rows whose weights are decoded at a time
constexpr std::int64_t kSlack = 64;      // entries that a store may write too many

// The kept weights of some rows in a few words of columns, as value and column. Decoded once and used for all tokens.
// Rows follow each other in the order of the layout; row_end says where their entries end. Each has an even number of
// entries, if need be with a zero at its end.
template <typename Isa>
struct alignas(64) Tile {
    static constexpr std::int64_t kColumns = Isa::kTileWords * kWordColumns;
    static_assert(kColumns <= 256, "a column is a byte");

    float values[kTileRows * kColumns + kSlack];
    std::uint8_t columns[kTileRows * kColumns + kSlack];
    std::int32_t row_end[kTileRows];
    std::int64_t entries;

    void end_row(std::int64_t row) {
        values[entries] = 0.0f;
        columns[entries] = 0;
        entries += entries % 2;
        row_end[row] = static_cast<std::int32_t>(entries);
    }
};

// Decodes groups of a bitmap, tile after tile.
template <typename Isa, typename Value>
class BitmapTiles {
  public:
    static constexpr std::int64_t kRows = kGroupRows;

    BitmapTiles(const Matrix& matrix, Span groups) : matrix_(matrix), groups_(groups) {
        for (std::int64_t group = groups.first; group < groups.last; ++group) {
            next_[group - groups.first] = start(group);
        }
    }

    static std::int64_t first_place(const Matrix&, std::int64_t group) { return group * kGroupRows; }

    bool decode(Span words, Tile<Isa>& tile) {
        tile.entries = 0;
        for (std::int64_t group = groups_.first; group < groups_.last; ++group) {
            const std::uint64_t* const mask = matrix_.mask + (group * matrix_.words + words.first) * kGroupRows;
            const std::int64_t mask_words = length(words) * kGroupRows;
            // The stream alternates between rows; what belongs to each mask word begins here:
            const Value* begins[Isa::kTileWords * kGroupRows];
            const Value*& next = next_[group - groups_.first];
            const Value* const end = start(group + 1);
            for (std::int64_t m = 0; m < mask_words; ++m) {
                if (m % kGroupRows == 0 && !within(mask + m, next, end)) return false;
                begins[m] = next;
                next += popcount(mask[m]);
            }
            // By the next tile, as many groups later as a tile has: too far apart for a hardware prefetcher.
            prefetch(mask + mask_words, 0);
            for (std::uintptr_t line = 0; line < 4; ++line) prefetch(next, 64 * line);
            for (std::int64_t i = 0; i < kGroupRows; ++i) {
                std::int64_t entries = tile.entries;
                for (std::int64_t m = i; m < mask_words; m += kGroupRows) {
                    const std::int64_t count = popcount(mask[m]);
                    Isa::store_columns(mask[m], m / kGroupRows * kWordColumns, tile.columns + entries);
                    for (std::int64_t k = 0; k < count; k += Isa::kLanes) {
                        Isa::store(tile.values + entries + k, Isa::widen(begins[m] + k));
                    }
                    entries += count;
                }
                tile.entries = entries;
                tile.end_row((group - groups_.first) * kGroupRows + i);
            }
        }
        return true;
    }

    bool all_read() const {
        for (std::int64_t group = groups_.first; group < groups_.last; ++group) {
            if (next_[group - groups_.first] != start(group + 1)) return false;
        }
        return true;
    }

  private:
    const Value* start(std::int64_t group) const {
        return static_cast<const Value*>(matrix_.values) + matrix_.group_start[group];
    }

    const Matrix& matrix_;
    Span groups_;
    const Value* next_[kTileRows / kGroupRows];  // value of each group where the next tile begins
};

// Decodes blocks of lists, tile after tile. Columns must rise; where they do not, a row is at its end.
template <typename Isa, typename Value>
class ListTiles {
  public:
    static constexpr std::int64_t kRows = kListRows;

    ListTiles(const Matrix& matrix, Span blocks) : matrix_(matrix), blocks_(blocks) {
        for (std::int64_t row = 0; row < length(blocks) * kListRows; ++row) {
            next_[row] = matrix.list_start[blocks.first + row / kListRows] + row % kListRows;
        }
    }

    static std::int64_t first_place(const Matrix& matrix, std::int64_t block) {
        return matrix.groups * kGroupRows + block * kListRows;
    }

    bool decode(Span words, Tile<Isa>& tile) {
        const Value* const values = static_cast<const Value*>(matrix_.list_values);
        const std::uint16_t* const listed = matrix_.list_columns;
        const std::int64_t first = words.first * kWordColumns, last = words.last * kWordColumns;
        tile.entries = 0;
        for (std::int64_t row = 0; row < length(blocks_) * kListRows; ++row) {
            const std::int64_t end = matrix_.list_start[blocks_.first + row / kListRows + 1];
            // Counted here: a byte that is written to the tile might, for all a compiler knows, be one of its counter.
            std::int64_t entry = next_[row], before = first - 1, column, count = tile.entries;
            for (; entry < end && (column = listed[entry]) < last; entry += kListRows) {
                if (column <= before) {
                    if (column < first) return false;
                    entry = end;
                    break;
                }
                tile.columns[count] = static_cast<std::uint8_t>(column - first);
                tile.values[count] = widen_one(values[entry]);
                ++count;
                before = column;
            }
            tile.entries = count;
            next_[row] = entry;
            tile.end_row(row);
        }
        return true;
    }

    bool all_read() const {
        for (std::int64_t row = 0; row < length(blocks_) * kListRows; ++row) {
            if (next_[row] < matrix_.list_start[blocks_.first + row / kListRows + 1]) return false;
        }
        return true;
    }

  private:
    const Matrix& matrix_;
    Span blocks_;
    std::int64_t next_[kTileRows];  // entry of each row where the next tile begins
};

// Adds the products of a tile to one panel, `kWidth` vectors wide. Even and odd entries have a chain of sums each, so
// that an addition need not wait for the one before; both start at zero in each tile, which rounds less than one long
// chain, and makes the result independent of the number of tokens.
template <typename Isa, std::int64_t kWidth>
void multiply_tile(const Tile<Isa>& tile, std::int64_t rows, const std::int32_t* order,
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

template <typename Isa, typename Tiles>
bool multiply_batch(const Matrix& matrix, Span all, const float* inputs, float* outputs, std::int64_t vectors,
                    void* scratch) {
    constexpr std::int64_t kAtATime = kTileRows / Tiles::kRows;
    Tile<Isa>& tile = *static_cast<Tile<Isa>*>(scratch);
    for (Span some{all.first, all.first}; some.first < all.last; some.first = some.last) {
        some.last = some.first + kAtATime < all.last ? some.first + kAtATime : all.last;
        Tiles tiles(matrix, some);
        const std::int64_t place = Tiles::first_place(matrix, some.first), left = matrix.rows - place;
        const std::int32_t* const order = matrix.order + place;
        const std::int64_t rows = length(some) * Tiles::kRows < left ? length(some) * Tiles::kRows : left;
        for (Span words{0, 0}; words.first < matrix.words; words.first = words.last) {
            words.last = words.first + Isa::kTileWords < matrix.words ? words.first + Isa::kTileWords : matrix.words;
            if (!tiles.decode(words, tile)) return false;
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
        if (!tiles.all_read()) return false;
    }
    return true;
}

// ---- the table --------------------------------------------------------------------------------------------------

template <typename Isa, typename Value>
constexpr Decode decode_kernel() {
    return {Isa::arrangement(static_cast<const Value*>(nullptr)), decode_bitmap<Isa, Value>, decode_lists<Isa, Value>,
            decode_dense<Isa, Value>, decode_dense_tokens<Isa, Value>};
}

template <typename Isa, typename Value>
constexpr Batch batch_kernel() {
    return {Isa::kLanes, Isa::kWidest, sizeof(Tile<Isa>), multiply_batch<Isa, BitmapTiles<Isa, Value>>,
            multiply_batch<Isa, ListTiles<Isa, Value>>};
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
