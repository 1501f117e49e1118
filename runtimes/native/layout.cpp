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
    return below(given->order, given->order_size, rows) ? TRIM_NATIVE_OK : TRIM_NATIVE_BAD_ORDER;
}

// Bit j: whether column j of the eight, or fewer, is kept.
std::uint32_t kept_of_eight(const std::uint8_t* mask, std::int64_t columns) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, mask, static_cast<std::size_t>(columns < 8 ? columns : 8));
    // Each factor moves one byte's lowest bit to where it belongs, in the highest byte of the product.
    return static_cast<std::uint32_t>((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

// The same for a window, of which so many columns exist.
std::uint32_t kept_in_window(const std::uint8_t* mask, std::int64_t columns, Windows windows) {
    const std::uint32_t kept = kept_of_eight(mask, columns);
    return windows.columns > 8 && columns > 8 ? kept | kept_of_eight(mask + 8, columns - 8) << 8 : kept;
}

// Weights of a row that do not fit into its slots, for each number of steps a window.
struct Overflow { std::int64_t entries[kQuadColumns + 1]; };

Overflow overflow(const TrimNativeRows& rows, Windows windows, std::int32_t row) {
    const std::uint8_t* const mask = rows.mask + row * rows.columns;
    Overflow found{};
    for (std::int64_t first = 0; first < rows.columns; first += windows.columns) {
        std::int64_t kept = popcount(kept_in_window(mask + first, rows.columns - first, windows));
        for (std::int64_t steps = 0; kept > 0; ++steps, --kept) found.entries[steps] += kept;
    }
    return found;
}

// Where the slots of a window are, of values that take one step at a time: see trim_native.h.
struct Steps {
    static constexpr Windows kWindows = kSingly;

    static std::int64_t value(std::int64_t slot, std::int64_t row) { return slot * kBlockRows + row; }
    static std::int64_t word(std::int64_t slot, std::int64_t) { return slot; }
    static std::int64_t shift(std::int64_t, std::int64_t row) { return 4 * row; }
    // The column of a slot that stands for no weight, behind the last weight's, or -1.
    static std::uint32_t blank(std::int64_t, std::int64_t) { return kWindowColumns; }
};

// And of those that take four. Blanks have the column of the last weight, or fall where there is none.
struct Quads {
    static constexpr Windows kWindows = kInQuads;

    static std::int64_t quad(std::int64_t slot) { return slot / kQuadSteps * kQuadSteps; }
    static std::int64_t value(std::int64_t slot, std::int64_t row) {
        return quad(slot) * kBlockRows + row * kQuadSteps + slot % kQuadSteps;
    }
    static std::int64_t word(std::int64_t slot, std::int64_t row) { return quad(slot) + row / 4 * 2 + row % 2; }
    static std::int64_t shift(std::int64_t slot, std::int64_t row) {
        return 8 * (slot % kQuadSteps) + 4 * (row / 2 % 2);
    }
    static std::uint32_t blank(std::int64_t slot, std::int64_t last) {
        return last >= 0 ? static_cast<std::uint32_t>(last) : slot == 0 ? kQuadColumns - 1 : 0;
    }
};

// Writes the eight rows of a block, weight after weight.
template <typename Value, typename Slots>
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
        for (std::int64_t first = 0, window = 0; first < rows_.columns; first += Slots::kWindows.columns, ++window) {
            std::uint32_t kept = kept_in_window(mask + first, rows_.columns - first, Slots::kWindows);
            if (popcount(kept) > end - value) return false;
            std::int64_t slot = 0, last = -1;
            for (; kept && slot < steps_; kept &= kept - 1, ++slot) {
                last = __builtin_ctz(kept);
                put(window, slot, i, static_cast<std::uint32_t>(last));
                slot_values_[window * steps_ * kBlockRows + Slots::value(slot, i)] = *value++;
            }
            leave_blank(window, slot, i, last);
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
        const std::int64_t windows = divide_up(rows_.columns, Slots::kWindows.columns);
        for (std::int64_t window = 0; window < windows; ++window) leave_blank(window, 0, i, -1);
    }

  private:
    void put(std::int64_t window, std::int64_t slot, std::int64_t i, std::uint32_t column) {
        slot_columns_[window * steps_ + Slots::word(slot, i)] |= column << Slots::shift(slot, i);
    }

    void leave_blank(std::int64_t window, std::int64_t slot, std::int64_t i, std::int64_t last) {
        for (; slot < steps_; ++slot) put(window, slot, i, Slots::blank(slot, last));
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
template <typename Value, typename Slots>
std::int32_t fill(const TrimNativeRows& rows, const std::int64_t* slot_start, const std::int64_t* list_start,
                  std::int64_t blocks, std::uint32_t* slot_columns, void* slot_values, std::uint16_t* list_columns,
                  void* list_values) {
    const std::int64_t windows = divide_up(rows.columns, Slots::kWindows.columns);
    for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t steps = slot_start[block + 1] - slot_start[block];
        const std::int64_t entries = list_start[block + 1] - list_start[block];
        if (steps < 0 || steps % (windows * Slots::kWindows.unit) || steps / windows > Slots::kWindows.columns ||
            entries < 0 || entries % (2 * kBlockRows)) {
            return TRIM_NATIVE_BAD_MASK;
        }
        Block<Value, Slots> written(rows, steps / windows, slot_columns + slot_start[block],
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
    const Windows windows = windows_of(given->value_type);
    const std::int64_t count = divide_up(given->columns, windows.columns), most = windows.columns;
    slot_start[0] = list_start[0] = 0;
    for (std::int64_t block = 0; block + 1 < starts_size; ++block) {
        Overflow longest{};
        for (std::int64_t place = block * kBlockRows;
             place < given->order_size && place < (block + 1) * kBlockRows; ++place) {
            const Overflow row = overflow(*given, windows, given->order[place]);
            for (std::int64_t steps = 0; steps < most; ++steps) {
                if (row.entries[steps] > longest.entries[steps]) longest.entries[steps] = row.entries[steps];
            }
        }
        const auto cost = [&](std::int64_t steps) {
            return step_cost * static_cast<double>(steps * count) +
                   static_cast<double>(even(longest.entries[steps]) * kBlockRows);
        };
        std::int64_t best = listable ? 0 : most;
        for (std::int64_t steps = best + windows.unit; steps <= most; steps += windows.unit) {
            if (cost(steps) < cost(best)) best = steps;
        }
        slot_start[block + 1] = slot_start[block] + best * count;
        list_start[block + 1] = list_start[block] + even(longest.entries[best]) * kBlockRows;
    }
    return TRIM_NATIVE_OK;
}

std::int32_t trim_native_lay_out(const TrimNativeRows* given, const std::int64_t* slot_start,
                                 const std::int64_t* list_start, std::int64_t starts_size, std::uint32_t* slot_columns,
                                 void* slot_values, std::uint16_t* list_columns, void* list_values) {
    using namespace trim;
    if (const std::int32_t status = check(given, slot_start, list_start, starts_size)) return status;
    const auto fill_as = given->value_type == TRIM_NATIVE_F32  ? fill<std::uint32_t, Steps>
                         : given->value_type == TRIM_NATIVE_I8 ? fill<std::uint8_t, Quads>
                                                               : fill<std::uint16_t, Steps>;
    return fill_as(*given, slot_start, list_start, starts_size - 1, slot_columns, slot_values, list_columns,
                   list_values);
}
