// Inputs rounded to integers, so that 8-bit values are multiplied without error: a float holds every integer up to
// 2^24, and while no sum of |value| * |input| is larger, sums of products are exact in whatever order they are added.
//
// Whatever is multiplied by here is a power of two and loses nothing, so that the only rounding is the one to integers,
// and the same on any processor, also where a compiler makes one instruction of a product and a sum.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace trim {

// Inputs can be rounded to integers up to here.
constexpr std::int32_t kMostInput = 1 << 22;

// Writes one token's inputs, multiplied by `scales` if there are any, and by the largest power of two with which none
// exceeds the limit; rounded to the nearest integer, half to even. With limit 0 they are only multiplied by scales.
// Returns what the outputs are then to be multiplied by: NaN where an input is NaN or infinite.
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
    if (limit == 0) return 1.0f;
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    if (most >= kInfinity || largest < kNothing) {
        std::memset(rounded, 0, static_cast<std::size_t>(columns) * sizeof(float));
        return most >= kInfinity ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
    }
    int exponent, limit_exponent;
    const bool above = std::frexp(largest, &exponent) > std::frexp(static_cast<float>(limit), &limit_exponent);
    const int shift = limit_exponent - exponent - above;
    const float power = std::ldexp(1.0f, shift);
    for (std::int64_t j = 0; j < columns; ++j) rounded[j] = (rounded[j] * power + kNoFraction) - kNoFraction;
    return std::ldexp(1.0f, -shift);
}

}  // namespace trim
