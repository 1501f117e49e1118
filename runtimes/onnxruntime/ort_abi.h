// The few entry points of ONNX Runtime's C interface that the operators call, by their documented places.
//
// ONNX Runtime promises that its table of functions only grows (onnxruntime_c_api.h: "functions are never removed or
// reordered"), and gives the table of any earlier version on request. So the places stay right, and no header, which no
// package brings along, is needed. All that is used here exists since version 1.17.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trim::ort {

constexpr std::uint32_t kTableVersion = 17;  // the one asked for
constexpr std::uint32_t kOpVersion = 22;     // of the layout of `CustomOp`: 25 functions

struct Status;  // null is success
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TypeAndShape;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType {
    kAnyType = 0, kFloat = 1, kUInt8 = 2, kInt8 = 3, kUInt16 = 4, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16
};
enum Characteristic { kRequired = 0 };
enum MemoryType { kHostMemory = -2, kDefaultMemory = 0 };  // default: the provider's own

struct ApiBase {
    const void* const* (*get_api)(std::uint32_t version);
    const char* (*version)();
};

// The table, with a name and a type for each place that is used.
class Api {
  public:
    explicit Api(const void* const* table) : table_(table) {}

    Status* create_status(ErrorCode code, const char* message) const {
        return at<Status* (*)(ErrorCode, const char*)>(0)(code, message);
    }
    Status* create_domain(const char* name, CustomOpDomain** domain) const {
        return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, domain);
    }
    Status* add_op(CustomOpDomain* domain, const struct CustomOp* op) const {
        return at<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
    }
    Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
        return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
    }
    Status* data(const Value* value, void** data) const {
        return at<Status* (*)(const Value*, void**)>(51)(value, data);
    }
    Status* element_type(const TypeAndShape* shape, int* type) const {
        return at<Status* (*)(const TypeAndShape*, int*)>(60)(shape, type);
    }
    Status* rank(const TypeAndShape* shape, std::size_t* rank) const {
        return at<Status* (*)(const TypeAndShape*, std::size_t*)>(61)(shape, rank);
    }
    Status* sides(const TypeAndShape* shape, std::int64_t* sides, std::size_t rank) const {
        return at<Status* (*)(const TypeAndShape*, std::int64_t*, std::size_t)>(62)(shape, sides, rank);
    }
    Status* type_and_shape(const Value* value, TypeAndShape** shape) const {
        return at<Status* (*)(const Value*, TypeAndShape**)>(65)(value, shape);
    }
    Status* attribute(const KernelInfo* info, const char* name, std::int64_t* value) const {
        return at<Status* (*)(const KernelInfo*, const char*, std::int64_t*)>(86)(info, name, value);
    }
    Status* input(const KernelContext* context, std::size_t index, const Value** value) const {
        return at<Status* (*)(const KernelContext*, std::size_t, const Value**)>(90)(context, index, value);
    }
    Status* output(KernelContext* context, std::size_t index, const std::int64_t* sides, std::size_t rank,
                   Value** value) const {
        using Function = Status* (*)(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**);
        return at<Function>(91)(context, index, sides, rank, value);
    }
    void release(TypeAndShape* shape) const { at<void (*)(TypeAndShape*)>(99)(shape); }
    Status* gpu_stream(const KernelContext* context, void** stream) const {
        return at<Status* (*)(const KernelContext*, void**)>(193)(context, stream);
    }
    Status* constant(const KernelInfo* info, std::size_t index, int* is_constant, const Value** value) const {
        return at<Status* (*)(const KernelInfo*, std::size_t, int*, const Value**)>(249)(info, index, is_constant,
                                                                                         value);
    }
    Status* parallel_for(const KernelContext* context, void (*work)(void*, std::size_t), std::size_t count,
                         void* task) const {
        using Work = void (*)(void*, std::size_t);
        using Function = Status* (*)(const KernelContext*, Work, std::size_t, std::size_t, void*);
        return at<Function>(274)(context, work, count, count, task);
    }

  private:
    template <typename Function>
    Function at(std::size_t place) const {
        return reinterpret_cast<Function>(const_cast<void*>(table_[place]));
    }

    const void* const* table_;
};

// What describes an operator; every function must be there.
struct CustomOp {
    std::uint32_t version;
    void* (*create_kernel)(const CustomOp*, const void* const* api, const KernelInfo*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);  // null: the CPU
    ElementType (*input_type)(const CustomOp*, std::size_t);
    std::size_t (*input_count)(const CustomOp*);
    ElementType (*output_type)(const CustomOp*, std::size_t);
    std::size_t (*output_count)(const CustomOp*);
    void (*compute)(void* kernel, KernelContext*);
    void (*destroy)(void* kernel);
    Characteristic (*input_characteristic)(const CustomOp*, std::size_t);
    Characteristic (*output_characteristic)(const CustomOp*, std::size_t);
    MemoryType (*input_memory)(const CustomOp*, std::size_t);
    int (*least_variadic_inputs)(const CustomOp*);
    int (*homogeneous_variadic_inputs)(const CustomOp*);
    int (*least_variadic_outputs)(const CustomOp*);
    int (*homogeneous_variadic_outputs)(const CustomOp*);
    Status* (*create_kernel_or_fail)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
    Status* (*compute_or_fail)(void* kernel, KernelContext*);
    Status* (*infer_shape)(const CustomOp*, void*);  // null: shapes are known when the kernel has run
    int (*first_version)(const CustomOp*);
    int (*last_version)(const CustomOp*);
    std::size_t (*may_inplace)(int**, int**);
    void (*release_may_inplace)(int*, int*);
    std::size_t (*alias_map)(int**, int**);
    void (*release_alias_map)(int*, int*);
};

static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "a version and 25 functions");

}  // namespace trim::ort
