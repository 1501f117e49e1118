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
constexpr std::int64_t kBlockRows = 8;
constexpr std::int64_t kWindowColumns = 8;           // of slots
constexpr std::int64_t kMostSteps = kWindowColumns;  // of a window: then no weight is left over
constexpr std::int64_t kQuadColumns = 16;            // of slots of 8-bit values, whose steps come in fours
constexpr std::int64_t kQuadSteps = 4;
constexpr std::int64_t kPlaneBytes = 2 * kQuadColumns;  // a window of 16-bit inputs, see `arrange_integers`
constexpr std::int64_t kGroupWordValues = kGroupRows * kWordColumns;  // the most that four mask words can keep

// How values are stored; float and int8 stand for themselves.
struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

// A `TrimNativeMatrix` whose sizes were checked. What mask and lists say is checked by the kernels as they go.
struct Matrix {
    std::int64_t rows, columns, words, windows;
    const std::int32_t* order;
    std::int64_t groups;  // of four rows each, as a bitmap
    const std::uint64_t* mask;
    const std::int64_t* group_start;
    const void* values;
    std::int64_t blocks;  // of eight rows each, as slots and lists
    const std::int64_t* slot_start;  // null: there are only lists
    const std::uint32_t* slot_columns;
    const void* slot_values;
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

// Inputs of lists that there must be room for: a 16-bit column, right or wrong, is then always inside.
constexpr std::int64_t kListInputs = 65536;

// One token: y = W x, and for a dense W several without gaps. Inputs are first arranged as the kernels want them, with
// zeros behind the last column: `for_bitmap` into words * 64 floats, `for_blocks` into as many as `block_floats` says;
// dense matrices take them as they are. Of 8-bit values, `for_blocks` wants integers of 16 bits.
//
// `bitmap` and `blocks` write the sums of rows, yet without their scales, to their places in the layout, and to those
// that fill up the last group or block too: threads that wrote rows in the order of W would write to the same cache
// lines. `bitmap` is false when mask and values disagree.
struct Decode {
    void (*for_bitmap)(const float* inputs, const Matrix& matrix, float* arranged);
    bool (*bitmap)(const Matrix& matrix, Span groups, const float* arranged, float* totals);
    void (*for_blocks)(const float* inputs, const Matrix& matrix, void* arranged);
    void (*blocks)(const Matrix& matrix, Span blocks, const void* arranged, float* totals);
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
    bool (*blocks)(const Matrix& matrix, Span blocks, const float* inputs, float* outputs, std::int64_t vectors,
                   void* scratch);
};

// One instruction set; indexed by the value type.
struct Kernels {
    const char* name;
    std::int64_t few_tokens[4];  // up to which it is faster to multiply them one by one
    float (*round_token)(const float* inputs, std::int64_t columns, const float* scales, std::int32_t limit,
                         float* rounded);
    double step_cost[4];  // of a step of slots, in listed weights: what decides which of the two a layout takes
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

// Room for the inputs of blocks: of lists, and of windows.
TRIM_INLINE std::int64_t block_floats(const Matrix& matrix) {
    static_assert(kPlaneBytes == kWindowColumns * sizeof(float), "a window takes as much room with any type of values");
    return kListInputs + matrix.windows * kWindowColumns;
}

// Steps of slots that each window of a block has.
TRIM_INLINE std::int64_t window_steps(const Matrix& matrix, std::int64_t block) {
    if (matrix.slot_start == nullptr) return 0;
    std::int64_t left = matrix.slot_start[block + 1] - matrix.slot_start[block], steps = 0;
    for (; left > 0; left -= matrix.windows) ++steps;  // a few; a division takes longer
    return steps;
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

// ---- slots, for several tokens -------------------------------------------------------------------------------------

// What eight rows keep, so far, in a tile: rows of values and columns, `stride` entries apart, and how many they are.
struct RowEntries {
    float* values;
    std::uint8_t* columns;
    std::int64_t stride;
    std::int64_t counts[kBlockRows];
};

// Appends what the rows keep in one step of slots, whose window begins at column `first` of the tile.
template <typename Value>
void append_step(std::uint32_t columns, const Value* values, std::uint8_t first, RowEntries& rows) {
    for (std::int64_t i = 0; i < kBlockRows; ++i, columns >>= 4) {
        const std::int64_t at = i * rows.stride + rows.counts[i];
        rows.columns[at] = static_cast<std::uint8_t>(first + (columns & 7));
        rows.values[at] = widen_one(values[i]);
        rows.counts[i] += (columns & 8) == 0;  // others stand for no weight
    }
}

// ---- quads: four slots of 8-bit values for each of eight rows ------------------------------------------------------

// The column, within its window, of a slot.
TRIM_INLINE std::uint32_t quad_column(const std::uint32_t* columns, std::int64_t row, std::int64_t slot) {
    return columns[row / 4 * 2 + row % 2] >> (8 * slot + 4 * (row / 2 % 2)) & 15;
}

// Slots that count among four: up to the last that is not zero.
TRIM_INLINE std::int64_t slots_in_use(const std::int8_t* values) {
    std::int64_t used = kQuadSteps;
    while (used > 0 && values[used - 1] == 0) --used;
    return used;
}

// As `append_step`; writes up to four entries too many.
inline void append_quad(const std::uint32_t* columns, const std::int8_t* values, std::uint8_t first, RowEntries& rows) {
    for (std::int64_t i = 0; i < kBlockRows; ++i, values += kQuadSteps) {
        const std::int64_t at = i * rows.stride + rows.counts[i];
        for (std::int64_t slot = 0; slot < kQuadSteps; ++slot) {
            rows.columns[at + slot] = static_cast<std::uint8_t>(first + quad_column(columns, i, slot));
            rows.values[at + slot] = values[slot];
        }
        rows.counts[i] += slots_in_use(values);
    }
}

}  // namespace
}  // namespace trim
