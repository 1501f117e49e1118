// Inputs rounded to integers, so that 8-bit values are multiplied without error, and as integers: many at a time. A float
// too holds every integer up to 2^24, and while no sum of |value| * |input| is larger, sums of products are exact in
// whatever order they are added, in either.
//
// Whatever is multiplied by here is a power of two and loses nothing, so that the only rounding is the one to integers,
// and the same on any processor, also where a compiler makes one instruction of a product and a sum.
#pragma once

#include "kernels.h"

namespace trim {
namespace {

// Inputs can be rounded to integers up to here, which take 16 bits.
constexpr std::int32_t kMostInput = 32767;

// The finest integers for inputs of a matrix whose rows have sums of |value| up to `most`: so that sums of products are
// exact as integers of 32 bits or, if wanted and no coarser than 8 bits, as floats too.
inline std::int32_t input_limit(std::int64_t most, bool as_floats) {
    constexpr std::int64_t kExact = (1 << 24) - 1, kLeast = 255, kWhole = 0x7fffffff;
    const std::int64_t limit = as_floats && kExact / most >= kLeast ? kExact / most : kWhole / most;
    return static_cast<std::int32_t>(limit < 2 ? 2 : limit < kMostInput ? limit : kMostInput);
}

// Writes one token's inputs, multiplied by `scales` if there are any, and by the largest power of two with which none
// exceeds the limit; rounded to the nearest integer, half to even. Returns what the outputs are then to be multiplied by:
// NaN where an input is NaN or infinite.
inline float round_token(const float* inputs, std::int64_t columns, const float* scales, std::int32_t limit,
                         float* rounded) {
    constexpr std::uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
    constexpr float kNoFraction = 0x1.8p23f;  // the neighbours of sums with it are integers
    constexpr float kNothing = 0x1p-100f;     // less than this is zero, or its power of two would not be a float
    std::uint32_t most = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
        rounded[j] = scales == nullptr ? inputs[j] : inputs[j] * scales[j];
        std::uint32_t bits;
        std::memcpy(&bits, rounded + j, sizeof bits);
        most = (bits & kMagnitude) > most ? bits & kMagnitude : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    if (most >= kInfinity || largest < kNothing) {
        std::memset(rounded, 0, static_cast<std::size_t>(columns) * sizeof(float));
        return most >= kInfinity ? __builtin_nanf("") : 1.0f;
    }
    int exponent, limit_exponent;
    const float part = __builtin_frexpf(largest, &exponent);
    const bool above = part > __builtin_frexpf(static_cast<float>(limit), &limit_exponent);
    const int shift = limit_exponent - exponent - above;
    const float power = __builtin_ldexpf(1.0f, shift);
    for (std::int64_t j = 0; j < columns; ++j) rounded[j] = (rounded[j] * power + kNoFraction) - kNoFraction;
    return __builtin_ldexpf(1.0f, -shift);
}

}  // namespace
}  // namespace trim
