// What our kernels and operators use of CUDA, in plain C++, so that they can be compiled, checked by sanitizers and run
// without a GPU. Memory of the GPU is memory of the host, and a launch runs one lane after the other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__

struct dim3 { unsigned x = 1, y = 1, z = 1; };

inline thread_local dim3 blockIdx, threadIdx, blockDim, gridDim;

inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

// ---- memory -----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaMemoryType { cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
struct cudaPointerAttributes { cudaMemoryType type; int device; };
using cudaStream_t = struct Stream*;

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaFree(void* array) { return std::free(array), cudaSuccess; }
inline cudaError_t cudaMalloc(void** array, std::size_t bytes) {
    *array = std::malloc(bytes);
    return *array ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
    return *attributes = {cudaMemoryTypeManaged, 0}, cudaSuccess;
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Of the lanes that have run: what each passed to its n-th `sum_lanes`.
inline thread_local std::vector<std::vector<float>> passed;
inline thread_local std::size_t sums_of_lane;

// Lanes run from the last to the first, so that those which use the sum, the first ones, find it complete.
namespace trim::cuda {
template <int kApart>
float sum_lanes(float value) {
    if (passed.size() == sums_of_lane) passed.emplace_back(32);
    std::vector<float>& lanes = passed[sums_of_lane++];
    lanes[threadIdx.x % 32] = value;
    float sum = 0;
    for (unsigned lane = threadIdx.x % kApart; lane < 32; lane += kApart) sum += lanes[lane];
    return sum;
}
}  // namespace trim::cuda

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
    gridDim = config->gridDim, blockDim = config->blockDim;
    if (gridDim.x == 0 || gridDim.y == 0 || gridDim.y > 65535 || blockDim.x % 32) return cudaErrorInvalidValue;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
            for (unsigned warp = 0; warp < blockDim.x; warp += 32) {
                passed.clear();
                for (unsigned lane = 32; lane-- > 0;) {
                    threadIdx.x = warp + lane;
                    sums_of_lane = 0;
                    kernel(arguments...);
                }
            }
        }
    }
    return cudaSuccess;
}
