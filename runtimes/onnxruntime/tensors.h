// Reading what ONNX Runtime hands over: statuses in, exceptions within, statuses out.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace trim::ort {

struct Failure {
    Status* status;
};

inline void require(Status* status) {
    if (status != nullptr) throw Failure{status};
}

[[noreturn]] inline void refuse(const Api& api, const std::string& message) {
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

inline Tensor read(const Api& api, const Value* value) {
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

inline Tensor read_constant(const Api& api, const KernelInfo* info, std::size_t index, const char* name, int type) {
    int is_constant = 0;
    const Value* value = nullptr;
    require(api.constant(info, index, &is_constant, &value));
    if (!is_constant || value == nullptr) refuse(api, std::string(name) + " is not a constant of the model");
    Tensor tensor = read(api, value);
    if (type != kAnyType && tensor.type != type) refuse(api, std::string(name) + " has the wrong element type");
    return tensor;
}

}  // namespace trim::ort
