// ONNX Runtime operators of the domain `trim_export`: products with sparse constants, executed by the native engine.
//
//     SparseMatMulBitmap(A, order, mask, values, scales) -> Y      mask    uint8 [groups, words, 32]
//     SparseMatMulCsr(A, gaps, values, scales) -> Y                gaps    uint8 [entries]
//     DenseMatMul(A, values, scales) -> Y                          values  [rows, columns], for an LM head
//
// A is float32 [..., columns], Y float32 [..., rows]; order is int32 [rows], values are float32, bfloat16, float16 or
// int8, scales float32 [rows]. All but A are constants: a bitmap in the layout of trim_native.h, its values with their
// tail; or gaps, how many zeros there are before each value, row after row. Attributes: rows, columns.
//
// The file with the constants may come from anybody: sizes, order and gaps are checked when the session is made, and
// the engine checks the rest as it goes. The threads are the session's.
#include <thread>

#include "constants.h"
#include "ops.h"

namespace trim::ort {
namespace {

// The session's threads spin for a while before they sleep, so little work is worth calling them for.
constexpr std::int32_t kLeastShare = 20000;

template <typename Constants>
class CpuKernel : public Kernel {
  public:
    using Matrix = Constants;
    static constexpr const char* kProvider = nullptr;
    static constexpr ElementType kType = kFloat;
    static constexpr MemoryType kStructureMemory = kDefaultMemory;

    CpuKernel(const Api& api, const KernelInfo* info) : Kernel(api), matrix_(api, info) {
        matrix_.check();
        matrix_.check_contents();
        matrix_.prepare();
    }

    void compute(KernelContext* context) const override {
        const Tokens given = tokens(context, matrix_.rows(), matrix_.columns());
        // How many threads the session has, it does not tell. Several shares for each core, so that none waits long for
        // another that the system has interrupted.
        static const std::int32_t threads = [] {
            const unsigned cores = std::thread::hardware_concurrency();
            return static_cast<std::int32_t>(4 * (cores < 1 ? 1 : cores > 64 ? 64 : cores));
        }();
        Session session{api(), context, nullptr};
        const std::int32_t status =
            matrix_.multiply({threads, kLeastShare, run_on_session, &session}, static_cast<const float*>(given.inputs),
                             given.count, static_cast<float*>(given.outputs));
        require(session.failure);
        matrix_.refuse_status(status);
    }

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

    Matrix matrix_;
};

std::vector<CustomOp> all_ops() {
    std::vector<CustomOp> ops{describe<CpuKernel<Bitmap>>(), describe<CpuKernel<Csr>>(),
                              describe<CpuKernel<Dense>>()};
#ifdef TRIM_EXPORT_CUDA
    add_cuda_ops(ops);
#endif
    return ops;
}

}  // namespace
}  // namespace trim::ort

// What ONNX Runtime looks up by this name when a session's options register the library.
extern "C" __attribute__((visibility("default"))) trim::ort::Status* RegisterCustomOps(
    trim::ort::SessionOptions* options, const trim::ort::ApiBase* base) {
    static const std::vector<trim::ort::CustomOp> ops = trim::ort::all_ops();
    return trim::ort::register_ops(options, base, ops);
}
