// Stands in for a session of ONNX Runtime: hands the operators of ops.cpp whatever a model may say, every constant in
// memory of exactly its size. Built with sanitizers, so that any access outside of it ends the program. Prints a line
// for each node: L (refused when loaded), R (refused when run), or T and the sum of what it computed.
//
// A node is seven int64 (operator, rows, columns, whether it has these attributes, tokens, width of the inputs, number
// of constants), then the constants: type, whether it is one, bytes by which it is misaligned, rank, sides; then its data.
// What ONNX Runtime makes sure of is so here too: data is as long as the sides say.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace trim::ort {

struct Status {
    std::string message;
};
struct Value {
    int type;
    bool constant;
    std::vector<std::int64_t> sides;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* data;
};
struct TypeAndShape {
    const Value& value;
};
struct KernelInfo {
    bool has_attributes;
    std::int64_t rows, columns;
    std::vector<Value> inputs;  // the first is A, of which nothing is known
};
struct KernelContext {
    Value inputs, outputs;
};
struct CustomOpDomain {
    std::vector<const CustomOp*> ops;
};
struct SessionOptions {
    const CustomOpDomain* domain;
};

}  // namespace trim::ort

extern "C" trim::ort::Status* RegisterCustomOps(trim::ort::SessionOptions*, const trim::ort::ApiBase*);
extern "C" std::int32_t trim_native_select_isa(const char*);

namespace {

using namespace trim::ort;

constexpr std::int64_t kMostBytes = 1 << 26;

CustomOpDomain domain;

std::int64_t width_of(int type) {
    switch (type) {
        case kFloat: case kInt32: return 4;
        case kUInt16: case kFloat16: case kBFloat16: return 2;
        case kInt64: return 8;
        default: return 1;
    }
}

Value make(int type, std::vector<std::int64_t> sides, std::int64_t misaligned) {
    std::int64_t bytes = width_of(type);
    for (const std::int64_t side : sides) {
        if (side < 0 || (side > 0 && bytes > kMostBytes / side)) return {type, true, std::move(sides), nullptr, nullptr};
        bytes *= side;
    }
    std::unique_ptr<unsigned char[]> memory(new unsigned char[static_cast<std::size_t>(bytes + misaligned)]());
    unsigned char* const data = memory.get() + misaligned;
    return {type, true, std::move(sides), std::move(memory), data};
}

std::int64_t bytes_of(const Value& value) {
    std::int64_t bytes = width_of(value.type);
    for (const std::int64_t side : value.sides) bytes *= side;
    return bytes;
}

// ---- the entries of the table, each with the type by which it is called ---------------------------------------------

Status* create_status(ErrorCode, const char* message) { return new Status{message}; }
Status* create_domain(const char*, CustomOpDomain** made) { return *made = &domain, nullptr; }
Status* add_op(CustomOpDomain* to, const CustomOp* op) { return to->ops.push_back(op), nullptr; }
Status* add_domain(SessionOptions* options, CustomOpDomain* given) { return options->domain = given, nullptr; }
Status* data(const Value* value, void** data) { return *data = value->data, nullptr; }
Status* element_type(const TypeAndShape* shape, int* type) { return *type = shape->value.type, nullptr; }
Status* rank(const TypeAndShape* shape, std::size_t* rank) { return *rank = shape->value.sides.size(), nullptr; }
Status* sides(const TypeAndShape* shape, std::int64_t* sides, std::size_t rank) {
    if (rank != shape->value.sides.size()) std::abort();
    if (rank) std::memcpy(sides, shape->value.sides.data(), rank * sizeof *sides);
    return nullptr;
}
Status* type_and_shape(const Value* value, TypeAndShape** shape) {
    return *shape = new TypeAndShape{*value}, nullptr;
}
void release(TypeAndShape* shape) { delete shape; }
Status* attribute(const KernelInfo* info, const char* name, std::int64_t* value) {
    if (!info->has_attributes) return new Status{"no such attribute"};
    *value = std::strcmp(name, "rows") == 0 ? info->rows : info->columns;
    return nullptr;
}
Status* input(const KernelContext* context, std::size_t index, const Value** value) {
    if (index != 0) std::abort();
    return *value = &context->inputs, nullptr;
}
Status* output(KernelContext* context, std::size_t, const std::int64_t* sides, std::size_t rank, Value** value) {
    context->outputs = make(kFloat, {sides, sides + rank}, 0);
    if (context->outputs.data == nullptr) return new Status{"no room for the output"};
    return *value = &context->outputs, nullptr;
}
Status* constant(const KernelInfo* info, std::size_t index, int* is_constant, const Value** value) {
    if (index >= info->inputs.size()) std::abort();
    const Value& found = info->inputs[index];
    *is_constant = found.constant;
    *value = found.constant ? &found : nullptr;
    return nullptr;
}
Status* parallel_for(const KernelContext*, void (*work)(void*, std::size_t), std::size_t count, std::size_t,
                     void* task) {
    while (count-- > 0) work(task, count);
    return nullptr;
}

const void* table[275];

template <typename Function>
void put(std::size_t place, Function* function) {
    table[place] = reinterpret_cast<const void*>(function);
}

const void* const* get_api(std::uint32_t) { return table; }
const char* version() { return "1.17.0"; }

// ---- nodes ----------------------------------------------------------------------------------------------------------

bool refused(Status* status) {
    const std::unique_ptr<Status> taken(status);
    if (taken && taken->message.empty()) std::abort();
    return taken != nullptr;
}

void execute(const CustomOp& op, const KernelInfo& info, std::int64_t tokens, std::int64_t width) {
    void* kernel = nullptr;
    if (refused(op.create_kernel_or_fail(&op, table, &info, &kernel))) {
        std::puts("L");
        return;
    }
    KernelContext context{make(kFloat, {tokens, width}, 0), {}};
    float* const inputs = reinterpret_cast<float*>(context.inputs.data);
    for (std::int64_t i = 0; i < tokens * width; ++i) inputs[i] = 0.25f * static_cast<float>(i % 7 - 3);
    const bool failed = refused(op.compute_or_fail(kernel, &context));
    op.destroy(kernel);
    if (failed) {
        std::puts("R");
        return;
    }
    double sum = 0;
    const float* const outputs = reinterpret_cast<const float*>(context.outputs.data);
    for (std::int64_t i = 0; i < bytes_of(context.outputs) / 4; ++i) sum += static_cast<double>(outputs[i]);
    std::printf("T %.9g\n", sum);
}

void take(std::FILE* file, void* to, std::int64_t bytes) {
    if (bytes && std::fread(to, static_cast<std::size_t>(bytes), 1, file) != 1) std::exit(3);
}

}  // namespace

int main(int count, char** words) {
    put(0, create_status), put(26, create_domain), put(27, add_op), put(28, add_domain), put(51, data);
    put(60, element_type), put(61, rank), put(62, sides), put(65, type_and_shape), put(86, attribute), put(90, input);
    put(91, output), put(99, release), put(249, constant), put(274, parallel_for);
    const ApiBase base{get_api, version};
    SessionOptions options{};
    std::FILE* const file = count == 3 ? std::fopen(words[1], "rb") : nullptr;
    if (file == nullptr || trim_native_select_isa(words[2]) != 0 || refused(RegisterCustomOps(&options, &base))) return 2;
    for (std::int64_t head[7]; std::fread(head, sizeof head, 1, file) == 1;) {
        KernelInfo info{head[3] != 0, head[1], head[2], {}};
        info.inputs.push_back({kFloat, false, {}, nullptr, nullptr});
        for (std::int64_t i = 0; i < head[6]; ++i) {
            std::int64_t about[4];
            take(file, about, sizeof about);
            std::vector<std::int64_t> given(static_cast<std::size_t>(about[3]));
            take(file, given.data(), about[3] * 8);
            Value made = make(static_cast<int>(about[0]), std::move(given), about[2]);
            made.constant = about[1] != 0;
            take(file, made.data, bytes_of(made));
            info.inputs.push_back(std::move(made));
        }
        const CustomOp& op = *options.domain->ops.at(static_cast<std::size_t>(head[0]));
        if (op.input_count(&op) != info.inputs.size()) return 4;
        execute(op, info, head[4], head[5]);
    }
    std::fclose(file);
    return 0;
}
