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

// The same for slots.
inline void arrange_windows_plainly(const float* inputs, const Matrix& matrix, float* arranged) {
    for (std::int64_t j = 0; j < matrix.columns; ++j) arranged[j] = inputs[j];
    for (std::int64_t j = matrix.columns; j < matrix.windows * kWindowColumns; ++j) arranged[j] = 0.0f;
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

// Eight rows side by side. In slots, all rows have as many places for weights in each window of columns, so that an
// instruction set can look up inputs in a register; what did not fit is listed, and each input looked up in memory.
template <typename Isa, typename Value>
void decode_blocks(const Matrix& matrix, Span blocks, const float* TRIM_RESTRICT arranged,
                   const float* TRIM_RESTRICT inputs, float* TRIM_RESTRICT outputs) {
    constexpr std::int64_t kAhead = 128;  // steps: some hundred nanoseconds
    const Value* const listed = static_cast<const Value*>(matrix.list_values);
    for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
        typename Isa::BlockSums sums = {};
        if (const std::int64_t steps = window_steps(matrix, block)) {
            const std::uint8_t* columns = matrix.slot_columns + matrix.slot_start[block] * kStepBytes;
            const Value* values = static_cast<const Value*>(matrix.slot_values) + matrix.slot_start[block] * kStepSlots;
            for (std::int64_t window = 0; window < matrix.windows; ++window) {
                for (std::int64_t step = 0; step < steps; ++step, columns += kStepBytes, values += kStepSlots) {
                    prefetch(columns, kAhead * kStepBytes);
                    for (std::uintptr_t line = 0; 64 * line < sizeof(Value) * kStepSlots; ++line) {
                        prefetch(values, kAhead * kStepSlots * sizeof(Value) + 64 * line);
                    }
                    Isa::add_slots(columns, values, arranged + window * kWindowColumns, sums);
                }
            }
        }
        const std::int64_t end = matrix.list_start[block + 1];
        for (std::int64_t entry = matrix.list_start[block]; entry < end; entry += 2 * kBlockRows) {
            prefetch(matrix.list_columns + entry, 1024);
            prefetch(listed + entry, 2048);
            Isa::add_two_steps(matrix.list_columns + entry, listed + entry, inputs, sums);
        }
        float rows[kBlockRows];
        Isa::store_rows(sums, rows);
        const std::int64_t place = matrix.groups * kGroupRows + block * kBlockRows;
        for (std::int64_t i = 0; i < kBlockRows && place + i < matrix.rows; ++i) {
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

}  // namespace
}  // namespace trim
