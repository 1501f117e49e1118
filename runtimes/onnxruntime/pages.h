// Memory for weights on huge pages, where the system has them, as ../native/pages.py takes for tensors.
//
// A product reads all of its weights once, front to back. On pages of 4 KiB that is a look-up of an address every 4 KiB,
// which takes longest where it is done twice, on virtual machines.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

// A sanitizer sees a step beyond an array only if the array is an allocation of its own.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TRIM_ARRAYS_APART
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || !defined(__linux__)
#define TRIM_ARRAYS_APART
#endif

#ifndef TRIM_ARRAYS_APART
#include <sys/mman.h>
#endif

namespace trim::ort {

#ifdef TRIM_ARRAYS_APART

// Bytes that are all 0.
inline std::shared_ptr<unsigned char> zeros(std::size_t size) {
    constexpr std::align_val_t kAlignment{64};
    const auto give_back = [](unsigned char* begin) { ::operator delete(begin, kAlignment); };
    unsigned char* const begin = static_cast<unsigned char*>(::operator new(size, kAlignment));
    std::memset(begin, 0, size);
    return {begin, give_back};
}

#else

// Of the system's, which gives memory only to what is written.
inline std::shared_ptr<unsigned char> mapped(std::size_t size) {
    void* const begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(begin, size, MADV_HUGEPAGE);  // small pages do too
#endif
    return {static_cast<unsigned char*>(begin), [size](unsigned char* pages) { munmap(pages, size); }};
}

// Bytes that are all 0, cut from a chunk, which lives as long as something in it. Sessions may be made at the same time.
inline std::shared_ptr<unsigned char> zeros(std::size_t size) {
    constexpr std::size_t kChunk = std::size_t{1} << 25, kAlignment = 64;
    static std::mutex lock;
    static std::weak_ptr<unsigned char> current;
    static std::size_t used;
    if (size > kChunk / 2) return mapped(size);
    const std::lock_guard<std::mutex> guard(lock);
    std::shared_ptr<unsigned char> chunk = current.lock();
    if (!chunk || used + size > kChunk) {
        current = chunk = mapped(kChunk);
        used = 0;
    }
    unsigned char* const begin = chunk.get() + used;
    used += (size + kAlignment - 1) / kAlignment * kAlignment;
    return {chunk, begin};
}

#endif

// Numbers that are written once and then read front to back.
template <typename T>
class Array {
  public:
    // Makes it `size` zeros.
    void assign(std::size_t size) { begin_ = size ? zeros(size * sizeof(T)) : nullptr; }

    T* data() const { return reinterpret_cast<T*>(begin_.get()); }

  private:
    std::shared_ptr<unsigned char> begin_;
};

}  // namespace trim::ort
