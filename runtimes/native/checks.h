// What the functions of the C interface check of their arguments alike.
#pragma once

#include <cstdint>
#include <limits>

#include "trim_native.h"

namespace trim {

constexpr std::int64_t kMostSide = std::numeric_limits<std::int32_t>::max();  // rows, columns; also tokens

inline std::int64_t divide_up(std::int64_t number, std::int64_t by) { return (number + by - 1) / by; }

// Whether offsets begin at 0, never fall and end at `end`.
inline bool rises(const std::int64_t* starts, std::int64_t count, std::int64_t end) {
    if (starts[0] != 0 || starts[count] != end) return false;
    for (std::int64_t i = 0; i < count; ++i) {
        if (starts[i] > starts[i + 1]) return false;
    }
    return true;
}

inline bool is_matrix(std::int64_t rows, std::int64_t columns, std::int32_t value_type) {
    return rows >= 1 && columns >= 1 && rows <= kMostSide && columns <= kMostSide && value_type >= TRIM_NATIVE_F32 &&
           value_type <= TRIM_NATIVE_I8;
}

}  // namespace trim
