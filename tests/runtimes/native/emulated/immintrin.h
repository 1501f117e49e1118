// The AVX-512 intrinsics that our kernels use, in plain C++ after Intel's descriptions, for processors without them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

template <int kBytes>
union Register {
    std::uint8_t bytes[kBytes];
    std::int8_t i8[kBytes];
    std::uint16_t u16[kBytes / 2];
    std::uint32_t u32[kBytes / 4];
    std::int32_t i32[kBytes / 4];
    std::uint64_t u64[kBytes / 8];
    float f32[kBytes / 4];
};

struct __m128i { Register<16> r; };
struct __m256i { Register<32> r; };
struct __m512i { Register<64> r; };
struct __m512 { Register<64> r; };
using __mmask16 = std::uint16_t;
using __mmask32 = std::uint32_t;
using __mmask64 = std::uint64_t;

template <typename To>
static To loaded(const void* source) {
    To to;
    std::memcpy(to.r.bytes, source, sizeof to.r.bytes);
    return to;
}

static inline __m512 _mm512_loadu_ps(const void* p) { return loaded<__m512>(p); }
static inline __m512i _mm512_loadu_si512(const void* p) { return loaded<__m512i>(p); }
static inline __m256i _mm256_loadu_si256(const __m256i* p) { return loaded<__m256i>(p); }
static inline __m128i _mm_loadu_si128(const __m128i* p) { return loaded<__m128i>(p); }
static inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, a.r.bytes, 64); }
static inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, a.r.bytes, 64); }

static inline __m512 _mm512_castsi512_ps(__m512i a) { return loaded<__m512>(a.r.bytes); }
static inline __m256i _mm512_castsi512_si256(__m512i a) { return loaded<__m256i>(a.r.bytes); }
static inline __m128i _mm512_castsi512_si128(__m512i a) { return loaded<__m128i>(a.r.bytes); }
static inline __m256i _mm512_extracti64x4_epi64(__m512i a, int part) { return loaded<__m256i>(a.r.bytes + 32 * part); }
static inline __m128i _mm512_extracti32x4_epi32(__m512i a, int part) { return loaded<__m128i>(a.r.bytes + 16 * part); }

template <typename To, typename Lane>
static To each(const Lane& lane, int lanes) {
    To to;
    for (int i = 0; i < lanes; ++i) lane(to.r, i);
    return to;
}

static inline __m512 _mm512_set1_ps(float a) {
    return each<__m512>([&](auto& to, int i) { to.f32[i] = a; }, 16);
}
static inline __m512i _mm512_set1_epi32(int a) {
    return each<__m512i>([&](auto& to, int i) { to.i32[i] = a; }, 16);
}
template <typename... Lanes>
static __m512i _mm512_set_epi64(Lanes... highest_first) {
    const std::uint64_t lanes[] = {static_cast<std::uint64_t>(highest_first)...};
    return each<__m512i>([&](auto& to, int i) { to.u64[i] = lanes[7 - i]; }, 8);
}
static inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return each<__m512>([&](auto& to, int i) { to.f32[i] = a.r.f32[i] + b.r.f32[i]; }, 16);
}
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return each<__m512>([&](auto& to, int i) { to.f32[i] = std::fma(a.r.f32[i], b.r.f32[i], c.r.f32[i]); }, 16);
}
static inline __m512i _mm512_set1_epi8(char a) {
    return each<__m512i>([&](auto& to, int i) { to.i8[i] = a; }, 64);
}
static inline __m512i _mm512_add_epi8(__m512i a, __m512i b) {
    const auto sum = [&](int i) { return static_cast<std::uint8_t>(a.r.bytes[i] + b.r.bytes[i]); };
    return each<__m512i>([&](auto& to, int i) { to.bytes[i] = sum(i); }, 64);
}
static inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return each<__m512i>([&](auto& to, int i) { to.u32[i] = a.r.u32[i] & b.r.u32[i]; }, 16);
}
static inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
    return each<__m512i>([&](auto& to, int i) { to.u32[i] = a.r.u32[i] << count; }, 16);
}
static inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
    return each<__m512i>([&](auto& to, int i) { to.u32[i] = a.r.u32[i] >> count; }, 16);
}
static inline __m512 _mm512_permutexvar_ps(__m512i at, __m512 a) {
    return each<__m512>([&](auto& to, int i) { to.f32[i] = a.r.f32[at.r.u32[i] & 15]; }, 16);
}
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int quarters) {
    const auto from = [&](int i) { return 4 * (quarters >> (2 * (i / 4)) & 3) + i % 4; };
    return each<__m512>([&](auto& to, int i) { to.f32[i] = (i < 8 ? a : b).r.f32[from(i)]; }, 16);
}
static inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return each<__m512i>([&](auto& to, int i) { to.u32[i] = a.r.bytes[i]; }, 16);
}
static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return each<__m512i>([&](auto& to, int i) { to.u32[i] = a.r.u16[i]; }, 16);
}
static inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return each<__m512i>([&](auto& to, int i) { to.i32[i] = a.r.i8[i]; }, 16);
}
static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    return each<__m512>([&](auto& to, int i) { to.f32[i] = static_cast<float>(a.r.i32[i]); }, 16);
}
static inline __m512 _mm512_cvtph_ps(__m256i a) {
    return each<__m512>(
        [&](auto& to, int i) {
            const int exponent = a.r.u16[i] >> 10 & 31, mantissa = a.r.u16[i] & 1023;
            const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                               : exponent     ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                                              : std::ldexp(static_cast<float>(mantissa), -24);
            to.f32[i] = a.r.u16[i] >> 15 ? -size : size;
        },
        16);
}
static inline __m512 _mm512_i32gather_ps(__m512i at, const void* base, int scale) {
    return each<__m512>(
        [&](auto& to, int i) { std::memcpy(&to.f32[i], static_cast<const char*>(base) + at.r.i32[i] * scale, 4); }, 16);
}
static inline float _mm512_reduce_add_ps(__m512 a) {
    for (int width = 8; width; width /= 2) {
        for (int i = 0; i < width; ++i) a.r.f32[i] += a.r.f32[i + width];
    }
    return a.r.f32[0];
}
static inline __m512 _mm512_maskz_expand_ps(__mmask16 mask, __m512 a) {
    int next = 0;
    return each<__m512>([&](auto& to, int i) { to.f32[i] = mask >> i & 1 ? a.r.f32[next++] : 0.0f; }, 16);
}
static inline __m512i _mm512_maskz_expand_epi16(__mmask32 mask, __m512i a) {
    int next = 0;
    return each<__m512i>([&](auto& to, int i) { to.u16[i] = mask >> i & 1 ? a.r.u16[next++] : 0; }, 32);
}
static inline __m512i _mm512_maskz_expand_epi8(__mmask64 mask, __m512i a) {
    int next = 0;
    return each<__m512i>([&](auto& to, int i) { to.bytes[i] = mask >> i & 1 ? a.r.bytes[next++] : 0; }, 64);
}
static inline __m512i _mm512_maskz_compress_epi8(__mmask64 mask, __m512i a) {
    __m512i to{};
    int next = 0;
    for (int i = 0; i < 64; ++i) {
        if (mask >> i & 1) to.r.bytes[next++] = a.r.bytes[i];
    }
    return to;
}
