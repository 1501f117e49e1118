// The operators of ops.cpp on the CUDA execution provider, for A and Y of float32 or float16. (On the CPU, which has
// them for float32 alone, ONNX Runtime casts around them.)
//
// Order, mask and gaps arrive in the memory of the host, where they are checked and from where they are copied to the
// GPU once, gaps as starts and columns; what the other constants hold needs no check, since the kernels bound every
// index. Compiled and tested in emulation, but never run on a GPU.
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "constants.h"
#include "kernels.cuh"
#include "ops.h"

namespace trim::ort {
namespace {

void require_cuda(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("trim_export: CUDA: ") + cudaGetErrorString(error));
}

// Makes the GPU on which an array lies the current one, until the end of the scope.
class OnDeviceOf {
  public:
    OnDeviceOf(const Api& api, const void* array) {
        cudaPointerAttributes where{};
        require_cuda(cudaPointerGetAttributes(&where, array));
        if (where.type != cudaMemoryTypeDevice && where.type != cudaMemoryTypeManaged) {
            refuse(api, "the constants are not on the GPU");
        }
        require_cuda(cudaGetDevice(&before_));
        require_cuda(cudaSetDevice(where.device));
    }
    ~OnDeviceOf() { cudaSetDevice(before_); }
    OnDeviceOf(const OnDeviceOf&) = delete;
    OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  private:
    int before_ = 0;
};

// Arrays of ours on the current GPU.
class Uploads {
  public:
    Uploads() = default;
    ~Uploads() {
        for (void* array : arrays_) cudaFree(array);
    }
    Uploads(const Uploads&) = delete;
    Uploads& operator=(const Uploads&) = delete;

    template <typename T>
    const T* add(const T* host, std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
        arrays_.push_back(nullptr);
        require_cuda(cudaMalloc(&arrays_.back(), bytes));
        require_cuda(cudaMemcpy(arrays_.back(), host, bytes, cudaMemcpyHostToDevice));
        return static_cast<const T*>(arrays_.back());
    }

  private:
    std::vector<void*> arrays_;
};

cuda::Bitmap view(const Bitmap& constants, Uploads& uploads) {
    const TrimNativeMatrix& given = constants.matrix();
    const std::int64_t units = given.group_start_size - 1, words = given.mask_size / units / cuda::kGroupRows;
    return {given.rows, given.columns, units, words, uploads.add(given.order, given.rows),
            uploads.add(given.mask, given.mask_size), uploads.add(given.group_start, given.group_start_size),
            given.values, given.values_size, given.scales};
}

cuda::Csr view(const Csr& constants, Uploads& uploads) {
    const std::vector<std::int64_t>& starts = constants.starts();
    const std::vector<std::uint16_t>& columns = constants.columns_of_values();
    return {constants.rows(), constants.columns(), constants.rows(), uploads.add(starts.data(), Rows::size(starts)),
            uploads.add(columns.data(), Rows::size(columns)), constants.values(), Rows::size(columns),
            constants.matrix().scales};
}

cuda::Dense view(const Dense& constants, Uploads&) {
    const TrimNativeDense& given = constants.matrix();
    return {given.rows, given.columns, given.rows, given.values, given.scales};
}

template <typename Constants, typename Input>
class CudaKernel : public Kernel {
  public:
    using Matrix = Constants;
    static constexpr const char* kProvider = "CUDAExecutionProvider";
    static constexpr ElementType kType = std::is_same<Input, float>::value ? kFloat : kFloat16;
    static constexpr MemoryType kStructureMemory = kHostMemory;

    CudaKernel(const Api& api, const KernelInfo* info) : Kernel(api) {
        Constants constants(api, info);
        constants.check();
        value_type_ = constants.matrix().value_type;
        const OnDeviceOf device(api, constants.matrix().scales);
        matrix_ = view(constants, uploads_);
        require_cuda(cudaDeviceSynchronize());  // a session's stream does not wait for copies on the default one
    }

    void compute(KernelContext* context) const override {
        const Tokens given = tokens(context, matrix_.rows, matrix_.columns);
        void* stream = nullptr;
        require(api().gpu_stream(context, &stream));
        require_cuda(cuda::launch(matrix_, value_type_, static_cast<const Input*>(given.inputs), given.count,
                                  static_cast<Input*>(given.outputs), static_cast<cudaStream_t>(stream)));
    }

  private:
    Uploads uploads_;
    std::int32_t value_type_ = 0;
    decltype(view(std::declval<const Constants&>(), std::declval<Uploads&>())) matrix_{};
};

template <typename Input>
void add_ops(std::vector<CustomOp>& ops) {
    ops.push_back(describe<CudaKernel<Bitmap, Input>>());
    ops.push_back(describe<CudaKernel<Csr, Input>>());
    ops.push_back(describe<CudaKernel<Dense, Input>>());
}

}  // namespace

void add_cuda_ops(std::vector<CustomOp>& ops) {
    add_ops<float>(ops);
    add_ops<__half>(ops);
}

}  // namespace trim::ort
