// The constants of each operator: a matrix as the native engine takes it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../native/trim_native.h"
#include "slots.h"
#include "tensors.h"

namespace trim::ort {

inline std::int32_t value_type(const Api& api, int type) {
    switch (type) {
        case kFloat: return TRIM_NATIVE_F32;
        case kBFloat16: return TRIM_NATIVE_BF16;
        case kFloat16: return TRIM_NATIVE_F16;
        case kInt8: return TRIM_NATIVE_I8;
        default: refuse(api, "values are none of float32, bfloat16, float16 and int8");
    }
}

// A matrix W whose arrays belong to the session. Values, scales and columns of lists are only pointed to, so that they
// may be in another memory.
class Constants {
  public:
    Constants(const Api& api, const KernelInfo* info) : api_(api) {
        require(api.attribute(info, "rows", &rows_));
        require(api.attribute(info, "columns", &columns_));
    }
    virtual ~Constants() = default;
    Constants(const Constants&) = delete;
    Constants& operator=(const Constants&) = delete;

    std::int64_t rows() const { return rows_; }
    std::int64_t columns() const { return columns_; }

    // The engine's status for so many tokens without gaps; of no tokens, what it has against the matrix.
    virtual std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                                  float* outputs) const = 0;

    virtual void check() { refuse_status(multiply({1, 1, nullptr, nullptr}, nullptr, 0, nullptr)); }

    // What only a host that can read all constants is able to check.
    void check_contents() const {
        for (std::int64_t row = 0; row < rows_; ++row) {
            if (!std::isfinite(scales_[row])) refuse(api_, "a scale is NaN or infinite");
        }
    }

    // Of a matrix that was checked: makes it ready for a processor, in its memory. Others take it as it is.
    virtual void prepare() {}

    void refuse_status(std::int32_t status) const {
        if (status != TRIM_NATIVE_OK) refuse(api_, trim_native_message(status));
    }

  protected:
    // What every operator has: values, which go where the layout wants them, and, right behind them, scales.
    template <typename Matrix>
    void read_values(const KernelInfo* info, std::size_t index, Matrix& matrix, const void*& values,
                     std::int64_t& size) {
        const Tensor tensor = read_constant(api_, info, index, "values", kAnyType);
        const Tensor scales = read_constant(api_, info, index + 1, "scales", kFloat);
        matrix.value_type = value_type(api_, tensor.type);
        matrix.scales = scales_ = static_cast<const float*>(scales.data);
        matrix.scales_size = scales.size();
        values = tensor.data;
        size = tensor.size();
    }

    Api api_;
    std::int64_t rows_ = 0, columns_ = 0;

  private:
    const float* scales_ = nullptr;
};

class Sparse : public Constants {
  public:
    Sparse(const Api& api, const KernelInfo* info) : Constants(api, info) {
        matrix_.rows = rows_;
        matrix_.columns = columns_;
    }

    const TrimNativeMatrix& matrix() const { return matrix_; }

    std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                          float* outputs) const override {
        return trim_native_linear_on(&pool, &matrix_, inputs, tokens, columns_, outputs, rows_);
    }

  protected:
    static constexpr std::int64_t kMostColumns = 65536;  // that lists can name

    void lay_out(const TrimNativeRows& rows) { refuse_status(slots_.lay_out(matrix_, rows)); }

    TrimNativeMatrix matrix_{};

  private:
    Slots slots_;
};

class Bitmap : public Sparse {
  public:
    static constexpr const char* kName = "SparseMatMulBitmap";
    static constexpr std::size_t kInputs = 5, kStructure = 2;  // inputs behind A that are read here

    Bitmap(const Api& api, const KernelInfo* info) : Sparse(api, info) {
        const Tensor order = read_constant(api, info, 1, "order", kInt32);
        matrix_.order = static_cast<const std::int32_t*>(order.data);
        matrix_.order_size = order.size();
        const Tensor mask = read_constant(api, info, 2, "mask", kUInt8);
        read_values(info, 3, matrix_, matrix_.values, matrix_.values_size);
        if (matrix_.value_type == TRIM_NATIVE_I8) {
            // Whatever the values are; finer where they are laid out. No side was checked yet.
            const std::int64_t kept = std::min(std::clamp<std::int64_t>(columns_, 0, INT32_MAX), matrix_.values_size);
            matrix_.input_limit = trim_native_input_limit(128 * kept, false);
        }
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
            const std::uint64_t* const bits = matrix_.mask + 4 * words * group;
            for (std::int64_t i = 0; i < 4 * words; ++i) kept += __builtin_popcountll(bits[i]);
            starts_.push_back(kept);
        }
        matrix_.group_start = starts_.data();
        matrix_.group_start_size = static_cast<std::int64_t>(starts_.size());
        static const std::int64_t no_lists = 0;
        matrix_.list_start = &no_lists;
        matrix_.list_start_size = 1;
    }

    // Also that the order names each row once: what another row gets would else stay as it was.
    void check() override {
        Sparse::check();
        std::vector<bool> named(static_cast<std::size_t>(rows_));
        for (std::int64_t place = 0; place < rows_; ++place) {
            const std::size_t row = static_cast<std::size_t>(matrix_.order[place]);
            if (named[row]) refuse(api_, "the order does not name each row once");
            named[row] = true;
        }
    }

    // To slots and lists, where they are of use; else the file's layout is as good as another. A matrix that keeps next to
    // nothing would be all lists, and takes more memory on the way than its file has bytes.
    void prepare() override {
        constexpr std::int64_t kLeastDensity = 64;
        if (std::isfinite(trim_native_step_cost(matrix_.value_type)) && columns_ <= kMostColumns &&
            rows_ * columns_ <= kLeastDensity * matrix_.values_size) {
            const Rows rows(matrix_);
            refuse_status(rows.good() ? TRIM_NATIVE_OK : TRIM_NATIVE_BAD_MASK);
            lay_out(rows.described());
        }
    }

  private:
    std::vector<std::int64_t> starts_;
};

// Row after row, each weight with the number of zeros before it. A run of `kRun` zeros or more holds stored ones, so that
// what is laid out anew is never much larger than the file.
class Csr : public Sparse {
  public:
    static constexpr const char* kName = "SparseMatMulCsr";
    static constexpr std::size_t kInputs = 4, kStructure = 1;
    static constexpr std::int64_t kRun = 64;

    Csr(const Api& api, const KernelInfo* info) : Sparse(api, info) {
        const Tensor gaps = read_constant(api, info, 1, "gaps", kUInt8);
        gaps_ = static_cast<const std::uint8_t*>(gaps.data);
        gaps_size_ = gaps.size();
        read_values(info, 2, matrix_, values_, values_size_);
    }

    // Where each row begins [rows + 1], the column of each value, and the values; of a matrix that was checked.
    const std::vector<std::int64_t>& starts() const { return starts_; }
    const std::vector<std::uint16_t>& columns_of_values() const { return columns_of_values_; }
    const void* values() const { return values_; }

    // Gaps name no column twice and none that does not exist, if they end where the matrix does.
    void check() override {
        if (rows_ < 1 || rows_ > INT32_MAX || columns_ < 1 || columns_ > kMostColumns) {
            refuse_status(TRIM_NATIVE_NO_MATRIX);
        }
        if (values_size_ != gaps_size_ || matrix_.scales_size != rows_ ||
            reinterpret_cast<std::uintptr_t>(values_) % value_bytes(matrix_.value_type) ||
            reinterpret_cast<std::uintptr_t>(matrix_.scales) % alignof(float)) {
            refuse_status(TRIM_NATIVE_BAD_SIZE);
        }
        if (!decode()) refuse(api_, "the gaps do not end where the matrix does, or are too wide");
    }

    void prepare() override {
        std::vector<std::uint8_t> mask(static_cast<std::size_t>(rows_ * columns_));
        order_.resize(static_cast<std::size_t>(rows_));
        for (std::int64_t row = 0; row < rows_; ++row) {
            order_[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(row);
            for (std::int64_t i = starts_[row]; i < starts_[row + 1]; ++i) mask[row * columns_ + columns_of_values_[i]] = 1;
        }
        const auto kept = [&](std::int32_t row) { return starts_[row + 1] - starts_[row]; };
        std::stable_sort(order_.begin(), order_.end(), [&](auto left, auto right) { return kept(left) > kept(right); });
        matrix_.order = order_.data(), matrix_.order_size = rows_;
        lay_out({rows_, columns_, mask.data(), Rows::size(mask), starts_.data(), Rows::size(starts_), values_, values_size_,
                 order_.data(), rows_, matrix_.value_type});
        starts_ = {}, columns_of_values_ = {};
        Sparse::check();
    }

  private:
    bool decode() {
        starts_ = {0}, columns_of_values_.resize(static_cast<std::size_t>(gaps_size_));
        std::int64_t column = -1;
        for (std::int64_t i = 0; i < gaps_size_; ++i) {
            if (gaps_[i] >= kRun) return false;
            for (column += 1 + gaps_[i]; column >= columns_; column -= columns_) {
                if (Rows::size(starts_) == rows_) return false;
                starts_.push_back(i);
            }
            columns_of_values_[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(column);
        }
        if ((rows_ - Rows::size(starts_)) * columns_ + columns_ - 1 - column >= kRun) return false;
        starts_.resize(static_cast<std::size_t>(rows_ + 1), gaps_size_);
        return true;
    }

    const std::uint8_t* gaps_ = nullptr;
    const void* values_ = nullptr;
    std::int64_t gaps_size_ = 0, values_size_ = 0;
    std::vector<std::int64_t> starts_;
    std::vector<std::uint16_t> columns_of_values_;
    std::vector<std::int32_t> order_;
};

class Dense : public Constants {
  public:
    static constexpr const char* kName = "DenseMatMul";
    static constexpr std::size_t kInputs = 3, kStructure = 0;

    Dense(const Api& api, const KernelInfo* info) : Constants(api, info) {
        read_values(info, 1, matrix_, matrix_.values, matrix_.values_size);
        matrix_.rows = rows_;
        matrix_.columns = columns_;
    }

    const TrimNativeDense& matrix() const { return matrix_; }

    std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                          float* outputs) const override {
        return trim_native_dense_on(&pool, &matrix_, inputs, tokens * columns_, outputs, tokens * rows_);
    }

  private:
    TrimNativeDense matrix_{};
};

}  // namespace trim::ort
