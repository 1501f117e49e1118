// Lays rows out as blocks of slots and lists: first how many steps each block should have, then their contents.

#include "trim_native.h"

#include <cstring>
#include <limits>

#include "checks.h"
#include "kernels.h"

namespace trim {
namespace {

std::int64_t even(std::int64_t number) { return number + number % 2; }

// `TRIM_NATIVE_OK`, or what is wrong about the sizes.
std::int32_t check(const TrimNativeRows* given, const std::int64_t* slot_start, const std::int64_t* list_start,
                   std::int64_t starts_size) {
    if (given == nullptr || !is_matrix(given->rows, given->columns, given->value_type)) return TRIM_NATIVE_NO_MATRIX;
    const std::int64_t rows = given->rows;
    if (given->mask == nullptr || given->mask_size != rows * given->columns || given->row_start == nullptr ||
        given->row_start_size != rows + 1 || given->order_size < 0 || (given->order == nullptr && given->order_size) ||
        (given->values == nullptr && given->values_size) || slot_start == nullptr || list_start == nullptr ||
        starts_size != divide_up(given->order_size, kBlockRows) + 1 ||
        !rises(given->row_start, rows, given->values_size)) {
        return TRIM_NATIVE_BAD_SIZE;
    }
    for (std::int64_t place = 0; place < given->order_size; ++place) {
        if (given->order[place] < 0 || given->order[place] >= rows) return TRIM_NATIVE_BAD_ORDER;
    }
    return TRIM_NATIVE_OK;
}

std::int64_t windows_of(const TrimNativeRows& rows) { return divide_up(rows.columns, kWindowColumns); }

// Bit j: whether column j of the window is kept.
std::uint32_t kept_in_window(const std::uint8_t* mask, std::int64_t columns) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, mask, static_cast<std::size_t>(columns < kWindowColumns ? columns : kWindowColumns));
    // Each factor moves one byte's lowest bit to where it belongs, in the highest byte of the product.
    return static_cast<std::uint32_t>((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

// Weights of a row that do not fit into its slots, for each number of steps a window.
struct Overflow { std::int64_t entries[kMostSteps + 1]; };

Overflow overflow(const TrimNativeRows& rows, std::int32_t row) {
    const std::uint8_t* const mask = rows.mask + row * rows.columns;
    Overflow found{};
    for (std::int64_t first = 0; first < rows.columns; first += kWindowColumns) {
        std::int64_t kept = popcount(kept_in_window(mask + first, rows.columns - first));
        for (std::int64_t steps = 0; kept > 0; ++steps, --kept) found.entries[steps] += kept;
    }
    return found;
}

// Writes the eight rows of a block, weight after weight.
template <typename Value>
class Block {
  public:
    Block(const TrimNativeRows& rows, std::int64_t steps, std::uint32_t* slot_columns, Value* slot_values,
          std::uint16_t* list_columns, Value* list_values, std::int64_t list_entries)
        : rows_(rows), steps_(steps), slot_columns_(slot_columns), slot_values_(slot_values),
          list_columns_(list_columns), list_values_(list_values), list_steps_(list_entries / kBlockRows) {}

    // False when mask and values, or list and plan, disagree.
    bool add(std::int64_t i, std::int32_t row) {
        const std::uint8_t* const mask = rows_.mask + row * rows_.columns;
        const Value* value = static_cast<const Value*>(rows_.values) + rows_.row_start[row];
        const Value* const end = static_cast<const Value*>(rows_.values) + rows_.row_start[row + 1];
        std::int64_t listed = 0, last_listed = 0;
        for (std::int64_t first = 0, window = 0; first < rows_.columns; first += kWindowColumns, ++window) {
            std::uint32_t kept = kept_in_window(mask + first, rows_.columns - first);
            if (popcount(kept) > end - value) return false;
            std::int64_t slot = 0;
            for (; kept && slot < steps_; kept &= kept - 1, ++slot) {
                put(window, slot, i, static_cast<std::uint32_t>(__builtin_ctz(kept)));
                slot_values_[(window * steps_ + slot) * kBlockRows + i] = *value++;
            }
            for (; slot < steps_; ++slot) put(window, slot, i, kNoColumn);
            for (; kept; kept &= kept - 1) {
                last_listed = first + __builtin_ctz(kept);
                if (listed == list_steps_ || last_listed > std::numeric_limits<std::uint16_t>::max()) return false;
                list_columns_[listed * kBlockRows + i] = static_cast<std::uint16_t>(last_listed);
                list_values_[listed++ * kBlockRows + i] = *value++;
            }
        }
        for (; listed < list_steps_; ++listed) {
            list_columns_[listed * kBlockRows + i] = static_cast<std::uint16_t>(last_listed);
        }
        return value == end;
    }

    // A row that fills up the block keeps nothing.
    void add_empty(std::int64_t i) {
        for (std::int64_t step = 0; step < windows_of(rows_) * steps_; ++step) put(0, step, i, kNoColumn);
    }

  private:
    static constexpr std::uint32_t kNoColumn = kWindowColumns;

    void put(std::int64_t window, std::int64_t slot, std::int64_t i, std::uint32_t column) {
        slot_columns_[window * steps_ + slot] |= column << (4 * i);
    }

    const TrimNativeRows& rows_;
    std::int64_t steps_;
    std::uint32_t* slot_columns_;
    Value* slot_values_;
    std::uint16_t* list_columns_;
    Value* list_values_;
    std::int64_t list_steps_;
};

// Values are moved, not understood: an integer of their size will do.
template <typename Value>
std::int32_t fill(const TrimNativeRows& rows, const std::int64_t* slot_start, const std::int64_t* list_start,
                  std::int64_t blocks, std::uint32_t* slot_columns, void* slot_values, std::uint16_t* list_columns,
                  void* list_values) {
    const std::int64_t windows = windows_of(rows);
    for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t steps = slot_start[block + 1] - slot_start[block];
        const std::int64_t entries = list_start[block + 1] - list_start[block];
        if (steps < 0 || steps % windows || steps / windows > kMostSteps || entries < 0 || entries % (2 * kBlockRows)) {
            return TRIM_NATIVE_BAD_MASK;
        }
        Block<Value> written(rows, steps / windows, slot_columns + slot_start[block],
                             static_cast<Value*>(slot_values) + slot_start[block] * kBlockRows,
                             list_columns + list_start[block], static_cast<Value*>(list_values) + list_start[block],
                             entries);
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const std::int64_t place = block * kBlockRows + i;
            if (place >= rows.order_size) written.add_empty(i);
            else if (!written.add(i, rows.order[place])) return TRIM_NATIVE_BAD_MASK;
        }
    }
    return TRIM_NATIVE_OK;
}

}  // namespace
}  // namespace trim

std::int32_t trim_native_plan(const TrimNativeRows* given, double step_cost, std::int64_t* slot_start,
                              std::int64_t* list_start, std::int64_t starts_size) {
    using namespace trim;
    if (const std::int32_t status = check(given, slot_start, list_start, starts_size)) return status;
    const bool listable = given->columns <= kListInputs;
    const std::int64_t windows = windows_of(*given);
    slot_start[0] = list_start[0] = 0;
    for (std::int64_t block = 0; block + 1 < starts_size; ++block) {
        Overflow longest{};
        for (std::int64_t place = block * kBlockRows;
             place < given->order_size && place < (block + 1) * kBlockRows; ++place) {
            const Overflow row = overflow(*given, given->order[place]);
            for (std::int64_t steps = 0; steps < kMostSteps; ++steps) {
                if (row.entries[steps] > longest.entries[steps]) longest.entries[steps] = row.entries[steps];
            }
        }
        const auto cost = [&](std::int64_t steps) {
            return step_cost * static_cast<double>(steps * windows) +
                   static_cast<double>(even(longest.entries[steps]) * kBlockRows);
        };
        std::int64_t best = listable ? 0 : kMostSteps;
        for (std::int64_t steps = best + 1; steps <= kMostSteps; ++steps) {
            if (cost(steps) < cost(best)) best = steps;
        }
        slot_start[block + 1] = slot_start[block] + best * windows;
        list_start[block + 1] = list_start[block] + even(longest.entries[best]) * kBlockRows;
    }
    return TRIM_NATIVE_OK;
}

std::int32_t trim_native_lay_out(const TrimNativeRows* given, const std::int64_t* slot_start,
                                 const std::int64_t* list_start, std::int64_t starts_size, std::uint32_t* slot_columns,
                                 void* slot_values, std::uint16_t* list_columns, void* list_values) {
    using namespace trim;
    if (const std::int32_t status = check(given, slot_start, list_start, starts_size)) return status;
    const auto fill_as = given->value_type == TRIM_NATIVE_F32  ? fill<std::uint32_t>
                         : given->value_type == TRIM_NATIVE_I8 ? fill<std::uint8_t>
                                                               : fill<std::uint16_t>;
    return fill_as(*given, slot_start, list_start, starts_size - 1, slot_columns, slot_values, list_columns,
                   list_values);
}
