// The C interface: checks every argument, picks the instruction set, and shares the work among threads.

#include "trim_native.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "checks.h"
#include "integers.h"
#include "kernels.h"

namespace trim {
namespace {

// ---- instruction sets -------------------------------------------------------------------------------------------

struct Candidate {
    const Kernels* kernels;
    bool supported;
};

// Best first. What is not compiled in is null.
void list_candidates(Candidate (&candidates)[3]) {
    candidates[0] = candidates[1] = {nullptr, false};
    candidates[2] = {&portable_kernels, true};
#ifdef TRIM_NATIVE_AVX2
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    candidates[1] = {&avx2_kernels, avx2};
#ifdef TRIM_NATIVE_AVX512
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
    candidates[0] = {&avx512_kernels, avx2 && avx512};
#endif
#endif
}

const Kernels* best_kernels() {
    Candidate candidates[3];
    list_candidates(candidates);
    const Candidate* candidate = candidates;
    while (!candidate->supported) ++candidate;
    return candidate->kernels;
}

std::atomic<const Kernels*> kernels_in_use{best_kernels()};

// ---- checks -----------------------------------------------------------------------------------------------------

constexpr std::int32_t kMostThreads = 4096;
constexpr std::int64_t kValueBytes[] = {4, 2, 2, 1};

bool aligned(const void* array, std::int64_t bytes) {
    return array != nullptr && reinterpret_cast<std::uintptr_t>(array) % static_cast<std::uintptr_t>(bytes) == 0;
}

// An array of so many elements; null will do for none.
bool fits(const void* array, std::int64_t size, std::int64_t wanted, std::int64_t bytes) {
    return size == wanted && (wanted == 0 || aligned(array, bytes));
}

// Whether every window of a block has as many steps, and none too many.
bool are_slots(const Matrix& matrix, std::int64_t steps, Windows windows) {
    if (!rises(matrix.slot_start, matrix.blocks, steps)) return false;
    for (std::int64_t block = 0, sound = 0; block < matrix.blocks; ++block) {
        const std::int64_t size = matrix.slot_start[block + 1] - matrix.slot_start[block];
        if (size == sound) continue;  // rows are sorted, so that most blocks are like the one before
        std::int64_t left = size;
        for (std::int64_t step = 0; step < windows.columns && left > 0; step += windows.unit) {
            left -= matrix.windows * windows.unit;
        }
        if (left != 0) return false;
        sound = size;
    }
    return true;
}

bool scales_fit(const float* scales, std::int64_t size, std::int64_t rows, std::int32_t value_type) {
    return scales == nullptr ? value_type != TRIM_NATIVE_I8 : fits(scales, size, rows, 4);
}

// Fills in `matrix`, whose arrays then have the sizes that the kernels rely on.
std::int32_t check(const TrimNativeMatrix& given, Matrix& matrix) {
    if (!is_matrix(given.rows, given.columns, given.value_type) || given.bitmap_rows < 0 ||
        given.bitmap_rows > given.rows || (given.bitmap_rows < given.rows && given.bitmap_rows % kGroupRows)) {
        return TRIM_NATIVE_NO_MATRIX;
    }
    const bool integers = given.value_type == TRIM_NATIVE_I8;
    const Windows windows = windows_of(given.value_type);
    matrix = {given.rows, given.columns, divide_up(given.columns, kWordColumns),
              divide_up(given.columns, windows.columns), given.order,
              divide_up(given.bitmap_rows, kGroupRows), given.mask,
              given.group_start, given.values, divide_up(given.rows - given.bitmap_rows, kBlockRows), given.slot_start,
              given.slot_columns, given.slot_values, given.list_start, given.list_columns, given.list_values,
              given.scales};
    const std::int64_t value_bytes = kValueBytes[given.value_type];
    if (!fits(given.order, given.order_size, matrix.rows, 4) ||
        !fits(given.mask, given.mask_size, matrix.groups * matrix.words * kGroupRows, 8) ||
        !fits(given.group_start, given.group_start_size, matrix.groups + 1, 8) ||
        !fits(given.slot_start, given.slot_start_size, given.slot_start == nullptr ? 0 : matrix.blocks + 1, 8) ||
        given.slot_columns_size > std::numeric_limits<std::int64_t>::max() / kBlockRows ||
        !fits(given.slot_columns, given.slot_columns_size, given.slot_columns_size, 4) ||
        !fits(given.slot_values, given.slot_values_size, given.slot_columns_size * kBlockRows, value_bytes) ||
        !fits(given.list_start, given.list_start_size, matrix.blocks + 1, 8) ||
        given.values_size < TRIM_NATIVE_TAIL || !aligned(given.values, value_bytes) ||
        !fits(given.list_columns, given.list_columns_size, given.list_columns_size, 2) ||
        !fits(given.list_values, given.list_values_size, given.list_columns_size, value_bytes) ||
        !scales_fit(given.scales, given.scales_size, given.rows, given.value_type) ||
        (given.input_scales != nullptr && !fits(given.input_scales, given.input_scales_size, given.columns, 4))) {
        return TRIM_NATIVE_BAD_SIZE;
    }
    if (integers ? given.input_limit < 2 || given.input_limit > kMostInput
                 : given.input_limit != 0 || given.input_scales != nullptr) {
        return TRIM_NATIVE_BAD_LIMIT;
    }
    if (!below(matrix.order, matrix.rows, matrix.rows)) return TRIM_NATIVE_BAD_ORDER;
    if (!rises(matrix.group_start, matrix.groups, given.values_size - TRIM_NATIVE_TAIL)) return TRIM_NATIVE_BAD_MASK;
    if (given.slot_start == nullptr ? given.slot_columns_size != 0
                                    : !are_slots(matrix, given.slot_columns_size, windows)) {
        return TRIM_NATIVE_BAD_MASK;
    }
    const bool lists = rises(matrix.list_start, matrix.blocks, given.list_columns_size) &&
                       multiples(matrix.list_start, matrix.blocks + 1, 2 * kBlockRows);
    return lists ? TRIM_NATIVE_OK : TRIM_NATIVE_BAD_MASK;
}

// ---- threads ----------------------------------------------------------------------------------------------------

// What a share must at least be, in listed weights, for a thread of OpenMP to pay. Threads that wait for work are there
// within some microseconds; to wake one that sleeps was seen to take about 50.
constexpr std::int32_t kLeastShare = 8000, kLeastShareOfSleepers = 150000;

// Whether OpenMP sends threads to sleep as soon as there is nothing to do. It does so only when told to.
bool threads_sleep() {
    static const bool sleep = [] {
        const char* const policy = std::getenv("OMP_WAIT_POLICY");
        return policy != nullptr && (policy[0] == 'p' || policy[0] == 'P');  // "passive", in any case
    }();
    return sleep;
}

// What there is to do costs, in listed weights: of a bitmap each column, kept or not, and each kept one besides; each step
// of slots.
struct Cost { double column, kept, step; };
constexpr Cost kDecodeCost = {0.3, 0.1, 4}, kDecodeQuadsCost = {0.3, 0.1, 1};
constexpr Cost kBatchCost = {0.05, 1.0, 5};

// The groups and blocks of a matrix, in this order, divided among threads.
class Shares {
  public:
    Shares(const Matrix& matrix, Cost cost, double tokens, const TrimNativePool& pool)
        : matrix_(matrix), kept_(cost.kept), step_(cost.step),
          group_(cost.column * static_cast<double>(kGroupRows * matrix.columns)),
          units_(matrix.groups + matrix.blocks), count_(thread_count(total() * tokens, pool)) {}

    static std::int32_t thread_count(double cost, const TrimNativePool& pool) {
        const double most = cost / pool.least_share;
        return most < 1 ? 1 : most < pool.threads ? static_cast<std::int32_t>(most) : pool.threads;
    }

    std::int32_t count() const { return count_; }

    // Shares are contiguous and cost about the same; which one a row falls into does not change its result.
    Span groups(std::int32_t share) const {
        return {first_before(share, matrix_.groups), first_before(share + 1, matrix_.groups)};
    }
    Span blocks(std::int32_t share) const {
        const std::int64_t first = first_unit(share), last = first_unit(share + 1);
        return {first < matrix_.groups ? 0 : first - matrix_.groups, last < matrix_.groups ? 0 : last - matrix_.groups};
    }

  private:
    double cost_before(std::int64_t unit) const {
        const std::int64_t group = unit < matrix_.groups ? unit : matrix_.groups;
        return kept_ * static_cast<double>(matrix_.group_start[group]) + group_ * static_cast<double>(group) +
               static_cast<double>(matrix_.list_start[unit - group]) +
               step_ * static_cast<double>(steps_before(unit - group));
    }
    std::int64_t steps_before(std::int64_t block) const {
        return matrix_.slot_start == nullptr ? 0 : matrix_.slot_start[block];
    }
    double total() const { return cost_before(units_); }

    std::int64_t first_unit(std::int32_t share) const {
        if (share == count_) return units_;
        const double goal = total() * share / count_;
        std::int64_t low = 0, high = units_;
        while (low < high) {
            const std::int64_t middle = low + (high - low) / 2;
            if (cost_before(middle) < goal) low = middle + 1; else high = middle;
        }
        return low;
    }
    std::int64_t first_before(std::int32_t share, std::int64_t most) const {
        const std::int64_t unit = first_unit(share);
        return unit < most ? unit : most;
    }

    const Matrix& matrix_;
    double kept_, step_, group_;
    std::int64_t units_;
    std::int32_t count_;
};

// Shares for each thread of OpenMP: one that wakes late, or is interrupted, leaves its shares to the others.
constexpr std::int32_t kSharesOfThread = 4;
constexpr std::int32_t kMostShares = kMostThreads * kSharesOfThread;

// The threads of OpenMP, if it is there; none where there cannot be so many.
TrimNativePool own_threads(std::int32_t& threads) {
    if (threads < 1 || threads > kMostThreads) return {0, 0, nullptr, nullptr};
    return {threads == 1 ? 1 : threads * kSharesOfThread, threads_sleep() ? kLeastShareOfSleepers : kLeastShare,
            [](void* context, std::int32_t count, void (*work)(void*, std::int32_t), void* task) {
                [[maybe_unused]] const std::int32_t most = *static_cast<std::int32_t*>(context);
#pragma omp parallel for num_threads(count < most ? count : most) schedule(dynamic, 1)  // or one after the other
                for (std::int32_t share = 0; share < count; ++share) work(task, share);
            },
            &threads};
}

// Runs work(0), ..., work(count - 1) on the threads of the pool; whether all returned true.
template <typename Work>
bool run(const TrimNativePool& pool, std::int32_t count, const Work& work) {
    if (count == 1) return work(0);
    struct Task {
        const Work& work;
        std::atomic<bool> good;
    } task{work, {true}};
    pool.run(
        pool.context, count,
        [](void* given, std::int32_t share) {
            Task& todo = *static_cast<Task*>(given);
            if (!todo.work(share)) todo.good.store(false, std::memory_order_relaxed);
        },
        &task);
    return task.good;
}

// ---- scratch ----------------------------------------------------------------------------------------------------

constexpr std::size_t kAlignment = 64;

struct FreeAligned {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
};

using Scratch = std::unique_ptr<void, FreeAligned>;

Scratch allocate(std::size_t bytes) {
    return Scratch(::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow));
}

enum class Use { kProduct, kIntegers };

// Floats of this thread, kept for its next call: looking up a page takes longer than a small matrix.
template <Use>
float* reserve(std::int64_t count) {
    thread_local Scratch memory;
    thread_local std::int64_t size = 0;
    if (size < count) {
        memory = allocate(static_cast<std::size_t>(count) * sizeof(float));
        size = memory ? count : 0;
    }
    return static_cast<float*>(memory.get());
}

std::size_t round_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// ---- a few tokens -----------------------------------------------------------------------------------------------

// Tokens one by one, but a group or block of rows at a time.
std::int32_t multiply_few(const Matrix& matrix, const Decode& kernel, Cost cost, const float* inputs,
                          std::int64_t tokens, std::int64_t input_stride, float* outputs, std::int64_t output_stride,
                          const TrimNativePool& pool) {
    const std::int64_t bitmap_floats = matrix.groups ? matrix.words * kWordColumns : 0;
    const std::int64_t input_floats = bitmap_floats + (matrix.blocks ? block_floats(matrix) : 0);
    constexpr std::int64_t kLineFloats = 16;
    const std::int64_t rows = matrix.groups * kGroupRows + matrix.blocks * kBlockRows;
    const std::int64_t places = divide_up(rows, kLineFloats) * kLineFloats;
    const std::int64_t all = input_floats + places;
    float* const memory = reserve<Use::kProduct>(all * tokens);
    if (memory == nullptr) return TRIM_NATIVE_NO_MEMORY;
    for (std::int64_t t = 0; t < tokens; ++t) {
        const float* const x = inputs + t * input_stride;
        float* const arranged = memory + t * all;
        if (matrix.groups) kernel.for_bitmap(x, matrix, arranged);
        if (matrix.blocks) kernel.for_blocks(x, matrix, arranged + bitmap_floats);
    }
    const auto multiply = [&](Span groups, Span blocks, std::int64_t t) {
        const float* const arranged = memory + t * all;
        float* const totals = memory + t * all + input_floats;
        kernel.blocks(matrix, blocks, arranged + bitmap_floats, totals);
        return kernel.bitmap(matrix, groups, arranged, totals);
    };
    const Shares shares(matrix, cost, static_cast<double>(tokens), pool);
    const bool good = run(pool, shares.count(), [&](std::int32_t share) {
        const Span groups = shares.groups(share), blocks = shares.blocks(share);
        if (tokens == 1) return multiply(groups, blocks, 0);
        bool all_good = true;
        for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
            for (std::int64_t t = 0; t < tokens; ++t) multiply({0, 0}, {block, block + 1}, t);
        }
        for (std::int64_t group = groups.first; group < groups.last; ++group) {
            for (std::int64_t t = 0; t < tokens; ++t) all_good = multiply({group, group + 1}, {0, 0}, t) && all_good;
        }
        return all_good;
    });
    if (!good) return TRIM_NATIVE_BAD_MASK;
    for (std::int64_t t = 0; t < tokens; ++t) {
        const float* const totals = memory + t * all + input_floats;
        float* const y = outputs + t * output_stride;
        std::memset(y, 0, static_cast<std::size_t>(matrix.rows) * sizeof(float));  // an order may leave rows out
        for (std::int64_t place = 0; place < matrix.rows; ++place) {
            const std::int32_t row = matrix.order[place];
            y[row] = matrix.scales ? totals[place] * matrix.scales[row] : totals[place];
        }
    }
    return TRIM_NATIVE_OK;
}

// ---- several tokens ---------------------------------------------------------------------------------------------

// Tokens for which weights are decoded once. More would take more scratch space and gain little.
constexpr std::int64_t kChunkTokens = 256;

// Calls visit(first token, tokens, tokens that there is room for) for each panel.
template <typename Visit>
void for_each_panel(std::int64_t tokens, const Batch& kernel, const Visit& visit) {
    const std::int64_t vectors = divide_up(tokens, kernel.lanes);
    for (std::int64_t v = 0, width; v < vectors; v += width) {
        width = panel_width(vectors - v, kernel.widest);
        const std::int64_t first = v * kernel.lanes, wide = width * kernel.lanes;
        visit(first, first + wide < tokens ? wide : tokens - first, wide);
    }
}

// Words first..last-1 of all tokens into panels.
void pack_inputs(const Matrix& matrix, Span words, const float* inputs, std::int64_t tokens, std::int64_t stride,
                 const Batch& kernel, float* packed) {
    const std::int64_t padded = matrix.words * kWordColumns;
    for_each_panel(tokens, kernel, [&](std::int64_t first, std::int64_t count, std::int64_t wide) {
        float* const panel = packed + first * padded;
        for (std::int64_t word = words.first; word < words.last; ++word) {
            const std::int64_t begin = word * kWordColumns;
            const std::int64_t end = begin + kWordColumns < matrix.columns ? begin + kWordColumns : matrix.columns;
            if (count < wide || end - begin < kWordColumns) {
                std::memset(panel + begin * wide, 0, static_cast<std::size_t>(kWordColumns * wide) * sizeof(float));
            }
            for (std::int64_t t = 0; t < count; ++t) {
                const float* token = inputs + (first + t) * stride;
                for (std::int64_t j = begin; j < end; ++j) panel[j * wide + t] = token[j];
            }
        }
    });
}

// Rows first..last-1 of all tokens out of panels.
void unpack_outputs(const Matrix& matrix, Span rows, const float* packed, std::int64_t tokens, std::int64_t stride,
                    const Batch& kernel, float* outputs) {
    constexpr std::int64_t kRowsAtATime = 16;  // one cache line of outputs
    for_each_panel(tokens, kernel, [&](std::int64_t first, std::int64_t count, std::int64_t wide) {
        const float* const panel = packed + first * matrix.rows;
        for (std::int64_t top = rows.first; top < rows.last; top += kRowsAtATime) {
            const std::int64_t bottom = top + kRowsAtATime < rows.last ? top + kRowsAtATime : rows.last;
            for (std::int64_t t = 0; t < count; ++t) {
                float* token = outputs + (first + t) * stride;
                for (std::int64_t row = top; row < bottom; ++row) {
                    token[row] = panel[row * wide + t] * (matrix.scales ? matrix.scales[row] : 1.0f);
                }
            }
        }
    });
}

Span part(std::int64_t total, std::int32_t share, std::int32_t count) {
    return {total * share / count, total * (share + 1) / count};
}

// Threads for moving so many floats in or out of panels; each takes about as long as two listed weights.
std::int32_t packing_threads(std::int64_t floats, const TrimNativePool& pool) {
    return Shares::thread_count(2.0 * static_cast<double>(floats), pool);
}

std::int32_t multiply_chunk(const Matrix& matrix, const Batch& kernel, const float* inputs, std::int64_t tokens,
                            std::int64_t input_stride, float* outputs, std::int64_t output_stride,
                            const TrimNativePool& pool) {
    const Shares shares(matrix, kBatchCost, static_cast<double>(tokens), pool);
    const std::int32_t count = shares.count();
    const std::int64_t vectors = divide_up(tokens, kernel.lanes);
    const std::size_t token_bytes = static_cast<std::size_t>(vectors * kernel.lanes) * sizeof(float);
    const std::size_t input_bytes = round_up(static_cast<std::size_t>(matrix.words * kWordColumns) * token_bytes);
    const std::size_t output_bytes = round_up(static_cast<std::size_t>(matrix.rows) * token_bytes);
    const std::size_t tile_bytes = round_up(kernel.scratch_bytes);
    char* const memory = reinterpret_cast<char*>(
        reserve<Use::kProduct>(static_cast<std::int64_t>(
            (input_bytes + output_bytes + tile_bytes * static_cast<std::size_t>(count)) / sizeof(float))));
    if (memory == nullptr) return TRIM_NATIVE_NO_MEMORY;
    float* const packed_inputs = reinterpret_cast<float*>(memory);
    float* const packed_outputs = reinterpret_cast<float*>(memory + input_bytes);
    char* const tiles = memory + input_bytes + output_bytes;

    const std::int32_t packers = packing_threads(tokens * matrix.columns, pool);
    run(pool, packers, [&](std::int32_t share) {
        pack_inputs(matrix, part(matrix.words, share, packers), inputs, tokens, input_stride, kernel, packed_inputs);
        const Span bytes = part(static_cast<std::int64_t>(output_bytes), share, packers);
        std::memset(memory + input_bytes + bytes.first, 0, static_cast<std::size_t>(length(bytes)));
        return true;
    });
    const bool good = run(pool, count, [&](std::int32_t share) {
        void* const tile = tiles + tile_bytes * static_cast<std::size_t>(share);
        return kernel.bitmap(matrix, shares.groups(share), packed_inputs, packed_outputs, vectors, tile) &&
               kernel.blocks(matrix, shares.blocks(share), packed_inputs, packed_outputs, vectors, tile);
    });
    if (!good) return TRIM_NATIVE_BAD_MASK;
    const std::int32_t unpackers = packing_threads(tokens * matrix.rows, pool);
    run(pool, unpackers, [&](std::int32_t share) {
        unpack_outputs(matrix, part(matrix.rows, share, unpackers), packed_outputs, tokens, output_stride, kernel,
                       outputs);
        return true;
    });
    return TRIM_NATIVE_OK;
}

// ---- any tokens -------------------------------------------------------------------------------------------------

// Tokens whose inputs are taken as they are; `few` of them are multiplied one by one.
std::int32_t multiply(const Matrix& matrix, const Kernels& kernels, std::int32_t value_type, bool few,
                      const float* inputs, std::int64_t tokens, std::int64_t input_stride, float* outputs,
                      std::int64_t output_stride, const TrimNativePool& pool) {
    const Cost cost = value_type == TRIM_NATIVE_I8 ? kDecodeQuadsCost : kDecodeCost;
    return few ? multiply_few(matrix, kernels.decode[value_type], cost, inputs, tokens, input_stride, outputs,
                              output_stride, pool)
               : multiply_chunk(matrix, kernels.batch[value_type], inputs, tokens, input_stride, outputs,
                                output_stride, pool);
}

// The same with inputs that are first scaled and rounded as the matrix demands.
std::int32_t multiply_rounded(const TrimNativeMatrix& given, const Matrix& matrix, const Kernels& kernels, bool few,
                              const float* inputs, std::int64_t tokens, std::int64_t input_stride, float* outputs,
                              std::int64_t output_stride, const TrimNativePool& pool) {
    float* const rounded = reserve<Use::kIntegers>(tokens * (matrix.columns + 1));
    if (rounded == nullptr) return TRIM_NATIVE_NO_MEMORY;
    float* const factors = rounded + tokens * matrix.columns;
    const auto for_each_token = [&](std::int64_t floats, const auto& work) {
        const std::int32_t count = packing_threads(tokens * floats, pool);
        run(pool, count, [&](std::int32_t share) {
            const Span some = part(tokens, share, count);
            for (std::int64_t t = some.first; t < some.last; ++t) work(t);
            return true;
        });
    };
    for_each_token(matrix.columns, [&](std::int64_t t) {
        factors[t] = kernels.round_token(inputs + t * input_stride, matrix.columns, given.input_scales, given.input_limit,
                                 rounded + t * matrix.columns);
    });
    const std::int32_t status = multiply(matrix, kernels, given.value_type, few, rounded, tokens, matrix.columns,
                                         outputs, output_stride, pool);
    if (status) return status;
    for_each_token(matrix.rows, [&](std::int64_t t) {
        float* const y = outputs + t * output_stride;
        for (std::int64_t row = 0; row < matrix.rows; ++row) y[row] *= factors[t];
    });
    return TRIM_NATIVE_OK;
}

}  // namespace
}  // namespace trim

// ---- the interface ----------------------------------------------------------------------------------------------

std::int32_t trim_native_linear(const TrimNativeMatrix* matrix, const float* inputs, std::int64_t tokens,
                                std::int64_t input_stride, float* outputs, std::int64_t output_stride,
                                std::int32_t threads) {
    const TrimNativePool pool = trim::own_threads(threads);
    return trim_native_linear_on(&pool, matrix, inputs, tokens, input_stride, outputs, output_stride);
}

std::int32_t trim_native_linear_on(const TrimNativePool* pool, const TrimNativeMatrix* matrix, const float* inputs,
                                   std::int64_t tokens, std::int64_t input_stride, float* outputs,
                                   std::int64_t output_stride) {
    using namespace trim;
    if (matrix == nullptr) return TRIM_NATIVE_NO_MATRIX;
    Matrix checked;
    if (const std::int32_t status = check(*matrix, checked)) return status;
    if (tokens < 0 || tokens > kMostSide || input_stride < checked.columns || output_stride < checked.rows) {
        return TRIM_NATIVE_BAD_INPUTS;
    }
    if (pool == nullptr || pool->threads < 1 || pool->threads > kMostShares) return TRIM_NATIVE_BAD_THREADS;
    if (tokens == 0) return TRIM_NATIVE_OK;
    if (!aligned(inputs, sizeof(float)) || !aligned(outputs, sizeof(float))) return TRIM_NATIVE_BAD_INPUTS;
    const Kernels& kernels = *kernels_in_use.load(std::memory_order_relaxed);
    const bool few = tokens <= kernels.few_tokens[matrix->value_type];
    for (std::int64_t first = 0; first < tokens; first += kChunkTokens) {
        const std::int64_t some = first + kChunkTokens < tokens ? kChunkTokens : tokens - first;
        const float* const x = inputs + first * input_stride;
        float* const y = outputs + first * output_stride;
        const std::int32_t status =
            matrix->input_limit
                ? multiply_rounded(*matrix, checked, kernels, few, x, some, input_stride, y, output_stride, *pool)
                : multiply(checked, kernels, matrix->value_type, few, x, some, input_stride, y, output_stride, *pool);
        if (status) return status;
    }
    return TRIM_NATIVE_OK;
}

std::int32_t trim_native_dense(const TrimNativeDense* matrix, const float* inputs, std::int64_t inputs_size,
                               float* outputs, std::int64_t outputs_size, std::int32_t threads) {
    const TrimNativePool pool = trim::own_threads(threads);
    return trim_native_dense_on(&pool, matrix, inputs, inputs_size, outputs, outputs_size);
}

std::int32_t trim_native_dense_on(const TrimNativePool* pool, const TrimNativeDense* matrix, const float* inputs,
                                  std::int64_t inputs_size, float* outputs, std::int64_t outputs_size) {
    using namespace trim;
    if (matrix == nullptr || !is_matrix(matrix->rows, matrix->columns, matrix->value_type)) return TRIM_NATIVE_NO_MATRIX;
    if (!fits(matrix->values, matrix->values_size, matrix->rows * matrix->columns, kValueBytes[matrix->value_type]) ||
        !scales_fit(matrix->scales, matrix->scales_size, matrix->rows, matrix->value_type)) {
        return TRIM_NATIVE_BAD_SIZE;
    }
    const std::int64_t tokens = inputs_size / matrix->columns;
    if (tokens < 0 || tokens > kMostSide || !fits(inputs, inputs_size, tokens * matrix->columns, sizeof(float)) ||
        !fits(outputs, outputs_size, tokens * matrix->rows, sizeof(float))) {
        return TRIM_NATIVE_BAD_INPUTS;
    }
    if (pool == nullptr || pool->threads < 1 || pool->threads > kMostShares) return TRIM_NATIVE_BAD_THREADS;
    const DenseMatrix checked{matrix->rows, matrix->columns, matrix->values, matrix->scales};
    const Decode& kernel = kernels_in_use.load(std::memory_order_relaxed)->decode[matrix->value_type];
    const double cost = kDecodeCost.column * static_cast<double>(matrix->rows * matrix->columns);
    const std::int32_t count = Shares::thread_count(cost * static_cast<double>(tokens), *pool);
    run(*pool, count, [&](std::int32_t share) {
        const Span rows = part(checked.rows, share, count);
        if (tokens == 1) {
            kernel.dense(checked, rows, inputs, outputs);
            return true;
        }
        // Rows that stay in the nearest cache while all tokens pass by.
        const std::int64_t cached = 2 * divide_up(8192, checked.columns * kValueBytes[matrix->value_type]);
        for (Span some{rows.first, rows.first}; some.first < rows.last; some.first = some.last) {
            some.last = some.first + cached < rows.last ? some.first + cached : rows.last;
            kernel.dense_tokens(checked, some, inputs, tokens, outputs);
        }
        return true;
    });
    return TRIM_NATIVE_OK;
}

std::int32_t trim_native_input_limit(std::int64_t most, std::int32_t as_floats) {
    return trim::input_limit(most < 1 ? 1 : most, as_floats != 0);
}

double trim_native_step_cost(std::int32_t value_type) {
    const bool known = value_type >= TRIM_NATIVE_F32 && value_type <= TRIM_NATIVE_I8;
    return known ? trim::kernels_in_use.load(std::memory_order_relaxed)->step_cost[value_type]
                 : std::numeric_limits<double>::infinity();
}

const char* trim_native_isa() { return trim::kernels_in_use.load(std::memory_order_relaxed)->name; }

std::int32_t trim_native_select_isa(const char* name) {
    using namespace trim;
    if (name == nullptr) {
        kernels_in_use.store(best_kernels(), std::memory_order_relaxed);
        return TRIM_NATIVE_OK;
    }
    Candidate candidates[3];
    list_candidates(candidates);
    for (const Candidate& candidate : candidates) {
        if (candidate.kernels == nullptr || std::strcmp(candidate.kernels->name, name) != 0) continue;
        if (!candidate.supported) return TRIM_NATIVE_LACKS_ISA;
        kernels_in_use.store(candidate.kernels, std::memory_order_relaxed);
        return TRIM_NATIVE_OK;
    }
    return TRIM_NATIVE_UNKNOWN_ISA;
}

const char* trim_native_message(std::int32_t status) {
    switch (status) {
        case TRIM_NATIVE_OK: return "all is well";
        case TRIM_NATIVE_NO_MATRIX: return "the matrix has no rows, no columns, too many of them, or an unknown type";
        case TRIM_NATIVE_BAD_SIZE: return "an array of the matrix is missing, misaligned or of the wrong length";
        case TRIM_NATIVE_BAD_ORDER: return "the order names a row that does not exist";
        case TRIM_NATIVE_BAD_MASK: return "mask or lists of the matrix, their starts and values disagree";
        case TRIM_NATIVE_BAD_INPUTS: return "inputs or outputs are missing, too many or their rows overlap";
        case TRIM_NATIVE_BAD_THREADS: return "the number of threads is not between 1 and 4096";
        case TRIM_NATIVE_NO_MEMORY: return "there is no memory for the scratch space";
        case TRIM_NATIVE_UNKNOWN_ISA: return "this build has no such instruction set";
        case TRIM_NATIVE_LACKS_ISA: return "this processor lacks the instruction set";
        case TRIM_NATIVE_BAD_LIMIT:
            return "the limit of inputs is not between 2 and 32767, or other values than 8-bit ones have one";
        default: return "an unknown status";
    }
}
