// The operators of ops_cuda.cu in a library of their own, as operators of the CPU, where their emulation can run.
#include "ops.h"

extern "C" __attribute__((visibility("default"))) trim::ort::Status* RegisterCustomOps(
    trim::ort::SessionOptions* options, const trim::ort::ApiBase* base) {
    using trim::ort::CustomOp;
    static const std::vector<CustomOp> ops = [] {
        std::vector<CustomOp> made;
        trim::ort::add_cuda_ops(made);
        for (CustomOp& op : made) op.provider = [](const CustomOp*) -> const char* { return nullptr; };
        return made;
    }();
    return trim::ort::register_ops(options, base, ops);
}
