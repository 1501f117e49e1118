// Quality of every row at every number of pruned weights, in one pass over the row.
//
// The quantities are those of TRIM's quality metric (arXiv 2505.16743, the section on the quality metric), which
// compares a row's dense output y with its pruned output. The paper's search recomputes them for one count at a time;
// to have them for all counts at once (the curves) is this project's formulation.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// GCC and Clang only: the vector type below is theirs. Elsewhere the build leaves this library out.
#define TRIM_API extern "C" __attribute__((visibility("default")))
#define TRIM_INLINE inline __attribute__((always_inline))
#define TRIM_RESTRICT __restrict__

namespace {

// Eight floats: one AVX register; the compiler splits it where registers are narrower.
using Lanes = float __attribute__((vector_size(32)));
constexpr std::int64_t kLanes = 8;
constexpr std::int64_t kChunk = 4 * kLanes;  // samples whose running outputs stay in registers

// What one step has summed up so far, lane by lane. A struct, since as a template argument the bare vector type would
// lose its alignment.
struct alignas(sizeof(Lanes)) Partial {
    Lanes dots;
    Lanes squares;
};

TRIM_INLINE void load(const float* source, Lanes& lanes) { std::memcpy(&lanes, source, sizeof lanes); }

TRIM_INLINE float sum(const Lanes& lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// One row. Weights are added from the most important one on, so that the sums grow from the kept side and the many
// unimportant weights come last; what has been added before step k is the row with its k least important ones pruned.
// The samples are taken a chunk at a time, whose partial sums wait lane by lane in `partial` until all chunks are done.
TRIM_INLINE void row_curves(const float* TRIM_RESTRICT weight, const std::int32_t* TRIM_RESTRICT order,
                            const float* TRIM_RESTRICT inputs, const float* TRIM_RESTRICT output, std::int64_t columns,
                            std::int64_t samples, Partial* TRIM_RESTRICT partial, float* TRIM_RESTRICT numerator,
                            float* TRIM_RESTRICT norm2) {
    for (std::int64_t k = 0; k < columns; ++k) partial[k] = Partial{};
    for (std::int64_t t = 0; t < samples; t += kChunk) {
        const float* y = output + t;
        Lanes y0, y1, y2, y3, x0, x1, x2, x3;
        load(y, y0), load(y + kLanes, y1), load(y + 2 * kLanes, y2), load(y + 3 * kLanes, y3);
        Lanes a0{}, a1{}, a2{}, a3{};  // the pruned output
        for (std::int64_t k = columns - 1; k >= 0; --k) {
            const std::int64_t column = order[k];
            const float scale = weight[column];
            const float* x = inputs + column * samples + t;
            load(x, x0), load(x + kLanes, x1), load(x + 2 * kLanes, x2), load(x + 3 * kLanes, x3);
            a0 += scale * x0;
            a1 += scale * x1;
            a2 += scale * x2;
            a3 += scale * x3;
            partial[k].dots += (a0 * y0 + a1 * y1) + (a2 * y2 + a3 * y3);
            partial[k].squares += (a0 * a0 + a1 * a1) + (a2 * a2 + a3 * a3);
        }
    }
    for (std::int64_t k = 0; k < columns; ++k) {
        numerator[k] = sum(partial[k].dots);
        norm2[k] = sum(partial[k].squares);
    }
    numerator[columns] = norm2[columns] = 0.0f;
}

using RowCurves = decltype(&row_curves);

// The same source compiled once per instruction set and chosen when it runs, so that one binary serves every machine.
// Done by hand because `target_clones` needs ifunc (not in musl, not on macOS) and cannot ask for "AVX2 and FMA".
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define TRIM_VARIANT(name, target_features)                                                                           \
    __attribute__((target(target_features))) void name(                                                               \
        const float* weight, const std::int32_t* order, const float* inputs, const float* output,                     \
        std::int64_t columns, std::int64_t samples, Partial* partial, float* numerator, float* norm2) {               \
        row_curves(weight, order, inputs, output, columns, samples, partial, numerator, norm2);                       \
    }
TRIM_VARIANT(row_curves_avx512, "avx512f,avx2,fma")
TRIM_VARIANT(row_curves_avx2, "avx2,fma")
#undef TRIM_VARIANT

RowCurves best_row_curves() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f")) return row_curves_avx512;
    return avx2 ? row_curves_avx2 : row_curves;
}
#else
RowCurves best_row_curves() { return row_curves; }
#endif

}  // namespace

// For each row i and k = 0..columns weights pruned, least important first, with yhat(k) the pruned row's output:
//     numerator[i, k] = sum_t yhat(k)[t] * outputs[i, t]        norm2[i, k] = sum_t yhat(k)[t]^2
//
//     weight  [rows, columns]     order [rows, columns], per row the columns by ascending importance
//     inputs  [columns, samples]  outputs [rows, samples] = weight @ inputs
//     numerator, norm2            [rows, columns + 1], written
//
// Everything is contiguous, and `samples` is a multiple of 32 (the caller pads with zeros, which add nothing).
// Nothing is checked here: a column out of range reads foreign memory. The caller,
// trim_export/curves.py, rejects it. Rows are independent, so the result does not depend on `threads`.
TRIM_API void trim_curves(const float* weight, const std::int32_t* order, const float* inputs, const float* outputs,
                          std::int64_t rows, std::int64_t columns, std::int64_t samples, float* numerator,
                          float* norm2, [[maybe_unused]] int threads) {
    const RowCurves row_kernel = best_row_curves();
#pragma omp parallel num_threads(threads)
    {
        std::vector<Partial> partial(static_cast<std::size_t>(columns));
#pragma omp for schedule(dynamic, 8)
        for (std::int64_t row = 0; row < rows; ++row) {
            row_kernel(weight + row * columns, order + row * columns, inputs, outputs + row * samples, columns, samples,
                       partial.data(), numerator + row * (columns + 1), norm2 + row * (columns + 1));
        }
    }
}
