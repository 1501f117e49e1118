// What the operators of every execution provider share: how a node is made ready, and how ONNX Runtime is told of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tensors.h"

namespace trim::ort {

// An operator that a session has made ready for one node.
class Kernel {
  public:
    explicit Kernel(const Api& api) : api_(api) {}
    virtual ~Kernel() = default;
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    const Api& api() const { return api_; }
    virtual void compute(KernelContext* context) const = 0;

  protected:
    struct Tokens {
        const void* inputs;
        std::int64_t count;
        void* outputs;
    };

    // A and, of the type of A, room for Y.
    Tokens tokens(KernelContext* context, std::int64_t rows, std::int64_t columns) const {
        const Value* given = nullptr;
        require(api_.input(context, 0, &given));
        Tensor inputs = read(api_, given);
        if (inputs.sides.empty() || inputs.sides.back() != columns) {
            refuse(api_, "the input is not " + std::to_string(columns) + " wide");
        }
        const std::int64_t count = inputs.size() / columns;
        inputs.sides.back() = rows;
        Value* made = nullptr;
        require(api_.output(context, 0, inputs.sides.data(), inputs.sides.size(), &made));
        void* outputs = nullptr;
        require(api_.data(made, &outputs));
        return {inputs.data, count, outputs};
    }

  private:
    Api api_;
};

template <typename Op>
Status* create(const CustomOp*, const void* const* table, const KernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] { *kernel = static_cast<Kernel*>(std::make_unique<Op>(api, info).release()); });
}

inline Status* compute(void* kernel, KernelContext* context) {
    const Kernel& ready = *static_cast<const Kernel*>(kernel);
    return guarded(ready.api(), [&] { ready.compute(context); });
}

// Of an operator that executes `Op::Matrix` on the provider `Op::kProvider` for inputs and outputs of type `Op::kType`,
// with the structure of the matrix in the memory `Op::kStructureMemory`.
template <typename Op>
CustomOp describe() {
    CustomOp op{};
    op.version = kOpVersion;
    op.name = [](const CustomOp*) { return Op::Matrix::kName; };
    op.provider = [](const CustomOp*) -> const char* { return Op::kProvider; };
    // Constants are checked when the kernel is made; "any" lets values have one of several types.
    op.input_type = [](const CustomOp*, std::size_t index) { return index == 0 ? Op::kType : kAnyType; };
    op.input_count = [](const CustomOp*) { return Op::Matrix::kInputs; };
    op.output_type = [](const CustomOp*, std::size_t) { return Op::kType; };
    op.output_count = [](const CustomOp*) -> std::size_t { return 1; };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_characteristic = op.output_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
    op.input_memory = [](const CustomOp*, std::size_t index) {
        return index >= 1 && index <= Op::Matrix::kStructure ? Op::kStructureMemory : kDefaultMemory;
    };
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

// The operators that a library registers in the domain `trim_export`, which outlive its sessions.
inline Status* register_ops(SessionOptions* options, const ApiBase* base, const std::vector<CustomOp>& ops) {
    const void* const* const table = base->get_api(kTableVersion);
    if (table == nullptr) return nullptr;  // older than the table; it has said so itself, and functions take over
    const Api api(table);
    return guarded(api, [&] {
        CustomOpDomain* domain = nullptr;
        require(api.create_domain("trim_export", &domain));
        for (const CustomOp& op : ops) require(api.add_op(domain, &op));
        require(api.add_domain(options, domain));
    });
}

// Appends the operators of the CUDA execution provider to those of the CPU. A registered name shadows the functions of
// a model, so that a library has to have the operators of every provider that a session may use.
void add_cuda_ops(std::vector<CustomOp>& ops);

}  // namespace trim::ort
