// Reads damaged matrices from a file and hands each to the engine as it is, in arrays of exactly their size. Built with
// sanitizers, so that any access outside of them ends it. Prints how many the engine took and how many it refused.
//
// A case is seventeen int64 (rows, columns, rows of the bitmap, type, tokens, threads, bytes of eleven arrays), then the
// arrays: order, mask, group starts, values, slot starts, slot columns, slot values, list starts, list columns, list
// values, scales. Sizes that the engine is told are those of the arrays, in elements.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "trim_native.h"

namespace {

template <typename T>
std::unique_ptr<T[]> read_array(std::FILE* file, std::int64_t bytes) {
    const std::size_t count = static_cast<std::size_t>(bytes) / sizeof(T);
    std::unique_ptr<T[]> array(new T[count]);
    if (std::fread(array.get(), sizeof(T), count, file) != count) std::abort();
    return array;
}

}  // namespace

int main(int count, char** words) {
    std::FILE* file = count == 3 ? std::fopen(words[1], "rb") : nullptr;
    if (file == nullptr || trim_native_select_isa(words[2]) != TRIM_NATIVE_OK) return 2;
    long taken = 0, refused = 0;
    std::int64_t head[17];
    while (std::fread(head, sizeof head[0], 17, file) == 17) {
        const std::int64_t rows = head[0], columns = head[1], tokens = head[4];
        const std::int64_t* sizes = head + 6;
        const auto order = read_array<std::int32_t>(file, sizes[0]);
        const auto mask = read_array<std::uint64_t>(file, sizes[1]);
        const auto starts = read_array<std::int64_t>(file, sizes[2]);
        const auto values = read_array<std::uint8_t>(file, sizes[3]);  // new aligns it for any type
        const auto slot_starts = read_array<std::int64_t>(file, sizes[4]);
        const auto slot_columns = read_array<std::uint32_t>(file, sizes[5]);
        const auto slot_values = read_array<std::uint8_t>(file, sizes[6]);
        const auto list_starts = read_array<std::int64_t>(file, sizes[7]);
        const auto list_columns = read_array<std::uint16_t>(file, sizes[8]);
        const auto list_values = read_array<std::uint8_t>(file, sizes[9]);
        const auto scales = read_array<float>(file, sizes[10]);
        const std::int64_t bytes[] = {4, 2, 2, 1};
        const std::int32_t kind = static_cast<std::int32_t>(head[3]);
        const std::int64_t width = kind >= 0 && kind < 4 ? bytes[kind] : 1;
        const TrimNativeMatrix matrix = {rows, columns, head[2],
                                         order.get(), sizes[0] / 4, mask.get(), sizes[1] / 8,
                                         starts.get(), sizes[2] / 8, values.get(), sizes[3] / width,
                                         slot_starts.get(), sizes[4] / 8, slot_columns.get(), sizes[5] / 4,
                                         slot_values.get(), sizes[6] / width,
                                         list_starts.get(), sizes[7] / 8, list_columns.get(), sizes[8] / 2,
                                         list_values.get(), sizes[9] / width,
                                         sizes[10] ? scales.get() : nullptr, sizes[10] / 4,
                                         kind, kind == TRIM_NATIVE_I8 ? 300 : 0, nullptr, 0};
        // A caller's own arrays are as large as it says they are; only matrices come from files.
        const bool sane = rows > 0 && columns > 0 && rows < 4096 && columns < 4096;
        std::vector<float> x(sane ? static_cast<std::size_t>(tokens * columns) : 1, 0.5f);
        std::vector<float> y(sane ? static_cast<std::size_t>(tokens * rows) : 1);
        if (!sane) x.clear(), y.clear();
        const std::int32_t status =
            trim_native_linear(&matrix, x.data(), sane ? tokens : 0, columns, y.data(), rows,
                               static_cast<std::int32_t>(head[5]));
        ++(status == TRIM_NATIVE_OK ? taken : refused);
    }
    std::fclose(file);
    std::printf("%ld taken, %ld refused\n", taken, refused);
    return 0;
}
