// The constants of each operator: a matrix as the native engine takes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
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

    virtual void check() const { refuse_status(multiply({1, 1, nullptr, nullptr}, nullptr, 0, nullptr)); }

    // What only a host that can read all constants is able to check.
    virtual void check_contents() const {
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
    static constexpr std::size_t kStructure = 2;  // inputs behind A that are read here

    Sparse(const Api& api, const KernelInfo* info) : Constants(api, info) {
        const Tensor order = read_constant(api, info, 1, "order", kInt32);
        matrix_.rows = rows_;
        matrix_.columns = columns_;
        matrix_.order = static_cast<const std::int32_t*>(order.data);
        matrix_.order_size = order.size();
    }

    const TrimNativeMatrix& matrix() const { return matrix_; }

    // Also that the order names each row once: what another row gets would else stay as it was.
    void check() const override {
        Constants::check();
        std::vector<bool> named(static_cast<std::size_t>(rows_));
        for (std::int64_t place = 0; place < rows_; ++place) {
            const std::size_t row = static_cast<std::size_t>(matrix_.order[place]);
            if (named[row]) refuse(api_, "the order does not name each row once");
            named[row] = true;
        }
    }

    std::int32_t multiply(const TrimNativePool& pool, const float* inputs, std::int64_t tokens,
                          float* outputs) const override {
        return trim_native_linear_on(&pool, &matrix_, inputs, tokens, columns_, outputs, rows_);
    }

    // To slots and lists, where they are of use; else the file's layout is as good as another. A matrix that keeps next to
    // nothing would be all lists again, and takes more memory on the way than its file has bytes.
    void prepare() override {
        constexpr std::int64_t kLeastDensity = 64, kMostColumns = 65536;
        const std::int64_t stored = matrix_.values_size + matrix_.list_values_size;
        if (std::isfinite(trim_native_step_cost(matrix_.value_type)) && columns_ <= kMostColumns &&
            rows_ * columns_ <= kLeastDensity * stored) {
            refuse_status(slots_.lay_out(matrix_));
        }
    }

  protected:
    // Also the limit of inputs that whatever 8-bit integers allow.
    void read_kept(const KernelInfo* info, std::size_t index, const void*& values, std::int64_t& size) {
        read_values(info, index, matrix_, values, size);
        if (matrix_.value_type == TRIM_NATIVE_I8) {
            matrix_.input_limit = trim_native_input_limit(128 * (columns_ < size ? columns_ : size));
        }
    }

    TrimNativeMatrix matrix_{};

  private:
    Slots slots_;
};

class Bitmap : public Sparse {
  public:
    static constexpr const char* kName = "SparseMatMulBitmap";
    static constexpr std::size_t kInputs = 5;

    Bitmap(const Api& api, const KernelInfo* info) : Sparse(api, info) {
        const Tensor mask = read_constant(api, info, 2, "mask", kUInt8);
        read_kept(info, 3, matrix_.values, matrix_.values_size);
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

  private:
    std::vector<std::int64_t> starts_;
};

class Sell8 : public Sparse {
  public:
    static constexpr const char* kName = "SparseMatMulSell8";
    static constexpr std::size_t kInputs = 6;

    Sell8(const Api& api, const KernelInfo* info) : Sparse(api, info) {
        const Tensor start = read_constant(api, info, 2, "start", kInt64);
        const Tensor columns = read_constant(api, info, 3, "columns", kUInt16);
        read_kept(info, 4, matrix_.list_values, matrix_.list_values_size);
        matrix_.list_start = static_cast<const std::int64_t*>(start.data);
        matrix_.list_start_size = start.size();
        matrix_.list_columns = static_cast<const std::uint16_t*>(columns.data);
        matrix_.list_columns_size = columns.size();
        leave_out_bitmap(matrix_);
    }

    // Columns that are wrong would mean one thing to the kernel for one token and another to that for several.
    void check_contents() const override {
        Constants::check_contents();
        for (std::int64_t block = 0; block + 1 < matrix_.list_start_size; ++block) {
            for (std::int64_t lane = 0; lane < 8; ++lane) {
                if (!rises(matrix_.list_start[block] + lane, matrix_.list_start[block + 1])) {
                    refuse(api_, "the columns of a row do not rise, or leave the matrix");
                }
            }
        }
    }

  private:
    // Whether the columns of one row do, but for zeros that fill it up.
    bool rises(std::int64_t entry, std::int64_t end) const {
        bool full = false;
        for (std::int64_t before = -1, column; entry < end; entry += 8, before = column) {
            column = matrix_.list_columns[entry];
            full = full || column <= before;
            if (column >= columns_ || (full && (column != before || !is_zero(entry)))) return false;
        }
        return true;
    }

    bool is_zero(std::int64_t entry) const {
        constexpr unsigned char kZero[4] = {};
        const std::size_t width = value_bytes(matrix_.value_type);
        const unsigned char* const values = static_cast<const unsigned char*>(matrix_.list_values);
        return std::memcmp(values + static_cast<std::size_t>(entry) * width, kZero, width) == 0;
    }
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
