// ONNX Runtime operators of the domain `trim_export`: products with sparse constants, executed by the native engine.
//
//     SparseMatMulBitmap(A, order, mask, values, scales) -> Y      mask    uint8 [groups, words, 32]
//     SparseMatMulSell8(A, order, start, columns, values, scales) -> Y
//                                                                  start   int64 [blocks + 1], columns uint16 [entries]
//     DenseMatMul(A, values, scales) -> Y                          values  [rows, columns], for an LM head
//
// A is float32 [..., columns], Y float32 [..., rows]; order is int32 [rows], values are float32, bfloat16, float16 or
// int8, scales float32 [rows]. All but A are constants in the layout of trim_native.h, in which a sparse matrix is all
// bitmap or all lists; the values of a bitmap have its tail. Attributes: rows, columns.
//
// The file with the constants may come from anybody: sizes are compared with each other when the session is made, and
// the engine checks the rest as it goes. The threads are the session's.
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../native/trim_native.h"
#include "ort_abi.h"

namespace trim::ort {
namespace {

// ---- errors: statuses in, exceptions within, statuses out -------------------------------------------------------

struct Failure {
    Status* status;
};

void require(Status* status) {
    if (status != nullptr) throw Failure{status};
}

[[noreturn]] void refuse(const Api& api, const std::string& message) {
    throw Failure{api.create_status(kInvalidArgument, ("trim_export: " + message).c_str())};
}

template <typename Work>
Status* guarded(const Api& api, const Work& work) {
    try {
        work();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::exception& error) {
        return api.create_status(kFail, error.what());
    }
}

// ---- tensors ----------------------------------------------------------------------------------------------------

struct Tensor {
    const void* data;
    int type;
    std::vector<std::int64_t> sides;

    std::int64_t size() const {
        std::int64_t product = 1;
        for (const std::int64_t side : sides) product *= side;  // of an existing tensor, so it fits
        return product;
    }
};

Tensor read(const Api& api, const Value* value) {
    struct Shape {
        const Api& api;
        TypeAndShape* info = nullptr;
        ~Shape() { if (info != nullptr) api.release(info); }
    } shape{api};
    require(api.type_and_shape(value, &shape.info));
    Tensor tensor{};
    std::size_t rank = 0;
    require(api.rank(shape.info, &rank));
    tensor.sides.resize(rank);
    require(api.sides(shape.info, tensor.sides.data(), rank));
    require(api.element_type(shape.info, &tensor.type));
    void* data = nullptr;
    require(api.data(value, &data));
    tensor.data = data;
    return tensor;
}

Tensor read_constant(const Api& api, const KernelInfo* info, std::size_t index, const char* name, int type) {
    int is_constant = 0;
    const Value* value = nullptr;
    require(api.constant(info, index, &is_constant, &value));
    if (!is_constant || value == nullptr) refuse(api, std::string(name) + " is not a constant of the model");
    Tensor tensor = read(api, value);
    if (type != kAnyType && tensor.type != type) refuse(api, std::string(name) + " has the wrong element type");
    return tensor;
}

// ---- the kernel -------------------------------------------------------------------------------------------------

std::int32_t value_type(const Api& api, int type) {
    switch (type) {
        case kFloat: return TRIM_NATIVE_F32;
        case kBFloat16: return TRIM_NATIVE_BF16;
        case kFloat16: return TRIM_NATIVE_F16;
        case kInt8: return TRIM_NATIVE_I8;
        default: refuse(api, "values are none of float32, bfloat16, float16 and int8");
    }
}

// The session's threads spin for a while before they sleep, so little work is worth calling them for.
constexpr std::int32_t kLeastShare = 20000;

// A matrix W whose arrays belong to the session.
class Kernel {
  public:
    Kernel(const Api& api, const KernelInfo* info) : api_(api) {
        require(api.attribute(info, "rows", &rows_));
        require(api.attribute(info, "columns", &columns_));
    }
    virtual ~Kernel() = default;
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    const Api& api() const { return api_; }

    // The engine's status for so many tokens without gaps; of no tokens, what it has against the matrix.
    virtual std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                                  float* outputs) const = 0;

    void check() const { refuse_status(multiply({1, 1, nullptr, nullptr}, nullptr, 0, nullptr)); }

    void compute(KernelContext* context) const {
        const Value* given = nullptr;
        require(api_.input(context, 0, &given));
        Tensor inputs = read(api_, given);
        if (inputs.sides.empty() || inputs.sides.back() != columns_) {
            refuse(api_, "the input is not " + std::to_string(columns_) + " wide");
        }
        const std::int64_t tokens = inputs.size() / columns_;
        inputs.sides.back() = rows_;
        Value* made = nullptr;
        require(api_.output(context, 0, inputs.sides.data(), inputs.sides.size(), &made));
        void* outputs = nullptr;
        require(api_.data(made, &outputs));
        // How many threads the session has, it does not tell. Several shares for each core, so that none waits long for
        // another that the system has interrupted.
        static const std::int32_t threads = [] {
            const unsigned cores = std::thread::hardware_concurrency();
            return static_cast<std::int32_t>(4 * (cores < 1 ? 1 : cores > 64 ? 64 : cores));
        }();
        Session session{api_, context, nullptr};
        const std::int32_t status = multiply({threads, kLeastShare, run_on_session, &session}, static_cast<const float*>(inputs.data),
                                             tokens, static_cast<float*>(outputs));
        require(session.failure);
        refuse_status(status);
    }

  protected:
    // What every operator has: values and, right behind them, scales.
    void read_values(const KernelInfo* info, std::size_t index, const void** values, std::int64_t* size) {
        const Tensor tensor = read_constant(api_, info, index, "values", kAnyType);
        const Tensor scales = read_constant(api_, info, index + 1, "scales", kFloat);
        value_type_ = value_type(api_, tensor.type);
        *values = tensor.data;
        *size = tensor.size();
        scales_ = static_cast<const float*>(scales.data);
        scales_size_ = scales.size();
    }

    std::int64_t rows_ = 0, columns_ = 0;
    std::int32_t value_type_ = 0;
    const float* scales_ = nullptr;
    std::int64_t scales_size_ = 0;

  private:
    struct Session {
        const Api& api;
        const KernelContext* context;
        Status* failure;
    };

    static void run_on_session(void* context, std::int32_t count, void (*work)(void*, std::int32_t), void* task) {
        struct Job {
            void (*work)(void*, std::int32_t);
            void* task;
        } job{work, task};
        Session& session = *static_cast<Session*>(context);
        const auto run = [](void* given, std::size_t share) {
            const Job& todo = *static_cast<const Job*>(given);
            todo.work(todo.task, static_cast<std::int32_t>(share));
        };
        if (session.failure != nullptr) return;
        session.failure = session.api.parallel_for(session.context, run, static_cast<std::size_t>(count), &job);
    }

    void refuse_status(std::int32_t status) const {
        if (status != TRIM_NATIVE_OK) refuse(api_, trim_native_message(status));
    }

    Api api_;
};

class Sparse : public Kernel {
  public:
    Sparse(const Api& api, const KernelInfo* info) : Kernel(api, info) {
        const Tensor order = read_constant(api, info, 1, "order", kInt32);
        matrix_.rows = rows_;
        matrix_.columns = columns_;
        matrix_.order = static_cast<const std::int32_t*>(order.data);
        matrix_.order_size = order.size();
    }

    std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                          float* outputs) const override {
        return trim_native_linear_on(&pool, &matrix_, inputs, tokens, columns_, outputs, rows_);
    }

  protected:
    void scale() {
        matrix_.value_type = value_type_;
        matrix_.scales = scales_;
        matrix_.scales_size = scales_size_;
    }

    TrimNativeMatrix matrix_{};
};

class Bitmap : public Sparse {
  public:
    static constexpr const char* kName = "SparseMatMulBitmap";
    static constexpr std::size_t kInputs = 5;

    Bitmap(const Api& api, const KernelInfo* info) : Sparse(api, info) {
        const Tensor mask = read_constant(api, info, 2, "mask", kUInt8);
        read_values(info, 3, &matrix_.values, &matrix_.values_size);
        scale();
        const std::int64_t words = columns_ / 64 + (columns_ % 64 != 0);
        if (mask.sides.size() != 3 || mask.sides[1] != words || mask.sides[2] != 32 ||
            reinterpret_cast<std::uintptr_t>(mask.data) % alignof(std::uint64_t)) {
            refuse(api, "the mask is no aligned [groups, words, 32]");
        }
        matrix_.bitmap_rows = rows_;
        matrix_.mask = static_cast<const std::uint64_t*>(mask.data);
        matrix_.mask_size = mask.size() / 8;
        starts_.push_back(0);
        for (std::int64_t group = 0, kept = 0; group < mask.sides[0]; ++group) {
            for (std::int64_t i = 0; i < 4 * words; ++i) kept += __builtin_popcountll(matrix_.mask[4 * words * group + i]);
            starts_.push_back(kept);
        }
        matrix_.group_start = starts_.data();
        matrix_.group_start_size = static_cast<std::int64_t>(starts_.size());
        static const std::int64_t no_lists = 0;
        matrix_.list_start = &no_lists;
        matrix_.list_start_size = 1;
    }

  private:
    std::vector<std::int64_t> starts_;
};

class Sell8 : public Sparse {
  public:
    static constexpr const char* kName = "SparseMatMulSell8";
    static constexpr std::size_t kInputs = 6;

    Sell8(const Api& api, const KernelInfo* info) : Sparse(api, info) {
        const Tensor start = read_constant(api, info, 2, "start", kInt64);
        const Tensor columns = read_constant(api, info, 3, "columns", kUInt16);
        read_values(info, 4, &matrix_.list_values, &matrix_.list_values_size);
        scale();
        matrix_.list_start = static_cast<const std::int64_t*>(start.data);
        matrix_.list_start_size = start.size();
        matrix_.list_columns = static_cast<const std::uint16_t*>(columns.data);
        matrix_.list_columns_size = columns.size();
        static const std::int64_t no_groups = 0;
        alignas(64) static const unsigned char tail[4 * TRIM_NATIVE_TAIL] = {};
        matrix_.group_start = &no_groups;
        matrix_.group_start_size = 1;
        matrix_.values = tail;
        matrix_.values_size = TRIM_NATIVE_TAIL;
    }
};

class Dense : public Kernel {
  public:
    static constexpr const char* kName = "DenseMatMul";
    static constexpr std::size_t kInputs = 3;

    Dense(const Api& api, const KernelInfo* info) : Kernel(api, info) {
        read_values(info, 1, &matrix_.values, &matrix_.values_size);
        matrix_.rows = rows_;
        matrix_.columns = columns_;
        matrix_.value_type = value_type_;
        matrix_.scales = scales_;
        matrix_.scales_size = scales_size_;
    }

    std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                          float* outputs) const override {
        return trim_native_dense_on(&pool, &matrix_, inputs, tokens * columns_, outputs, tokens * rows_);
    }

  private:
    TrimNativeDense matrix_{};
};

// ---- the operators ----------------------------------------------------------------------------------------------

template <typename Op>
Status* create(const CustomOp*, const void* const* table, const KernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        auto made = std::make_unique<Op>(api, info);
        made->check();
        *kernel = static_cast<Kernel*>(made.release());
    });
}

Status* compute(void* kernel, KernelContext* context) {
    const Kernel& ready = *static_cast<const Kernel*>(kernel);
    return guarded(ready.api(), [&] { ready.compute(context); });
}

template <typename Op>
CustomOp describe() {
    CustomOp op{};
    op.version = kOpVersion;
    op.name = [](const CustomOp*) { return Op::kName; };
    op.provider = [](const CustomOp*) -> const char* { return nullptr; };
    // Constants are checked when the kernel is made; "any" lets values have one of several types.
    op.input_type = [](const CustomOp*, std::size_t index) { return index == 0 ? kFloat : kAnyType; };
    op.input_count = [](const CustomOp*) { return Op::kInputs; };
    op.output_type = [](const CustomOp*, std::size_t) { return kFloat; };
    op.output_count = [](const CustomOp*) -> std::size_t { return 1; };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_characteristic = op.output_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
    op.input_memory = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
    op.least_variadic_inputs = op.least_variadic_outputs = [](const CustomOp*) { return 1; };
    op.homogeneous_variadic_inputs = op.homogeneous_variadic_outputs = [](const CustomOp*) { return 1; };
    op.create_kernel_or_fail = create<Op>;
    op.compute_or_fail = compute;
    op.first_version = [](const CustomOp*) { return 1; };
    op.last_version = [](const CustomOp*) { return 1; };
    op.may_inplace = op.alias_map = [](int**, int**) -> std::size_t { return 0; };
    op.release_may_inplace = op.release_alias_map = [](int*, int*) {};
    return op;
}

}  // namespace
}  // namespace trim::ort

// What ONNX Runtime looks up by this name when a session's options register the library.
extern "C" __attribute__((visibility("default"))) trim::ort::Status* RegisterCustomOps(
    trim::ort::SessionOptions* options, const trim::ort::ApiBase* base) {
    using namespace trim::ort;
    const void* const* const table = base->get_api(kTableVersion);
    if (table == nullptr) return nullptr;  // older than the table; it has said so itself, and functions take over
    const Api api(table);
    static const CustomOp ops[] = {describe<Bitmap>(), describe<Sell8>(), describe<Dense>()};
    return guarded(api, [&] {
        CustomOpDomain* domain = nullptr;
        require(api.create_domain("trim_export", &domain));
        for (const CustomOp& op : ops) require(api.add_op(domain, &op));
        require(api.add_domain(options, domain));
    });
}
