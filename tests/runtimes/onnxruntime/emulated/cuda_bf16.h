#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 { std::uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 value) {
    const std::uint32_t bits = std::uint32_t{value.bits} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
