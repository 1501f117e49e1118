// Quality of every row at every number of pruned weights, in one pass over the row.
//
// The quantities are those of TRIM's quality metric (arXiv 2505.16743, the section on the quality metric), which
// compares a row's dense output y with its pruned output. The paper's search recomputes them for one count at a time;
// to have them for all counts at once (the curves) is this project's formulation.

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(_MSC_VER)
#define TRIM_API extern "C" __declspec(dllexport)
#define TRIM_INLINE __forceinline
#define TRIM_RESTRICT __restrict
#else
#define TRIM_API extern "C" __attribute__((visibility("default")))
#define TRIM_INLINE inline __attribute__((always_inline))
#define TRIM_RESTRICT __restrict__
#endif

namespace {

// One row. Weights are added from the most important one on, so that the sums grow from the kept side and the many
// unimportant weights come last; what has been added before step k is the row with its k least important ones pruned.
TRIM_INLINE void row_curves(const float* TRIM_RESTRICT weight, const std::int32_t* TRIM_RESTRICT order,
                            const float* TRIM_RESTRICT inputs, const float* TRIM_RESTRICT output, std::int64_t columns,
                            std::int64_t samples, float* TRIM_RESTRICT pruned_output, float* TRIM_RESTRICT numerator,
                            float* TRIM_RESTRICT norm2) {
    for (std::int64_t t = 0; t < samples; ++t) pruned_output[t] = 0.0f;
    numerator[columns] = norm2[columns] = 0.0f;
    for (std::int64_t k = columns - 1; k >= 0; --k) {
        const std::int64_t column = order[k];
        const float scale = weight[column];
        const float* TRIM_RESTRICT input = inputs + column * samples;
        float dot = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : dot, square)
        for (std::int64_t t = 0; t < samples; ++t) {
            const float value = pruned_output[t] + scale * input[t];
            pruned_output[t] = value;
            dot += value * output[t];
            square += value * value;
        }
        numerator[k] = dot;
        norm2[k] = square;
    }
}

using RowCurves = decltype(&row_curves);

// The same source compiled once per instruction set and chosen when it runs, so that one binary serves every machine.
// Done by hand because `target_clones` needs ifunc (not in musl, not on macOS) and cannot ask for "AVX2 and FMA".
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define TRIM_VARIANT(name, target_features)                                                                           \
    __attribute__((target(target_features))) void name(                                                               \
        const float* weight, const std::int32_t* order, const float* inputs, const float* output,                     \
        std::int64_t columns, std::int64_t samples, float* pruned_output, float* numerator, float* norm2) {           \
        row_curves(weight, order, inputs, output, columns, samples, pruned_output, numerator, norm2);                 \
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
// Everything is contiguous. Nothing is checked here: a column out of range reads foreign memory. The caller,
// trim_export/curves.py, rejects it. Rows are independent, so the result does not depend on `threads`.
TRIM_API void trim_curves(const float* weight, const std::int32_t* order, const float* inputs, const float* outputs,
                          std::int64_t rows, std::int64_t columns, std::int64_t samples, float* numerator,
                          float* norm2, [[maybe_unused]] int threads) {
    const RowCurves row_kernel = best_row_curves();
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> pruned_output(static_cast<std::size_t>(samples));
#pragma omp for schedule(dynamic, 8)
        for (std::int64_t row = 0; row < rows; ++row) {
            row_kernel(weight + row * columns, order + row * columns, inputs, outputs + row * samples, columns, samples,
                       pruned_output.data(), numerator + row * (columns + 1), norm2 + row * (columns + 1));
        }
    }
}
