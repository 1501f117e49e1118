// Kernels for one token, y = W x, and for a dense W a few more; each is a template over the instruction set.
#pragma once

#include "kernels.h"

namespace trim {
namespace {

// Inputs in their own order.
inline void arrange_plainly(const float* inputs, const Matrix& matrix, float* arranged) {
    for (std::int64_t j = 0; j < matrix.columns; ++j) arranged[j] = inputs[j];
    for (std::int64_t j = matrix.columns; j < matrix.words * kWordColumns; ++j) arranged[j] = 0.0f;
}

TRIM_INLINE float scale_of(const float* scales, std::int64_t row) { return scales ? scales[row] : 1.0f; }

// The values of a word are expanded to where their columns are, zeros between them, and multiplied with all 64 inputs.
template <typename Isa, typename Value>
bool decode_bitmap(const Matrix& matrix, Span groups, const float* TRIM_RESTRICT inputs, float* TRIM_RESTRICT totals) {
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
        for (std::int64_t i = 0; i < kGroupRows; ++i) totals[group * kGroupRows + i] = Isa::total(sums[i]);
    }
    return true;
}

// All windows of a block, each with as many steps of slots.
template <typename Isa, typename Value, std::int64_t kSteps>
void add_windows(const std::uint32_t* TRIM_RESTRICT columns, const Value* TRIM_RESTRICT values,
                 const float* TRIM_RESTRICT inputs, std::int64_t windows, typename Isa::BlockSums& result) {
    constexpr std::int64_t kAhead = 256;  // steps: some hundred nanoseconds
    constexpr std::int64_t kAtATime = 8;  // windows
    constexpr std::uintptr_t kColumnBytes = kAtATime * kSteps * sizeof(std::uint32_t);
    constexpr std::uintptr_t kValueBytes = kAtATime * kSteps * kBlockRows * sizeof(Value);
    typename Isa::BlockSums sums = result;
    const auto add_window = [&](std::int64_t window) {
#pragma GCC unroll 8
        for (std::int64_t step = 0; step < kSteps; ++step, ++columns, values += kBlockRows) {
            Isa::add_slot(*columns, values, inputs, sums, window * kSteps + step);
        }
        inputs += kWindowColumns;
    };
    for (; windows >= kAtATime; windows -= kAtATime) {
#pragma GCC unroll 8
        for (std::uintptr_t at = 0; at < kColumnBytes; at += 64) prefetch(columns, kAhead * sizeof *columns + at);
#pragma GCC unroll 32
        for (std::uintptr_t at = 0; at < kValueBytes; at += 64) {
            prefetch(values, kAhead * kBlockRows * sizeof(Value) + at);
        }
#pragma GCC unroll 8
        for (std::int64_t window = 0; window < kAtATime; ++window) add_window(window);
    }
    for (; windows > 0; --windows) add_window(0);
    result = sums;
}

template <typename Isa, typename Value>
void add_slots(const Matrix& matrix, std::int64_t block, const float* inputs,
               typename Isa::BlockSums& sums) {
    constexpr decltype(&add_windows<Isa, Value, 1>) kAdd[kMostSteps] = {
        add_windows<Isa, Value, 1>, add_windows<Isa, Value, 2>, add_windows<Isa, Value, 3>, add_windows<Isa, Value, 4>,
        add_windows<Isa, Value, 5>, add_windows<Isa, Value, 6>, add_windows<Isa, Value, 7>, add_windows<Isa, Value, 8>};
    const std::int64_t steps = window_steps(matrix, block);
    if (!steps) return;
    kAdd[steps - 1](matrix.slot_columns + matrix.slot_start[block],
                    static_cast<const Value*>(matrix.slot_values) + matrix.slot_start[block] * kBlockRows, inputs,
                    matrix.windows, sums);
}

// Inputs in their own order, and zeros that fill up the last window.
inline void arrange_for_blocks(const float* inputs, const Matrix& matrix, void* arranged) {
    float* const plain = static_cast<float*>(arranged);
    std::memcpy(plain, inputs, static_cast<std::size_t>(matrix.columns) * sizeof(float));
    for (std::int64_t j = matrix.columns; j < matrix.windows * kWindowColumns; ++j) plain[j] = 0.0f;
}

// Eight rows side by side. In slots, all rows have as many places for weights in each window of columns, so that an
// instruction set can look up inputs in a register; what did not fit is listed, and each input looked up in memory.
template <typename Isa, typename Value>
void decode_blocks(const Matrix& matrix, Span blocks, const void* arranged, float* TRIM_RESTRICT totals) {
    const float* TRIM_RESTRICT const inputs = static_cast<const float*>(arranged);
    const Value* const listed = static_cast<const Value*>(matrix.list_values);
    for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
        // Zeros, one by one: compilers would fill the whole with an instruction that starts slowly.
        typename Isa::BlockSums sums;
        add_slots<Isa, Value>(matrix, block, inputs, sums);
        const std::int64_t end = matrix.list_start[block + 1];
        for (std::int64_t entry = matrix.list_start[block]; entry < end; entry += 2 * kBlockRows) {
            prefetch(matrix.list_columns + entry, 1024);
            prefetch(listed + entry, 2048);
            Isa::add_two_steps(matrix.list_columns + entry, listed + entry, inputs, sums);
        }
        Isa::store_rows(sums, totals + matrix.groups * kGroupRows + block * kBlockRows);
    }
}

// Inputs that are integers of 16 bits, twice: as they are, for lists, and window after window, first the lower bytes of
// its 16 inputs and then the upper ones, since instruction sets look up bytes.
inline void arrange_integers(const float* inputs, const Matrix& matrix, void* arranged) {
    std::int32_t* const listed = static_cast<std::int32_t*>(arranged);
    const std::int64_t listable = matrix.columns < kListInputs ? matrix.columns : kListInputs;
    for (std::int64_t j = 0; j < listable; ++j) listed[j] = static_cast<std::int32_t>(inputs[j]);
    std::uint8_t* planes = reinterpret_cast<std::uint8_t*>(listed + kListInputs);
    for (std::int64_t first = 0; first < matrix.columns; first += kQuadColumns, planes += kPlaneBytes) {
        const std::int64_t left = matrix.columns - first;
        std::int32_t window[kQuadColumns] = {};
        for (std::int64_t j = 0; j < (left < kQuadColumns ? left : kQuadColumns); ++j) {
            window[j] = static_cast<std::int32_t>(inputs[first + j]);
        }
        for (std::int64_t j = 0; j < kQuadColumns; ++j) {
            planes[j] = static_cast<std::uint8_t>(window[j]);
            planes[kQuadColumns + j] = static_cast<std::uint8_t>(window[j] >> 8);
        }
    }
}

// As `decode_blocks` for 8-bit values, in integers of 32 bits: what a hostile matrix makes too large wraps around.
template <typename Isa>
void decode_quads(const Matrix& matrix, Span blocks, const void* arranged, float* TRIM_RESTRICT totals) {
    const std::int32_t* const inputs = static_cast<const std::int32_t*>(arranged);
    const std::uint8_t* const planes = reinterpret_cast<const std::uint8_t*>(inputs + kListInputs);
    const std::int8_t* const slots = static_cast<const std::int8_t*>(matrix.slot_values);
    const std::int8_t* const listed = static_cast<const std::int8_t*>(matrix.list_values);
    for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
        std::int32_t sums[kBlockRows] = {};
        if (const std::int64_t steps = window_steps(matrix, block)) {
            const std::int64_t start = matrix.slot_start[block];
            Isa::add_quads(matrix.slot_columns + start, slots + start * kBlockRows, planes, matrix.windows,
                           steps / kQuadSteps, sums);
        }
        const std::int64_t first = matrix.list_start[block];
        Isa::add_list(matrix.list_columns + first, listed + first, inputs, matrix.list_start[block + 1] - first, sums);
        float* const rows = totals + matrix.groups * kGroupRows + block * kBlockRows;
        for (std::int64_t i = 0; i < kBlockRows; ++i) rows[i] = static_cast<float>(sums[i]);
    }
}

// For instruction sets that prefer other forms.
struct PlainQuads {
    static void add_quads(const std::uint32_t* columns, const std::int8_t* values, const std::uint8_t* planes,
                          std::int64_t windows, std::int64_t quads, std::int32_t* sums) {
        for (std::int64_t window = 0; window < windows; ++window, planes += kPlaneBytes) {
            for (std::int64_t quad = 0; quad < quads; ++quad, columns += kQuadSteps) {
                for (std::int64_t at = 0; at < kBlockRows * kQuadSteps; ++at, ++values) {
                    const std::uint32_t column = quad_column(columns, at / kQuadSteps, at % kQuadSteps);
                    const int input = planes[column] | planes[kQuadColumns + column] << 8;
                    add(*values, static_cast<std::int16_t>(input), sums[at / kQuadSteps]);
                }
            }
        }
    }

    static void add_list(const std::uint16_t* columns, const std::int8_t* values, const std::int32_t* inputs,
                         std::int64_t entries, std::int32_t* sums) {
        for (std::int64_t entry = 0; entry < entries; ++entry) {
            add(values[entry], inputs[columns[entry]], sums[entry % kBlockRows]);
        }
    }

  private:
    // Wraps around, as does the product: behind the last column, inputs are anything.
    static void add(std::int8_t value, std::int32_t input, std::int32_t& sum) {
        const std::uint32_t product = static_cast<std::uint32_t>(value) * static_cast<std::uint32_t>(input);
        sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) + product);
    }
};

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

}  // namespace
}  // namespace trim
