// What the functions of the C interface check of their arguments alike.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"
#include "trim_native.h"

namespace trim {

constexpr std::int64_t kMostSide = std::numeric_limits<std::int32_t>::max();  // rows, columns; also tokens

inline std::int64_t divide_up(std::int64_t number, std::int64_t by) { return (number + by - 1) / by; }

// These are asked for every product, so they do without branches: compilers then take several numbers at a time, but for
// what they move into a function that they hold to be run rarely.
#define TRIM_APART inline __attribute__((noinline))

// Whether offsets begin at 0, never fall and end at `end`.
TRIM_APART bool rises(const std::int64_t* starts, std::int64_t count, std::int64_t end) {
    std::uint64_t signs = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const auto start = static_cast<std::uint64_t>(starts[i]), next = static_cast<std::uint64_t>(starts[i + 1]);
        signs |= start | (next - start);  // of numbers that are not negative, the difference cannot wrap around
    }
    return starts[0] == 0 && starts[count] == end && end >= 0 && signs >> 63 == 0;
}

// Whether all numbers are at least 0 and below `end`.
TRIM_APART bool below(const std::int32_t* numbers, std::int64_t count, std::int64_t end) {
    std::uint32_t signs = 0;
    const auto last = static_cast<std::uint32_t>(end - 1);
    for (std::int64_t i = 0; i < count; ++i) {
        const auto number = static_cast<std::uint32_t>(numbers[i]);
        signs |= number | (last - number);
    }
    return signs >> 31 == 0;
}

// Whether all numbers are multiples of a power of two.
TRIM_APART bool multiples(const std::int64_t* numbers, std::int64_t count, std::int64_t power) {
    std::int64_t bits = 0;
    for (std::int64_t i = 0; i < count; ++i) bits |= numbers[i];
    return (bits & (power - 1)) == 0;
}

// The windows that values of a type have slots in, and how many steps come at a time. With a step for each column of a
// window no weight is left over.
struct Windows { std::int64_t columns, unit; };

constexpr Windows kSingly = {kWindowColumns, 1}, kInQuads = {kQuadColumns, kQuadSteps};

inline Windows windows_of(std::int32_t value_type) { return value_type == TRIM_NATIVE_I8 ? kInQuads : kSingly; }

inline bool is_matrix(std::int64_t rows, std::int64_t columns, std::int32_t value_type) {
    return rows >= 1 && columns >= 1 && rows <= kMostSide && columns <= kMostSide && value_type >= TRIM_NATIVE_F32 &&
           value_type <= TRIM_NATIVE_I8;
}

}  // namespace trim
