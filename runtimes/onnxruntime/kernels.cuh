// The products of the operators on a GPU: Y = A W^T, summed in float32, each of them short before it is fast.
//
// A warp takes a unit of W (four rows of a bitmap, else one) and some tokens at a time, and its lanes
// add up what they find side by side. Whatever the arrays hold, nothing outside of them is touched, as long as they are
// as long as the views below say. Read trim_native.h for the layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../native/trim_native.h"

namespace trim::cuda {

constexpr int kWarp = 32;
constexpr int kBlockWarps = 4;
constexpr int kGroupRows = 4;
constexpr int kWordColumns = 64;

// ---- views of matrices in the memory of the GPU ---------------------------------------------------------------------

struct Bitmap {
    std::int64_t rows, columns, units, words;  // of four rows, and of 64 columns
    const std::int32_t* order;                 // [rows]
    const std::uint64_t* mask;                 // [units, words, 4]
    const std::int64_t* start;                 // [units + 1]
    const void* values;                        // [size]
    std::int64_t size;
    const float* scales;                       // [rows]
};

struct Csr {
    std::int64_t rows, columns, units;         // of one row
    const std::int64_t* start;                 // [units + 1]
    const std::uint16_t* columns_of_values;    // [size]
    const void* values;                        // [size]
    std::int64_t size;
    const float* scales;                       // [rows]
};

struct Dense {
    std::int64_t rows, columns, units;         // of one row
    const void* values;                        // [rows, columns]
    const float* scales;                       // [rows]
};

// ---- numbers --------------------------------------------------------------------------------------------------------

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(std::int8_t value) { return static_cast<float>(value); }

__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(float value, __half& to) { to = __float2half(value); }

#ifdef __CUDACC__  // where a compiler for CPUs stands in for lanes, it brings its own
// The sum over the lanes whose numbers are equal modulo kApart. All lanes of the warp have to come by.
template <int kApart>
__device__ float sum_lanes(float value) {
    for (int offset = kWarp / 2; offset >= kApart; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}
#endif

// ---- tokens ---------------------------------------------------------------------------------------------------------

// Tokens of A that a warp multiplies together.
template <typename Input, int kTokens>
struct Tokens {
    const Input* inputs[kTokens];  // a token behind the last one is the last one again, whose product is not stored
    Input* outputs;
    std::int64_t count, rows;

    __device__ Tokens(const Input* all, std::int64_t first, std::int64_t tokens, std::int64_t columns,
                      std::int64_t rows, Input* outputs)
        : outputs(outputs + first * rows), count(tokens - first), rows(rows) {
        for (int t = 0; t < kTokens; ++t) inputs[t] = all + (t < count ? first + t : tokens - 1) * columns;
    }

    __device__ void add_products(float weight, std::int64_t column, float (&sums)[kTokens]) const {
        for (int t = 0; t < kTokens; ++t) sums[t] += weight * widen(inputs[t][column]);
    }

    __device__ void store(std::int64_t row, float scale, const float (&sums)[kTokens]) const {
        for (int t = 0; t < kTokens; ++t) {
            if (t < count) narrow(scale * sums[t], outputs[t * rows + row]);
        }
    }
};

// ---- what a warp does with a unit -----------------------------------------------------------------------------------

// Where the values of a unit begin and end.
struct Span {
    std::int64_t first, last;

    __device__ Span(const std::int64_t* start, std::int64_t unit, std::int64_t size)
        : first(start[unit]), last(start[unit + 1]) {
        if (first < 0 || first > last || last > size) first = last = 0;
    }
};

// Lane i has columns i and 32 + i of each word. Where their values are, the bits before them say.
template <typename Value, typename Input, int kTokens>
__device__ void multiply_unit(const Bitmap& matrix, std::int64_t unit, int lane, const Tokens<Input, kTokens>& tokens) {
    const Value* const values = static_cast<const Value*>(matrix.values);
    const std::uint64_t* mask = matrix.mask + unit * matrix.words * kGroupRows;
    const Span span(matrix.start, unit, matrix.size);
    std::int64_t next = span.first;
    float sums[kGroupRows][kTokens] = {};
    for (std::int64_t word = 0; word < matrix.words; ++word) {
        for (int i = 0; i < kGroupRows; ++i) {
            const std::uint64_t bits = *mask++;
            for (int bit = lane; bit < kWordColumns; bit += kWarp) {
                const std::int64_t column = word * kWordColumns + bit;
                const std::int64_t index = next + __popcll(bits & ((std::uint64_t{1} << bit) - 1));
                if ((bits >> bit & 1) && column < matrix.columns && index < span.last) {
                    tokens.add_products(widen(values[index]), column, sums[i]);
                }
            }
            next += __popcll(bits);
        }
    }
    for (int i = 0; i < kGroupRows; ++i) {
        for (int t = 0; t < kTokens; ++t) sums[i][t] = sum_lanes<1>(sums[i][t]);
        const std::int64_t place = unit * kGroupRows + i;
        const std::int64_t row = place < matrix.rows ? matrix.order[place] : -1;
        if (lane == 0 && row >= 0 && row < matrix.rows) tokens.store(row, matrix.scales[row], sums[i]);
    }
}

template <typename Value, typename Input, int kTokens>
__device__ void multiply_unit(const Csr& matrix, std::int64_t row, int lane, const Tokens<Input, kTokens>& tokens) {
    const Value* const values = static_cast<const Value*>(matrix.values);
    const Span span(matrix.start, row, matrix.size);
    float sums[kTokens] = {};
    for (std::int64_t entry = span.first + lane; entry < span.last; entry += kWarp) {
        const std::int64_t column = matrix.columns_of_values[entry];
        if (column < matrix.columns) tokens.add_products(widen(values[entry]), column, sums);
    }
    for (int t = 0; t < kTokens; ++t) sums[t] = sum_lanes<1>(sums[t]);
    if (lane == 0) tokens.store(row, matrix.scales[row], sums);
}

template <typename Value, typename Input, int kTokens>
__device__ void multiply_unit(const Dense& matrix, std::int64_t row, int lane, const Tokens<Input, kTokens>& tokens) {
    const Value* const values = static_cast<const Value*>(matrix.values) + row * matrix.columns;
    float sums[kTokens] = {};
    for (std::int64_t column = lane; column < matrix.columns; column += kWarp) {
        tokens.add_products(widen(values[column]), column, sums);
    }
    for (int t = 0; t < kTokens; ++t) sums[t] = sum_lanes<1>(sums[t]);
    if (lane == 0) tokens.store(row, matrix.scales[row], sums);
}

// ---- the kernel, and its launch -------------------------------------------------------------------------------------

// inputs [tokens, columns], outputs [tokens, rows]. Units lie along x, tokens along y.
template <typename Value, typename Input, int kTokens, typename Matrix>
__global__ void multiply(Matrix matrix, const Input* inputs, std::int64_t tokens, Input* outputs) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t unit = std::int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarp;
    if (unit >= matrix.units) return;  // the whole warp
    const std::int64_t stride = std::int64_t{gridDim.y} * kTokens;
    for (std::int64_t first = std::int64_t{blockIdx.y} * kTokens; first < tokens; first += stride) {
        multiply_unit<Value>(matrix, unit, lane,
                             Tokens<Input, kTokens>(inputs, first, tokens, matrix.columns, matrix.rows, outputs));
    }
}

// Tokens for which weights are read once; and blocks along y, of which there cannot be more.
constexpr int kTokensTogether = 8;
constexpr std::int64_t kMostBlocks = 65535;

template <typename Value, int kTokens, typename Matrix, typename Input>
cudaError_t launch_together(const Matrix& matrix, const Input* inputs, std::int64_t tokens, Input* outputs,
                            cudaStream_t stream) {
    const std::int64_t shares = (tokens + kTokens - 1) / kTokens;
    cudaLaunchConfig_t config{};
    config.gridDim.x = static_cast<unsigned>((matrix.units + kBlockWarps - 1) / kBlockWarps);  // rows are below 2^31
    config.gridDim.y = static_cast<unsigned>(shares < kMostBlocks ? shares : kMostBlocks);
    config.blockDim.x = kBlockWarps * kWarp;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, multiply<Value, Input, kTokens, Matrix>, matrix, inputs, tokens, outputs);
}

template <typename Value, typename Matrix, typename Input>
cudaError_t launch_values(const Matrix& matrix, const Input* inputs, std::int64_t tokens, Input* outputs,
                          cudaStream_t stream) {
    return tokens == 1 ? launch_together<Value, 1>(matrix, inputs, tokens, outputs, stream)
                       : launch_together<Value, kTokensTogether>(matrix, inputs, tokens, outputs, stream);
}

// outputs [tokens, rows] of inputs [tokens, columns], when the stream gets there; `value_type` is one of trim_native.h.
template <typename Matrix, typename Input>
cudaError_t launch(const Matrix& matrix, std::int32_t value_type, const Input* inputs, std::int64_t tokens,
                   Input* outputs, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    switch (value_type) {
        case TRIM_NATIVE_F32: return launch_values<float>(matrix, inputs, tokens, outputs, stream);
        case TRIM_NATIVE_BF16: return launch_values<__nv_bfloat16>(matrix, inputs, tokens, outputs, stream);
        case TRIM_NATIVE_F16: return launch_values<__half>(matrix, inputs, tokens, outputs, stream);
        case TRIM_NATIVE_I8: return launch_values<std::int8_t>(matrix, inputs, tokens, outputs, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace trim::cuda
