// Kernels for several tokens: kept weights are decoded tile after tile, and each tile meets all tokens.
#pragma once

#include "kernels.h"

namespace trim {
namespace {

constexpr std::int64_t kTileRows = 128;  // rows whose weights are decoded at a time
constexpr std::int64_t kSlack = 64;      // entries that a store may write too many, in each row

// The kept weights of some rows in a few words of columns, as value and column. Decoded once and used for all tokens.
// Rows follow each other in the order of the layout, `kRowEntries` apart. Each has an even number of entries, if need be
// with a zero at its end.
template <typename Isa>
struct alignas(64) Tile {
    static constexpr std::int64_t kColumns = Isa::kTileWords * kWordColumns;
    static constexpr std::int64_t kRowEntries = kColumns + kSlack;
    static_assert(kColumns <= 256, "a column is a byte");

    float values[kTileRows * kRowEntries];
    std::uint8_t columns[kTileRows * kRowEntries];
    std::int64_t counts[kTileRows];

    void end_row(std::int64_t row, std::int64_t count) {
        values[row * kRowEntries + count] = 0.0f;
        columns[row * kRowEntries + count] = 0;
        counts[row] = count + count % 2;
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
                const std::int64_t row = (group - groups_.first) * kGroupRows + i;
                float* const row_values = tile.values + row * Tile<Isa>::kRowEntries;
                std::uint8_t* const row_columns = tile.columns + row * Tile<Isa>::kRowEntries;
                std::int64_t entries = 0;
                for (std::int64_t m = i; m < mask_words; m += kGroupRows) {
                    const std::int64_t count = popcount(mask[m]);
                    Isa::store_columns(mask[m], m / kGroupRows * kWordColumns, row_columns + entries);
                    for (std::int64_t k = 0; k < count; k += Isa::kLanes) {
                        Isa::store(row_values + entries + k, Isa::widen(begins[m] + k));
                    }
                    entries += count;
                }
                tile.end_row(row, entries);
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

// The column at which the window of each step of slots begins, from the first window of a tile, for so many steps each.
struct FirstColumns { std::uint8_t of[kMostSteps][256 / kWindowColumns * kMostSteps]; };

constexpr FirstColumns make_first_columns() {
    FirstColumns table{};
    for (std::int64_t steps = 1; steps <= kMostSteps; ++steps) {
        for (std::int64_t k = 0; k < 256 / kWindowColumns * steps; ++k) {
            table.of[steps - 1][k] = static_cast<std::uint8_t>(k / steps * kWindowColumns);
        }
    }
    return table;
}

constexpr FirstColumns kFirstColumns = make_first_columns();

// Decodes blocks of slots and lists, tile after tile. Columns of a row's list must rise; where they do not, it is at its
// end.
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
        for (std::int64_t block = blocks_.first, row = 0; block < blocks_.last; ++block) {
            RowEntries kept = {tile.values + row * kStride, tile.columns + row * kStride, kStride, {}};
            append_slots(block, words, kept);
            for (std::int64_t i = 0; i < kBlockRows; ++i, ++row) {
                if (!append_list(row, words, tile, kept.counts[i])) return false;
                tile.end_row(row, kept.counts[i]);
            }
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
    static constexpr std::int64_t kStride = Tile<Isa>::kRowEntries;

    void append_slots(std::int64_t block, Span words, RowEntries& rows) const {
        constexpr bool kInQuads = sizeof(Value) == 1;
        constexpr std::int64_t kWindows = kWordColumns / (kInQuads ? kQuadColumns : kWindowColumns);
        const std::int64_t steps = window_steps(matrix_, block), first = words.first * kWindows;
        const std::int64_t last = words.last * kWindows < matrix_.windows ? words.last * kWindows : matrix_.windows;
        if (!steps) return;
        const std::int64_t start = matrix_.slot_start[block] + first * steps, count = (last - first) * steps;
        const std::uint32_t* const columns = matrix_.slot_columns + start;
        const Value* const values = static_cast<const Value*>(matrix_.slot_values) + start * kBlockRows;
        if constexpr (kInQuads) {
            for (std::int64_t k = 0; k < count; k += kQuadSteps) {
                const auto of_window = static_cast<std::uint8_t>(k / steps * kQuadColumns);
                Isa::append_quad(columns + k, values + k * kBlockRows, of_window, rows);
            }
        } else {
            const std::uint8_t* const firsts = kFirstColumns.of[steps - 1];
            std::int64_t k = 0;
            for (; k + 8 <= count; k += 8) {
                Isa::append_eight_steps(columns + k, values + k * kBlockRows, firsts + k, rows);
            }
            for (; k < count; ++k) append_step(columns[k], values + k * kBlockRows, firsts[k], rows);
        }
    }

    bool append_list(std::int64_t row, Span words, Tile<Isa>& tile, std::int64_t& count) {
        const Value* const values = static_cast<const Value*>(matrix_.list_values);
        const std::uint16_t* const listed = matrix_.list_columns;
        const std::int64_t first = words.first * kWordColumns, last = words.last * kWordColumns;
        const std::int64_t end = matrix_.list_start[blocks_.first + row / kBlockRows + 1];
        float* const row_values = tile.values + row * kStride;
        std::uint8_t* const row_columns = tile.columns + row * kStride;
        std::int64_t entry = next_[row], before = first - 1, column, kept = count;
        for (; entry < end && (column = listed[entry]) < last; entry += kBlockRows) {
            if (column <= before) {
                if (column < first) return false;
                entry = end;
                break;
            }
            if (kept == Tile<Isa>::kColumns) return false;
            row_columns[kept] = static_cast<std::uint8_t>(column - first);
            row_values[kept] = widen_one(values[entry]);
            ++kept;
            before = column;
        }
        count = kept;
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
    for (std::int64_t i = 0; i < rows; ++i) {
        const float* const values = tile.values + i * Tile<Isa>::kRowEntries;
        const std::uint8_t* const columns = tile.columns + i * Tile<Isa>::kRowEntries;
        typename Isa::Vector even[kWidth] = {}, odd[kWidth] = {};
        for (std::int64_t entry = 0, end = tile.counts[i]; entry < end; entry += 2) {
            const float* x0 = inputs + columns[entry] * kTokens;
            const float* x1 = inputs + columns[entry + 1] * kTokens;
            const typename Isa::Vector w0 = Isa::broadcast(values[entry]);
            const typename Isa::Vector w1 = Isa::broadcast(values[entry + 1]);
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
