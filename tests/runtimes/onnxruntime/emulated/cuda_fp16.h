#pragma once

#include <cmath>
#include <cstdint>

struct __half { std::uint16_t bits; };

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float mantissa = static_cast<float>(exponent ? 1024 + fraction : fraction);
    float size = std::ldexp(mantissa, (exponent ? exponent : 1) - 25);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return value.bits >> 15 ? -size : size;
}

// The nearest, of two the even one.
inline __half __float2half(float value) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) return {0x7fff};
    if (size == 0) return {sign};
    if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(size, &exponent);  // size < 2^exponent
    const int lowest = exponent < -13 ? -24 : exponent - 11;  // the exponent of the last bit
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -lowest)));  // up to 2048: the next exponent
    const int bits = (lowest + 24) * 1024 + steps;
    return {static_cast<std::uint16_t>(sign | bits)};
}
