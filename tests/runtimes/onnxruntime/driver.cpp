// Runs the GPU kernels in emulation on matrices from its input, each array in memory of exactly its size, and prints
// what they give. Built with sanitizers, so that any access outside the arrays ends it.
//
// A case is seven int64 (operator, type of values, whether inputs are float16, rows, columns, units, tokens) and, each
// behind its number of bytes, the arrays order, mask or columns, start, values, scales and inputs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "kernels.cuh"

namespace {

struct Array {
    std::unique_ptr<unsigned char[]> memory;
    std::int64_t bytes;

    template <typename T>
    const T* as() const { return reinterpret_cast<const T*>(memory.get()); }
};

void take(void* to, std::int64_t bytes) {
    if (bytes && std::fread(to, static_cast<std::size_t>(bytes), 1, stdin) != 1) std::exit(2);
}

Array take_array() {
    std::int64_t bytes;
    take(&bytes, sizeof bytes);
    Array array{std::unique_ptr<unsigned char[]>(new unsigned char[static_cast<std::size_t>(bytes)]), bytes};
    take(array.memory.get(), bytes);
    return array;
}

template <typename Input, typename Matrix>
void multiply(const Matrix& matrix, std::int64_t type, const Array& inputs, std::int64_t tokens) {
    const std::size_t count = static_cast<std::size_t>(tokens * matrix.rows);
    const std::unique_ptr<Input[]> outputs(new Input[count]());
    const cudaError_t error = trim::cuda::launch(matrix, static_cast<std::int32_t>(type), inputs.as<Input>(), tokens,
                                                 outputs.get(), nullptr);
    if (error != cudaSuccess || std::fwrite(outputs.get(), sizeof(Input), count, stdout) != count) std::exit(3);
}

}  // namespace

int main() {
    for (std::int64_t numbers[7]; std::fread(numbers, sizeof numbers, 1, stdin) == 1;) {
        const auto [op, type, half, rows, columns, units, tokens] = numbers;
        const std::int64_t value_bytes[] = {4, 2, 2, 1};
        const Array order = take_array(), structure = take_array(), start = take_array(), values = take_array();
        const Array scales = take_array(), inputs = take_array();
        const std::int64_t size = values.bytes / value_bytes[type];
        const auto run = [&, type = type, half = half, tokens = tokens](const auto& matrix) {
            if (half) multiply<__half>(matrix, type, inputs, tokens);
            else multiply<float>(matrix, type, inputs, tokens);
        };
        const void* const stored = values.memory.get();
        if (op == 0) {
            run(trim::cuda::Bitmap{rows, columns, units, (columns + 63) / 64, order.as<std::int32_t>(),
                                   structure.as<std::uint64_t>(), start.as<std::int64_t>(), stored, size,
                                   scales.as<float>()});
        } else if (op == 1) {
            run(trim::cuda::Csr{rows, columns, units, start.as<std::int64_t>(), structure.as<std::uint16_t>(), stored,
                                size, scales.as<float>()});
        } else {
            run(trim::cuda::Dense{rows, columns, rows, stored, scales.as<float>()});
        }
    }
    return 0;
}
