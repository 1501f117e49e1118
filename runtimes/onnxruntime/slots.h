// A matrix of a model's file, laid out anew in the form that this processor multiplies fastest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../native/trim_native.h"
#include "pages.h"

namespace trim::ort {

inline std::size_t value_bytes(std::int32_t value_type) {
    constexpr std::size_t kBytes[] = {4, 2, 2, 1};
    return kBytes[value_type];
}

// Has no row of a matrix be a bitmap.
inline void leave_out_bitmap(TrimNativeMatrix& matrix) {
    static const std::int64_t no_groups = 0;
    alignas(64) static const unsigned char tail[4 * TRIM_NATIVE_TAIL] = {};
    matrix.bitmap_rows = matrix.mask_size = 0;
    matrix.mask = nullptr;
    matrix.group_start = &no_groups;
    matrix.group_start_size = 1;
    matrix.values = tail;
    matrix.values_size = TRIM_NATIVE_TAIL;
}

// The bitmap that a file holds as rows; row i is the one at place i. Its contents are from anybody.
class Rows {
  public:
    explicit Rows(const TrimNativeMatrix& matrix) : matrix_(matrix), width_(value_bytes(matrix.value_type)) {
        mask_.resize(static_cast<std::size_t>(matrix.rows * matrix.columns));
        starts_.push_back(0);
        for (std::int64_t place = 0; good_ && place < matrix.rows; ++place) {
            good_ = add_bitmap_row(place);
            starts_.push_back(static_cast<std::int64_t>(values_.size() / width_));
            order_.push_back(static_cast<std::int32_t>(place));
        }
    }

    // Whether every column exists, and no bit stands where there is no weight.
    bool good() const { return good_; }

    TrimNativeRows described() const {
        return {matrix_.rows, matrix_.columns, mask_.data(), size(mask_), starts_.data(), size(starts_), values_.data(),
                starts_.back(), order_.data(), size(order_), matrix_.value_type};
    }

    template <typename T>
    static std::int64_t size(const std::vector<T>& array) { return static_cast<std::int64_t>(array.size()); }

  private:
    // Values of a group alternate between its rows, so that those before a row's are counted anew in each word.
    bool add_bitmap_row(std::int64_t place) {
        const std::int64_t words = (matrix_.columns + 63) / 64, group = place / 4;
        const std::uint64_t* const mask = matrix_.mask + group * words * 4;
        std::int64_t next = matrix_.group_start[group];
        for (std::int64_t word = 0; word < words; ++word) {
            for (std::int64_t row = 0; row < 4; ++row) {
                std::uint64_t bits = mask[4 * word + row];
                if (group * 4 + row >= matrix_.rows && bits != 0) return false;
                if (row != place % 4) next += __builtin_popcountll(bits);
                for (; row == place % 4 && bits; bits &= bits - 1) {
                    const std::int64_t column = 64 * word + __builtin_ctzll(bits);
                    if (column >= matrix_.columns) return false;
                    keep(place, column, matrix_.values, next++);
                }
            }
        }
        return next == matrix_.group_start[group + 1];
    }

    void keep(std::int64_t place, std::int64_t column, const void* values, std::int64_t at) {
        mask_[static_cast<std::size_t>(place * matrix_.columns + column)] = 1;
        const unsigned char* const from = static_cast<const unsigned char*>(values) + static_cast<std::size_t>(at) * width_;
        values_.insert(values_.end(), from, from + width_);
    }

    const TrimNativeMatrix& matrix_;
    std::size_t width_;
    bool good_ = true;
    std::vector<std::uint8_t> mask_;
    std::vector<std::int64_t> starts_;
    std::vector<unsigned char> values_;
    std::vector<std::int32_t> order_;
};

// The largest sum of |value| of a row of 8-bit integers.
inline std::int64_t largest_sum(const TrimNativeRows& rows) {
    const std::int8_t* const values = static_cast<const std::int8_t*>(rows.values);
    std::int64_t largest = 0;
    for (std::int64_t row = 0; row < rows.rows; ++row) {
        std::int64_t sum = 0;
        for (std::int64_t i = rows.row_start[row]; i < rows.row_start[row + 1]; ++i) sum += std::abs(values[i]);
        largest = std::max(largest, sum);
    }
    return largest;
}

// The arrays of a matrix that is all slots and lists.
class Slots {
  public:
    // The engine's status; `matrix`, which keeps its order and scales, then points to the arrays.
    std::int32_t lay_out(TrimNativeMatrix& matrix, const TrimNativeRows& given) {
        const std::size_t blocks = static_cast<std::size_t>((matrix.rows + 7) / 8);
        slot_start_.resize(blocks + 1), list_start_.resize(blocks + 1);
        const std::int64_t starts = Rows::size(slot_start_);
        const double cost = trim_native_step_cost(matrix.value_type);
        if (const std::int32_t status = trim_native_plan(&given, cost, slot_start_.data(), list_start_.data(), starts)) {
            return status;
        }
        const std::size_t steps = static_cast<std::size_t>(slot_start_.back());
        const std::size_t entries = static_cast<std::size_t>(list_start_.back()), width = value_bytes(matrix.value_type);
        slot_columns_.assign(steps), list_columns_.assign(entries);
        slot_values_.assign(8 * steps * width), list_values_.assign(entries * width);
        if (const std::int32_t status =
                trim_native_lay_out(&given, slot_start_.data(), list_start_.data(), starts, slot_columns_.data(),
                                    slot_values_.data(), list_columns_.data(), list_values_.data())) {
            return status;
        }
        leave_out_bitmap(matrix);
        if (matrix.value_type == TRIM_NATIVE_I8) matrix.input_limit = trim_native_input_limit(largest_sum(given), false);
        matrix.slot_start = slot_start_.data(), matrix.slot_start_size = starts;
        matrix.slot_columns = slot_columns_.data(), matrix.slot_columns_size = slot_start_.back();
        matrix.slot_values = slot_values_.data(), matrix.slot_values_size = static_cast<std::int64_t>(8 * steps);
        matrix.list_start = list_start_.data(), matrix.list_start_size = starts;
        matrix.list_columns = list_columns_.data(), matrix.list_columns_size = list_start_.back();
        matrix.list_values = list_values_.data(), matrix.list_values_size = list_start_.back();
        return TRIM_NATIVE_OK;
    }

  private:
    std::vector<std::int64_t> slot_start_, list_start_;
    Array<std::uint32_t> slot_columns_;
    Array<std::uint16_t> list_columns_;
    Array<unsigned char> slot_values_, list_values_;  // aligned for any type
};

}  // namespace trim::ort
