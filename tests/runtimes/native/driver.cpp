// Exercises the engine through its C interface alone: right sums, and a status for everything that is wrong. Built with
// sanitizers, so that any access outside the arrays, which are allocated to the byte, ends it.
//
// Takes names of instruction sets, prints how many checks held, and ends with 1 at the first that did not.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "trim_native.h"

namespace {

long checks = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        ++checks;                                                                     \
        if (!(condition)) {                                                           \
            std::printf("line %d: %s (%s)\n", __LINE__, #condition, trim_native_isa()); \
            std::exit(1);                                                             \
        }                                                                             \
    } while (false)

// An array of exactly its size.
template <typename T>
struct Array {
    std::unique_ptr<T[]> memory;
    std::int64_t size;

    explicit Array(const std::vector<T>& from)
        : memory(new T[from.size()]), size(static_cast<std::int64_t>(from.size())) {
        std::copy(from.begin(), from.end(), memory.get());
    }
    T* get() const { return memory.get(); }
    T& operator[](std::int64_t i) const { return memory[static_cast<std::size_t>(i)]; }
};

std::mt19937 generator(0);

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

struct Value {
    std::uint32_t bits;
    double meaning;
};

// A random value of the type, and what it stands for.
Value draw(std::int32_t type) {
    if (type == TRIM_NATIVE_I8) {
        const int whole = static_cast<int>(uniform() * 127);
        return {static_cast<std::uint8_t>(whole), static_cast<double>(whole)};
    }
    float value = static_cast<float>(uniform());
    std::uint32_t bits;
    if (type == TRIM_NATIVE_F16) {
        const std::uint32_t mantissa = generator() % 1024, exponent = generator() % 16, sign = generator() % 2;
        const double size =
            exponent ? std::ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25) : std::ldexp(mantissa, -24);
        return {sign << 15 | exponent << 10 | mantissa, sign ? -size : size};
    }
    std::memcpy(&bits, &value, sizeof bits);
    if (type == TRIM_NATIVE_F32) return {bits, value};
    bits &= 0xffff0000;
    std::memcpy(&value, &bits, sizeof value);
    return {bits >> 16, value};
}

std::size_t value_bytes(std::int32_t type) {
    return type == TRIM_NATIVE_F32 ? 4 : type == TRIM_NATIVE_I8 ? 1 : 2;
}

struct Problem {
    std::int64_t rows, columns;
    std::int32_t type;
    std::vector<double> dense;
    std::vector<float> row_scales;
    Array<std::int32_t> order{{}};
    Array<std::uint64_t> mask{{}};
    Array<std::int64_t> starts{{}};
    Array<std::uint8_t> values{{}};
    Array<std::int64_t> slot_starts{{}};
    Array<std::uint32_t> slot_columns{{}};
    Array<std::uint8_t> slot_values{{}};
    Array<std::int64_t> list_starts{{}};
    Array<std::uint16_t> list_columns{{}};
    Array<std::uint8_t> list_values{{}};
    Array<float> scales{{}};
    TrimNativeMatrix matrix{};
    std::int64_t most = 1;  // of 8-bit integers: the largest sum of |value| of a row

    // The rows behind the first `bitmap_rows` are blocks, each with another number of slots.
    Problem(std::int64_t n, std::int64_t k, std::int32_t value_type, double density, std::int64_t bitmap_rows)
        : rows(n), columns(k), type(value_type), dense(static_cast<std::size_t>(n * k)) {
        const std::size_t bytes = value_bytes(type);
        if (bitmap_rows > rows) bitmap_rows = rows;
        std::vector<std::int32_t> some_order(static_cast<std::size_t>(rows));
        std::iota(some_order.begin(), some_order.end(), 0);
        std::shuffle(some_order.begin(), some_order.end(), generator);
        std::vector<std::uint64_t> words;
        std::vector<std::int64_t> begins{0};
        std::vector<std::uint8_t> stream;
        for (std::int64_t i = 0; i < rows; ++i) row_scales.push_back(static_cast<float>(uniform()));
        std::vector<std::int64_t> sizes(static_cast<std::size_t>(rows));
        const auto write = [&](const Value& value, std::uint8_t* to) {
            for (std::size_t b = 0; b < bytes; ++b) to[b] = static_cast<std::uint8_t>(value.bits >> (8 * b));
        };
        // The value of a kept weight of the `place`-th row.
        const auto weight = [&](std::int64_t place, std::int64_t j) {
            const Value value = draw(type);
            const std::int64_t row = some_order[static_cast<std::size_t>(place)];
            const double scale = type == TRIM_NATIVE_I8 ? row_scales[static_cast<std::size_t>(row)] : 1.0;
            dense[static_cast<std::size_t>(row * columns + j)] = value.meaning * scale;
            if (type == TRIM_NATIVE_I8) sizes[static_cast<std::size_t>(row)] += std::llabs(std::llround(value.meaning));
            return value;
        };
        const auto keep = [&](std::int64_t place, std::int64_t j, std::vector<std::uint8_t>& to) {
            to.resize(to.size() + bytes);
            write(weight(place, j), to.data() + to.size() - bytes);
        };
        const auto is_kept = [&] { return uniform() <= 2 * density - 1; };
        for (std::int64_t group = 0; group < (bitmap_rows + 3) / 4; ++group) {
            for (std::int64_t word = 0; word < (columns + 63) / 64; ++word) {
                for (std::int64_t i = 4 * group; i < 4 * group + 4; ++i) {
                    std::uint64_t bits = 0;
                    for (std::int64_t j = 64 * word; i < rows && j < 64 * word + 64 && j < columns; ++j) {
                        if (!is_kept()) continue;
                        keep(i, j, stream);
                        bits |= std::uint64_t{1} << (j % 64);
                    }
                    words.push_back(bits);
                }
            }
            begins.push_back(static_cast<std::int64_t>(stream.size() / bytes));
        }
        // Not numbers: whatever is read there must not reach a sum.
        stream.resize(stream.size() + TRIM_NATIVE_TAIL * bytes, 0xff);
        std::vector<std::int64_t> list_begins{0}, slot_begins{0};
        std::vector<std::uint16_t> listed;
        std::vector<std::uint8_t> list_stream, slot_stream;
        std::vector<std::uint32_t> slotted;
        const bool quads = type == TRIM_NATIVE_I8;
        const std::int64_t width = quads ? 16 : 8, windows = (columns + width - 1) / width;
        // Puts a column and a value, if there is one, into a slot of a row, counted from the first step of its window.
        const auto put = [&](std::int64_t step, std::int64_t slot, std::int64_t i, std::int64_t column, const Value* value) {
            std::int64_t word = step + slot, shift = 4 * i, at = 8 * word + i;
            if (quads) {
                const std::int64_t quad = step + slot / 4 * 4, in_quad = slot % 4;
                constexpr std::int64_t kWord[] = {0, 1, 0, 1, 2, 3, 2, 3}, kShift[] = {0, 0, 4, 4, 0, 0, 4, 4};
                word = quad + kWord[i], shift = 8 * in_quad + kShift[i], at = 8 * quad + 4 * i + in_quad;
            }
            slotted[static_cast<std::size_t>(word)] |= static_cast<std::uint32_t>(column) << shift;
            if (value != nullptr) write(*value, slot_stream.data() + static_cast<std::size_t>(at) * bytes);
        };
        for (std::int64_t block = 0; block < (rows - bitmap_rows + 7) / 8; ++block) {
            std::vector<std::uint16_t> of_row[8];
            std::size_t steps = 0;
            const std::int64_t of_window = quads ? generator() % 5 * 4 : generator() % 9, first = slot_begins.back();
            slot_begins.push_back(first + windows * of_window);
            slotted.resize(static_cast<std::size_t>(slot_begins.back()));
            slot_stream.resize(slotted.size() * 8 * bytes);
            for (std::int64_t i = 0; i < 8; ++i) {
                const std::int64_t place = bitmap_rows + 8 * block + i;
                for (std::int64_t window = 0; window < windows; ++window) {
                    const std::int64_t step = first + window * of_window;
                    std::int64_t slot = 0, last = -1;
                    for (std::int64_t j = window * width; place < rows && j < columns && j < (window + 1) * width; ++j) {
                        if (!is_kept()) continue;
                        if (slot == of_window) {
                            of_row[i].push_back(static_cast<std::uint16_t>(j));
                            continue;
                        }
                        const Value value = weight(place, j);
                        last = j % width;
                        put(step, slot++, i, last, &value);
                    }
                    for (; slot < of_window; ++slot) {
                        put(step, slot, i, !quads ? 8 : last >= 0 ? last : slot == 0 ? 15 : 0, nullptr);
                    }
                }
                steps = std::max(steps, of_row[i].size());
            }
            for (std::size_t step = 0; step < steps + steps % 2; ++step) {
                for (std::int64_t i = 0; i < 8; ++i) {
                    const std::vector<std::uint16_t>& row = of_row[i];
                    listed.push_back(step < row.size() ? row[step] : row.empty() ? std::uint16_t{0} : row.back());
                    if (step < row.size()) keep(bitmap_rows + 8 * block + i, row[step], list_stream);
                    else list_stream.resize(list_stream.size() + bytes);
                }
            }
            list_begins.push_back(static_cast<std::int64_t>(listed.size()));
        }
        slot_starts = Array(slot_begins), slot_columns = Array(slotted), slot_values = Array(slot_stream);
        list_starts = Array(list_begins), list_columns = Array(listed), list_values = Array(list_stream);
        order = Array(some_order), mask = Array(words), starts = Array(begins), values = Array(stream);
        scales = Array(row_scales);
        const bool scaled = quads;
        for (const std::int64_t sum : sizes) most = std::max(most, sum);
        const std::int32_t limit = scaled ? trim_native_input_limit(most, true) : 0;
        const auto each = static_cast<std::int64_t>(bytes);
        matrix = {rows, columns, bitmap_rows, order.get(), order.size, mask.get(), mask.size, starts.get(), starts.size,
                  values.get(), values.size / each, slot_starts.get(), slot_starts.size, slot_columns.get(),
                  slot_columns.size, slot_values.get(), slot_values.size / each, list_starts.get(), list_starts.size,
                  list_columns.get(), list_columns.size, list_values.get(), list_values.size / each, scaled ? scales.get() : nullptr,
                  scaled ? scales.size : 0, type, limit, nullptr, 0};
    }
};

std::vector<float> random_floats(std::int64_t count) {
    std::vector<float> floats(static_cast<std::size_t>(count));
    for (float& value : floats) value = static_cast<float>(uniform());
    return floats;
}

void check_sums(const Problem& problem, std::int64_t tokens, std::int64_t gap) {
    const std::int64_t rows = problem.rows, columns = problem.columns;
    const std::int64_t x_stride = columns + gap, y_stride = rows + gap;
    const Array<float> x(random_floats(tokens * x_stride - gap));
    std::vector<float> untouched(static_cast<std::size_t>(tokens * y_stride - gap), 7.0f);
    const Array<float> y(untouched), again(untouched);
    CHECK(trim_native_linear(&problem.matrix, x.get(), tokens, x_stride, y.get(), y_stride, 1) == TRIM_NATIVE_OK);
    CHECK(trim_native_linear(&problem.matrix, x.get(), tokens, x_stride, again.get(), y_stride, 3) == TRIM_NATIVE_OK);
    CHECK(std::memcmp(y.get(), again.get(), sizeof(float) * static_cast<std::size_t>(y.size)) == 0);
    bool right = true;
    for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t i = 0; i < rows; ++i) {
            double sum = 0, size = 0, weights = 0;
            for (std::int64_t j = 0; j < columns; ++j) {
                const double weight = problem.dense[static_cast<std::size_t>(i * columns + j)];
                const double product = weight * x[t * x_stride + j];
                sum += product, size += std::fabs(product), weights += std::fabs(weight);
            }
            // Inputs, none above 1, are rounded to half a step at most.
            const double rounding = problem.matrix.input_limit ? weights / problem.matrix.input_limit : 0;
            right = right && std::fabs(y[t * y_stride + i] - sum) <= 1e-6 * size + rounding;
        }
        for (std::int64_t i = rows; t + 1 < tokens && i < y_stride; ++i) right = right && y[t * y_stride + i] == 7.0f;
    }
    CHECK(right);
}

// Sums of integers, bit for bit those in 64 bits, on any instruction set, also of inputs that are large, tiny or zero.
void check_integers(std::int64_t rows, std::int64_t columns, double density, std::int64_t bitmap_rows) {
    Problem problem(rows, columns, TRIM_NATIVE_I8, density, bitmap_rows);
    const auto row_of = [&](std::int64_t i) { return static_cast<std::size_t>(i * columns); };
    std::vector<std::int64_t> weights;
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
            const double scale = problem.row_scales[static_cast<std::size_t>(i)];
            weights.push_back(std::llround(problem.dense[row_of(i) + static_cast<std::size_t>(j)] / scale));
        }
    }
    std::vector<float> powers;
    for (std::int64_t j = 0; j < columns; ++j) {
        powers.push_back(std::ldexp(1.0f, static_cast<int>(generator() % 9) - 4));
    }
    const Array<float> input_scales(powers);
    TrimNativeMatrix m = problem.matrix;
    m.input_scales = input_scales.get(), m.input_scales_size = columns;
    const std::int64_t limit = m.input_limit;
    CHECK(limit == std::min<std::int64_t>(((1 << 24) - 1) / problem.most, 32767));
    CHECK(trim_native_input_limit(problem.most, false) == std::min<std::int64_t>(0x7fffffff / problem.most, 32767));
    constexpr std::int64_t tokens = 27;
    std::vector<float> x = random_floats(tokens * columns);
    for (std::int64_t j = 0; j < columns; ++j) {
        x[row_of(0) + static_cast<std::size_t>(j)] *= 1e30f, x[row_of(1) + static_cast<std::size_t>(j)] *= 1e-20f;
        x[row_of(2) + static_cast<std::size_t>(j)] = 0.0f;
    }
    std::vector<float> expected;
    for (std::int64_t t = 0; t < tokens; ++t) {
        double largest = 0;
        std::vector<double> scaled;
        for (std::int64_t j = 0; j < columns; ++j) {
            scaled.push_back(static_cast<double>(x[row_of(t) + static_cast<std::size_t>(j)]) * input_scales[j]);
            largest = std::max(largest, std::fabs(scaled.back()));
        }
        double power = 1;
        while (largest > 0 && largest * power > limit) power /= 2;
        while (largest > 0 && largest * power * 2 <= limit) power *= 2;
        for (std::int64_t i = 0; i < rows; ++i) {
            std::int64_t sum = 0;
            for (std::int64_t j = 0; j < columns; ++j) {
                const double step = std::nearbyint(scaled[static_cast<std::size_t>(j)] * power);
                sum += weights[row_of(i) + static_cast<std::size_t>(j)] * static_cast<std::int64_t>(step);
            }
            const float product = static_cast<float>(sum) * problem.row_scales[static_cast<std::size_t>(i)];
            expected.push_back(static_cast<float>(product / power));
        }
    }
    const Array<float> inputs(x), y(std::vector<float>(static_cast<std::size_t>(tokens * rows)));
    for (std::int64_t some : {std::int64_t{1}, std::int64_t{3}, tokens}) {
        for (std::int32_t threads : {1, 3}) {
            CHECK(trim_native_linear(&m, inputs.get(), some, columns, y.get(), rows, threads) == TRIM_NATIVE_OK);
            CHECK(std::equal(y.get(), y.get() + some * rows, expected.begin()));
        }
    }
    for (const float wrong : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        inputs[columns - 1] = wrong;
        CHECK(trim_native_linear(&m, inputs.get(), tokens, columns, y.get(), rows, 1) == TRIM_NATIVE_OK);
        CHECK(std::all_of(y.get(), y.get() + rows, [](float value) { return std::isnan(value); }));
        CHECK(std::equal(y.get() + rows, y.get() + tokens * rows, expected.begin() + rows));
    }
    const auto refused = [&](std::int32_t status, const auto& change) {
        TrimNativeMatrix bad = m;
        change(bad);
        CHECK(trim_native_linear(&bad, inputs.get(), 2, columns, y.get(), rows, 1) == status);
    };
    for (const std::int32_t wrong : {-1, 0, 1, 32768, std::numeric_limits<std::int32_t>::min()}) {
        refused(TRIM_NATIVE_BAD_LIMIT, [&](TrimNativeMatrix& bad) { bad.input_limit = wrong; });
    }
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& bad) { bad.input_scales_size -= 1; });
}

// Whatever the arrays hold: a status or some numbers, but nothing is touched that is not theirs.
void check_damage(std::int32_t type) {
    for (std::int64_t tokens : {1, 14}) {
        Problem problem(11, 150, type, 0.3, 11);
        const Array<float> x(random_floats(tokens * 150)), y(random_floats(tokens * 11));
        TrimNativeMatrix m = problem.matrix;
        const auto run = [&](const TrimNativeMatrix& given) {
            return trim_native_linear(&given, x.get(), tokens, 150, y.get(), 11, 2);
        };
        CHECK(run(m) == TRIM_NATIVE_OK);
        for (std::int64_t word = 0; word < problem.mask.size; ++word) {
            const std::uint64_t before = problem.mask[word];
            problem.mask[word] = ~std::uint64_t{0};
            CHECK(before == ~std::uint64_t{0} || run(m) == TRIM_NATIVE_BAD_MASK);
            problem.mask[word] = 0;
            CHECK(before == 0 || run(m) == TRIM_NATIVE_BAD_MASK);
            problem.mask[word] = before;
        }
        for (std::int64_t group = 0; group < problem.starts.size; ++group) {
            const std::int64_t before = problem.starts[group];
            using Limits = std::numeric_limits<std::int64_t>;
            for (std::int64_t wrong : {before - 1, before + 1, std::int64_t{-1}, Limits::max(), Limits::min()}) {
                problem.starts[group] = wrong;
                CHECK(run(m) == TRIM_NATIVE_BAD_MASK);
            }
            problem.starts[group] = before;
        }
        for (std::int32_t wrong : {-1, 11, std::numeric_limits<std::int32_t>::max()}) {
            const std::int32_t before = problem.order[4];
            problem.order[4] = wrong;
            CHECK(run(m) == TRIM_NATIVE_BAD_ORDER);
            problem.order[4] = before;
        }
        problem.order[4] = problem.order[5];
        CHECK(run(m) == TRIM_NATIVE_OK);  // a row twice and one never: no harm to memory
    }
}

void check_damaged_blocks(std::int32_t type) {
    for (std::int64_t tokens : {1, 14}) {
        Problem problem(21, 300, type, 0.3, 4);
        const Array<float> x(random_floats(tokens * 300)), y(random_floats(tokens * 21));
        const TrimNativeMatrix& m = problem.matrix;
        const auto run = [&] { return trim_native_linear(&m, x.get(), tokens, 300, y.get(), 21, 2); };
        CHECK(run() == TRIM_NATIVE_OK);
        for (std::int64_t entry = 0; entry < problem.list_columns.size; entry += 101) {
            const std::uint16_t before = problem.list_columns[entry];
            for (const std::uint16_t wrong : {std::uint16_t{0}, std::uint16_t{299}, std::uint16_t{65535}}) {
                problem.list_columns[entry] = wrong;
                const std::int32_t status = run();
                CHECK(status == TRIM_NATIVE_OK || status == TRIM_NATIVE_BAD_MASK);
            }
            problem.list_columns[entry] = before;
        }
        for (std::int64_t at = 0; at < problem.slot_columns.size; at += 13) {
            const std::uint32_t before = problem.slot_columns[at];
            for (const std::uint32_t wrong : {0u, 0x77777777u, 0x0f0f0f0fu, ~0u}) {
                problem.slot_columns[at] = wrong;
                const std::int32_t status = run();
                CHECK(status == TRIM_NATIVE_OK || status == TRIM_NATIVE_BAD_MASK);
            }
            problem.slot_columns[at] = before;
        }
        for (const Array<std::int64_t>* starts : {&problem.list_starts, &problem.slot_starts}) {
            for (std::int64_t block = 0; block < starts->size; ++block) {
                const std::int64_t before = (*starts)[block];
                using Limits = std::numeric_limits<std::int64_t>;
                for (std::int64_t wrong : {before - 1, before + 8, std::int64_t{-16}, Limits::max(), Limits::min()}) {
                    (*starts)[block] = wrong;
                    CHECK(run() == TRIM_NATIVE_BAD_MASK);
                }
                (*starts)[block] = before;
            }
        }
    }
}

// What the engine lays out itself, and what it says of rows that are none.
void check_layout(std::int64_t rows, std::int64_t columns, std::int32_t type, double density, double step_cost) {
    const std::size_t bytes = value_bytes(type);
    std::vector<std::uint8_t> kept, stream;
    std::vector<std::int64_t> begins{0};
    std::vector<double> dense;
    std::vector<std::int32_t> some_order(static_cast<std::size_t>(rows));
    std::iota(some_order.begin(), some_order.end(), 0);
    std::shuffle(some_order.begin(), some_order.end(), generator);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
            kept.push_back(uniform() <= 2 * density - 1);
            const Value value = draw(type);
            dense.push_back(kept.back() ? value.meaning : 0.0);
            for (std::size_t b = 0; kept.back() && b < bytes; ++b) {
                stream.push_back(static_cast<std::uint8_t>(value.bits >> (8 * b)));
            }
        }
        begins.push_back(static_cast<std::int64_t>(stream.size() / bytes));
    }
    const Array<std::uint8_t> mask(kept), values(stream);
    const Array<std::int64_t> row_start(begins);
    const Array<std::int32_t> order(some_order);
    const std::int64_t blocks = (rows + 7) / 8, size = static_cast<std::int64_t>(stream.size() / bytes);
    const TrimNativeRows good{rows, columns, mask.get(), mask.size, row_start.get(), row_start.size, values.get(), size,
                              order.get(), rows, type};
    const Array<std::int64_t> slot_start(std::vector<std::int64_t>(static_cast<std::size_t>(blocks) + 1));
    const Array<std::int64_t> list_start(std::vector<std::int64_t>(static_cast<std::size_t>(blocks) + 1));
    CHECK(trim_native_plan(&good, step_cost, slot_start.get(), list_start.get(), blocks + 1) == TRIM_NATIVE_OK);
    const auto zeros = [](std::int64_t count, std::size_t width) {
        return Array(std::vector<std::uint8_t>(static_cast<std::size_t>(count) * width));
    };
    const std::int64_t steps = slot_start[blocks], entries = list_start[blocks];
    const Array<std::uint32_t> slot_columns(std::vector<std::uint32_t>(static_cast<std::size_t>(steps)));
    const Array<std::uint8_t> slot_values = zeros(steps * 8, bytes);
    const Array<std::uint16_t> list_columns(std::vector<std::uint16_t>(static_cast<std::size_t>(entries)));
    const Array<std::uint8_t> list_values = zeros(entries, bytes);
    const auto lay_out = [&](const TrimNativeRows& given) {
        std::fill_n(slot_columns.get(), steps, 0);
        return trim_native_lay_out(&given, slot_start.get(), list_start.get(), blocks + 1, slot_columns.get(),
                                   slot_values.get(), list_columns.get(), list_values.get());
    };
    CHECK(lay_out(good) == TRIM_NATIVE_OK);
    const std::int64_t no_groups = 0;
    const Array<std::uint8_t> tail = zeros(TRIM_NATIVE_TAIL, bytes);
    const Array<float> scales(std::vector<float>(static_cast<std::size_t>(rows), 1.0f));
    constexpr std::int32_t limit = 800;
    const TrimNativeMatrix matrix{rows, columns, 0, order.get(), rows, nullptr, 0, &no_groups, 1, tail.get(),
                                  TRIM_NATIVE_TAIL, slot_start.get(), blocks + 1, slot_columns.get(), steps,
                                  slot_values.get(), steps * 8, list_start.get(), blocks + 1, list_columns.get(),
                                  entries, list_values.get(), entries, scales.get(), rows, type,
                                  type == TRIM_NATIVE_I8 ? limit : 0, nullptr, 0};
    for (std::int64_t tokens : {1, 14}) {
        const Array<float> x(random_floats(tokens * columns)), y(random_floats(tokens * rows));
        CHECK(trim_native_linear(&matrix, x.get(), tokens, columns, y.get(), rows, 2) == TRIM_NATIVE_OK);
        bool right = true;
        for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t i = 0; i < rows; ++i) {
                double sum = 0, magnitude = 0, weights = 0;
                for (std::int64_t j = 0; j < columns; ++j) {
                    const double weight = dense[static_cast<std::size_t>(i * columns + j)];
                    const double product = weight * x[t * columns + j];
                    sum += product, magnitude += std::fabs(product), weights += std::fabs(weight);
                }
                const double rounding = type == TRIM_NATIVE_I8 ? weights / limit : 0;
                right = right && std::fabs(y[t * rows + i] - sum) <= 1e-6 * magnitude + rounding;
            }
        }
        CHECK(right);
    }
    const auto refused = [&](std::int32_t status, const auto& change) {
        TrimNativeRows wrong = good;
        change(wrong);
        CHECK(lay_out(wrong) == status);
    };
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeRows& r) { r.rows = 0; });
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeRows& r) { r.columns = std::int64_t{1} << 40; });
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeRows& r) { r.value_type = 4; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeRows& r) { r.mask_size -= 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeRows& r) { r.row_start_size -= 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeRows& r) { r.values_size += 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeRows& r) { r.order_size += 8; });
    CHECK(trim_native_plan(nullptr, step_cost, slot_start.get(), list_start.get(), blocks + 1) ==
          TRIM_NATIVE_NO_MATRIX);
    const std::int32_t row = order[0];
    order[0] = static_cast<std::int32_t>(rows);
    CHECK(lay_out(good) == TRIM_NATIVE_BAD_ORDER);
    order[0] = row;
    for (std::int64_t at = 0; at < mask.size; at += 7) {  // another mask than there are values for, or a plan for
        mask[at] ^= 1;
        CHECK(lay_out(good) == TRIM_NATIVE_BAD_MASK);
        mask[at] ^= 1;
    }
}

void check_dense(std::int64_t rows, std::int64_t columns, std::int32_t type) {
    const std::size_t bytes = value_bytes(type);
    std::vector<std::uint8_t> stream;
    std::vector<double> meanings;
    for (std::int64_t i = 0; i < rows * columns; ++i) {
        const Value value = draw(type);
        meanings.push_back(value.meaning);
        for (std::size_t b = 0; b < bytes; ++b) stream.push_back(static_cast<std::uint8_t>(value.bits >> (8 * b)));
    }
    const Array<std::uint8_t> values(stream);
    constexpr std::int64_t tokens = 3;
    const Array<float> x(random_floats(tokens * columns)), y(random_floats(tokens * rows)), scales(random_floats(rows));
    for (const bool scaled : {true, false}) {
        if (!scaled && type == TRIM_NATIVE_I8) continue;
        const TrimNativeDense good{rows, columns, values.get(), rows * columns, scaled ? scales.get() : nullptr,
                                   scaled ? rows : 0, type};
        CHECK(trim_native_dense(&good, x.get(), tokens * columns, y.get(), tokens * rows, 2) == TRIM_NATIVE_OK);
        bool right = true;
        for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t i = 0; i < rows; ++i) {
                double sum = 0, size = 0;
                for (std::int64_t j = 0; j < columns; ++j) {
                    const double scale = scaled ? scales[i] : 1.0;
                    const double weight = meanings[static_cast<std::size_t>(i * columns + j)] * scale;
                    sum += weight * x[t * columns + j], size += std::fabs(weight * x[t * columns + j]);
                }
                right = right && std::fabs(y[t * rows + i] - sum) <= 1e-6 * size;
            }
        }
        CHECK(right);
    }
    const TrimNativeDense good{rows, columns, values.get(), rows * columns, scales.get(), rows, type};
    const auto refused = [&](std::int32_t status, const auto& change) {
        TrimNativeDense wrong = good;
        change(wrong);
        CHECK(trim_native_dense(&wrong, x.get(), columns, y.get(), rows, 1) == status);
    };
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeDense& m) { m.rows = 0; });
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeDense& m) { m.columns = std::int64_t{1} << 40; });
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeDense& m) { m.value_type = 4; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeDense& m) { m.values = nullptr; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeDense& m) { m.values_size -= 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeDense& m) { m.scales_size -= 1; });
    if (type == TRIM_NATIVE_I8) refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeDense& m) { m.scales = nullptr; });
    CHECK(trim_native_dense(&good, nullptr, columns, y.get(), rows, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_dense(&good, x.get(), columns + 1, y.get(), rows, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_dense(&good, x.get(), columns, y.get(), rows - 1, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_dense(&good, x.get(), columns, y.get(), rows, 0) == TRIM_NATIVE_BAD_THREADS);
    CHECK(trim_native_dense(nullptr, x.get(), columns, y.get(), rows, 1) == TRIM_NATIVE_NO_MATRIX);
}

void check_arguments() {
    const Problem problem(6, 70, TRIM_NATIVE_BF16, 0.3, 6);
    const Array<float> x(random_floats(140)), y(random_floats(12));
    const TrimNativeMatrix& good = problem.matrix;
    const auto refused = [&](std::int32_t status, const auto& change) {
        TrimNativeMatrix wrong = good;
        change(wrong);
        CHECK(trim_native_linear(&wrong, x.get(), 2, 70, y.get(), 6, 1) == status);
    };
    CHECK(trim_native_linear(nullptr, x.get(), 2, 70, y.get(), 6, 1) == TRIM_NATIVE_NO_MATRIX);
    for (std::int64_t side : {std::int64_t{0}, std::int64_t{-6}, std::int64_t{1} << 31, std::int64_t{1} << 62}) {
        refused(TRIM_NATIVE_NO_MATRIX, [&](TrimNativeMatrix& m) { m.rows = side; });
        refused(TRIM_NATIVE_NO_MATRIX, [&](TrimNativeMatrix& m) { m.columns = side; });
    }
    for (std::int32_t type : {-1, 4}) refused(TRIM_NATIVE_NO_MATRIX, [&](TrimNativeMatrix& m) { m.value_type = type; });
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeMatrix& m) { m.rows = 5; });  // fewer than are a bitmap
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeMatrix& m) { m.bitmap_rows = -1; });
    refused(TRIM_NATIVE_NO_MATRIX, [](TrimNativeMatrix& m) { m.bitmap_rows = 3; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.bitmap_rows = 4; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.list_start = nullptr; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.list_columns_size = 16; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.list_values_size = 16; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.list_columns_size = -16; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.columns = 64; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.order = nullptr; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.order_size -= 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.mask = nullptr; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.mask_size += 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.group_start = nullptr; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.group_start_size -= 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.values = nullptr; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.values_size = 63; });
    refused(TRIM_NATIVE_BAD_MASK, [](TrimNativeMatrix& m) { m.values_size -= 1; });
    refused(TRIM_NATIVE_BAD_SIZE, [&](TrimNativeMatrix& m) { m.scales = x.get(), m.scales_size = 5; });
    refused(TRIM_NATIVE_BAD_SIZE, [](TrimNativeMatrix& m) { m.value_type = TRIM_NATIVE_I8; });
    const auto misaligned = [](const auto*& array) {
        array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<std::uintptr_t>(array) + 1);
    };
    refused(TRIM_NATIVE_BAD_SIZE, [&](TrimNativeMatrix& m) { misaligned(m.order); });
    refused(TRIM_NATIVE_BAD_SIZE, [&](TrimNativeMatrix& m) { misaligned(m.mask); });
    refused(TRIM_NATIVE_BAD_SIZE, [&](TrimNativeMatrix& m) { misaligned(m.group_start); });
    refused(TRIM_NATIVE_BAD_SIZE, [&](TrimNativeMatrix& m) {
        m.values = static_cast<const char*>(m.values) + 1;
    });
    CHECK(trim_native_linear(&good, nullptr, 2, 70, y.get(), 6, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_linear(&good, x.get(), 2, 70, nullptr, 6, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_linear(&good, x.get(), 2, 69, y.get(), 6, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_linear(&good, x.get(), 2, 70, y.get(), 5, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_linear(&good, x.get(), -1, 70, y.get(), 6, 1) == TRIM_NATIVE_BAD_INPUTS);
    CHECK(trim_native_linear(&good, nullptr, 0, 70, nullptr, 6, 1) == TRIM_NATIVE_OK);
    for (std::int32_t threads : {0, -1, 4097}) {
        CHECK(trim_native_linear(&good, x.get(), 2, 70, y.get(), 6, threads) == TRIM_NATIVE_BAD_THREADS);
    }
    CHECK(trim_native_select_isa("mmx") == TRIM_NATIVE_UNKNOWN_ISA);
    for (std::int32_t status = -1; status < 13; ++status) CHECK(std::strlen(trim_native_message(status)) > 0);
}

}  // namespace

int main(int count, char** names) {
    for (int n = 1; n < count; ++n) {
        CHECK(trim_native_select_isa(names[n]) == TRIM_NATIVE_OK);
        CHECK(std::strcmp(trim_native_isa(), names[n]) == 0);
        for (std::int32_t type = TRIM_NATIVE_F32; type <= TRIM_NATIVE_I8; ++type) {
            for (double density : {0.0, 0.05, 0.4, 1.0}) {
                for (std::int64_t bitmap_rows : {0, 4, 1000}) {
                    check_sums(Problem(1, 1, type, density, bitmap_rows), 1, 0);
                    check_sums(Problem(5, 63, type, density, bitmap_rows), 2, 3);
                    check_sums(Problem(4, 64, type, density, bitmap_rows), 1, 0);
                    check_sums(Problem(14, 300, type, density, bitmap_rows), 1, 1);
                    check_sums(Problem(14, 300, type, density, bitmap_rows), 19, 0);
                }
            }
            for (std::int64_t bitmap_rows : {0, 200, 1000}) {
                check_sums(Problem(531, 200, type, 0.3, bitmap_rows), 1, 0);  // several blocks of rows, several threads
                check_sums(Problem(531, 200, type, 0.3, bitmap_rows), 4, 0);
                check_sums(Problem(531, 200, type, 0.3, bitmap_rows), 14, 0);
            }
            check_sums(Problem(10, 130, type, 0.3, 4), 300, 5);  // several chunks, every width of a panel
            check_damage(type);
            check_damaged_blocks(type);
            for (double step_cost : {0.0, 3.0, 12.0, 1e9}) {
                check_layout(1, 1, type, 1.0, step_cost);
                check_layout(21, 150, type, 0.3, step_cost);
                check_layout(16, 64, type, 0.9, step_cost);
            }
            check_dense(1, 1, type);
            check_dense(19, 150, type);
        }
        for (std::int64_t bitmap_rows : {0, 8, 1000}) {
            check_integers(1, 1, 1.0, bitmap_rows);
            check_integers(21, 150, 0.3, bitmap_rows);
            check_integers(40, 700, 0.5, bitmap_rows);
        }
        check_sums(Problem(900, 500, TRIM_NATIVE_F32, 0.9, 200), 1, 0);  // work for two threads, in both forms
        check_dense(1100, 1000, TRIM_NATIVE_F32);
    }
    check_arguments();
    std::printf("%ld checks held\n", checks);
    return 0;
}
