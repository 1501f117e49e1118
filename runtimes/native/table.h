// The table of one instruction set's kernels.
#pragma once

#include "integers.h"
#include "one_token.h"
#include "several_tokens.h"

namespace trim {
namespace {

template <typename Isa, typename Value>
constexpr Decode decode_kernel() {
    Decode kernel = {Isa::arrangement(static_cast<const Value*>(nullptr)), decode_bitmap<Isa, Value>, nullptr, nullptr,
                     decode_dense<Isa, Value>, decode_dense_tokens<Isa, Value>};
    if constexpr (sizeof(Value) == 1) {
        kernel.for_blocks = arrange_integers, kernel.blocks = decode_quads<Isa>;
    } else {
        kernel.for_blocks = arrange_for_blocks, kernel.blocks = decode_blocks<Isa, Value>;
    }
    return kernel;
}

template <typename Isa, typename Value>
constexpr Batch batch_kernel() {
    return {Isa::kLanes, Isa::kWidest, sizeof(Tile<Isa>), multiply_batch<Isa, BitmapTiles<Isa, Value>>,
            multiply_batch<Isa, BlockTiles<Isa, Value>>};
}

// In the order of the value types in trim_native.h.
template <typename Isa>
constexpr Kernels kernels(const char* name) {
    return {name,
            {Isa::few_tokens(sizeof(float)), Isa::few_tokens(2), Isa::few_tokens(2), Isa::few_tokens(1)},
            round_token,
            {Isa::step_cost(sizeof(float)), Isa::step_cost(2), Isa::step_cost(2), Isa::step_cost(1)},
            {decode_kernel<Isa, float>(), decode_kernel<Isa, BFloat16>(), decode_kernel<Isa, Float16>(),
             decode_kernel<Isa, std::int8_t>()},
            {batch_kernel<Isa, float>(), batch_kernel<Isa, BFloat16>(), batch_kernel<Isa, Float16>(),
             batch_kernel<Isa, std::int8_t>()}};
}

}  // namespace
}  // namespace trim
