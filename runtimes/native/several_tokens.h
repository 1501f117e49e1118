// Kernels for several tokens: kept weights are decoded tile after tile, and each tile meets all tokens.
#pragma once

#include "kernels.h"

namespace trim {
namespace {

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

// Decodes blocks of slots and lists, tile after tile. Columns of a row must rise, in its slots from the start of each
// window and in its lists all along; in slots, what does not rise is no weight, and in lists a row is at its end there.
template <typename Isa, typename Value>
class BlockTiles {
  public:
    static constexpr std::int64_t kRows = kBlockRows;

    BlockTiles(const Matrix& matrix, Span blocks) : matrix_(matrix), blocks_(blocks) {
        for (std::int64_t row = 0; row < length(blocks) * kBlockRows; ++row) {
            next_[row] = matrix.list_start[blocks.first + row / kBlockRows] + row % kBlockRows;
        }
    }

    static std::int64_t first_place(const Matrix& matrix, std::int64_t block) {
        return matrix.groups * kGroupRows + block * kBlockRows;
    }

    bool decode(Span words, Tile<Isa>& tile) {
        tile.entries = 0;
        for (std::int64_t row = 0; row < length(blocks_) * kBlockRows; ++row) {
            const std::int64_t begin = tile.entries;
            add_slots(row, words, tile);
            if (!add_lists(row, words, begin + Tile<Isa>::kColumns, tile)) return false;
            tile.end_row(row);
        }
        return true;
    }

    bool all_read() const {
        for (std::int64_t row = 0; row < length(blocks_) * kBlockRows; ++row) {
            if (next_[row] < matrix_.list_start[blocks_.first + row / kBlockRows + 1]) return false;
        }
        return true;
    }

  private:
    void add_slots(std::int64_t row, Span words, Tile<Isa>& tile) const {
        constexpr std::int64_t kWindows = kWordColumns / kWindowColumns;
        const std::int64_t block = blocks_.first + row / kBlockRows, steps = window_steps(matrix_, block);
        if (!steps) return;
        const std::int64_t i = row % kBlockRows, shift = i < kRowSlots ? 0 : 4, first = words.first * kWindows;
        const std::int64_t last = words.last * kWindows < matrix_.windows ? words.last * kWindows : matrix_.windows;
        const std::int64_t start = matrix_.slot_start[block] + first * steps;
        const std::uint8_t* columns = matrix_.slot_columns + start * kStepBytes + i % kRowSlots;
        const Value* values = static_cast<const Value*>(matrix_.slot_values) + start * kStepSlots + i;
        // Counted here: a byte that is written to the tile might, for all a compiler knows, be one of its counter.
        std::int64_t count = tile.entries;
        for (std::int64_t window = first; window < last; ++window) {
            const std::int64_t base = (window - first) * kWindowColumns;
            std::int64_t before = -1;
            for (std::int64_t slot = 0; slot < steps * kRowSlots; ++slot, columns += 4, values += kBlockRows) {
                const std::int64_t column = *columns >> shift & 15;
                tile.columns[count] = static_cast<std::uint8_t>(base + column);
                tile.values[count] = widen_one(*values);
                count += column > before;
                before = column;
            }
        }
        tile.entries = count;
    }

    bool add_lists(std::int64_t row, Span words, std::int64_t most, Tile<Isa>& tile) {
        const Value* const values = static_cast<const Value*>(matrix_.list_values);
        const std::uint16_t* const listed = matrix_.list_columns;
        const std::int64_t first = words.first * kWordColumns, last = words.last * kWordColumns;
        const std::int64_t end = matrix_.list_start[blocks_.first + row / kBlockRows + 1];
        std::int64_t entry = next_[row], before = first - 1, column, count = tile.entries;
        for (; entry < end && (column = listed[entry]) < last; entry += kBlockRows) {
            if (column <= before) {
                if (column < first) return false;
                entry = end;
                break;
            }
            if (count == most) return false;
            tile.columns[count] = static_cast<std::uint8_t>(column - first);
            tile.values[count] = widen_one(values[entry]);
            ++count;
            before = column;
        }
        tile.entries = count;
        next_[row] = entry;
        return true;
    }

    const Matrix& matrix_;
    Span blocks_;
    std::int64_t next_[kTileRows];  // listed entry of each row where the next tile begins
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

}  // namespace
}  // namespace trim
