// Plain C++, for every processor; also the definition of what an instruction set has to offer.

#include "table.h"

namespace trim {
namespace {

struct Portable : PlainQuads {
    static constexpr std::int64_t kLanes = 8;
    static constexpr std::int64_t kWidest = 4;     // vectors of a panel: two chains of each should fit the registers
    static constexpr std::int64_t kTileWords = 2;  // words whose inputs, for a panel, should fit the L1 cache

    // Compilers turn these loops into whatever vectors the processor has.
    struct Vector { float lanes[kLanes]; };

    static Vector load(const float* source) {
        Vector vector;
        std::memcpy(vector.lanes, source, sizeof vector.lanes);
        return vector;
    }
    static void store(float* target, const Vector& vector) { std::memcpy(target, vector.lanes, sizeof vector.lanes); }
    static Vector broadcast(float value) {
        Vector vector;
        for (float& lane : vector.lanes) lane = value;
        return vector;
    }
    static Vector add(Vector a, const Vector& b) {
        for (std::int64_t i = 0; i < kLanes; ++i) a.lanes[i] += b.lanes[i];
        return a;
    }
    // a * b + c
    static Vector multiply_add(const Vector& a, const Vector& b, Vector c) {
        for (std::int64_t i = 0; i < kLanes; ++i) c.lanes[i] += a.lanes[i] * b.lanes[i];
        return c;
    }

    // The next kLanes values.
    template <typename Value>
    static Vector widen(const Value* values) {
        Vector vector;
        for (std::int64_t i = 0; i < kLanes; ++i) vector.lanes[i] = widen_one(values[i]);
        return vector;
    }

    // The columns of a mask word that are kept, counted from `first`; may write up to 64 bytes in all.
    static void store_columns(std::uint64_t bits, std::int64_t first, std::uint8_t* columns) {
        for (; bits; bits &= bits - 1) *columns++ = static_cast<std::uint8_t>(first + __builtin_ctzll(bits));
    }

    // A row's sum so far, and how it is made: `add_products` takes one mask word's values off the stream.
    struct Sum { float value; };

    template <typename Value>
    static void add_products(std::uint64_t bits, const Value*& values, const float* x, Sum& sum) {
        float word = 0.0f;
        for (; bits; bits &= bits - 1) word += widen_one(*values++) * x[__builtin_ctzll(bits)];
        sum.value += word;
    }
    static float total(const Sum& sum) { return sum.value; }
    static float total(const Vector& vector) {
        float all = 0.0f;
        for (const float lane : vector.lanes) all += lane;
        return all;
    }

    // Sums of eight rows so far, and how the n-th step of their slots and two steps of their lists are added. Four bits
    // of `columns` for each row, of which the lowest three say where in the window its input is.
    struct BlockSums { Vector even = broadcast(0.0f), odd = broadcast(0.0f); };

    template <typename Value>
    static void add_slot(std::uint32_t columns, const Value* values, const float* window, BlockSums& sums,
                         std::int64_t slot) {
        Vector& chain = slot % 2 ? sums.odd : sums.even;
        for (std::int64_t i = 0; i < kBlockRows; ++i, columns >>= 4) {
            chain.lanes[i] += widen_one(values[i]) * window[columns & 7];
        }
    }

    template <typename Value>
    static void add_two_steps(const std::uint16_t* columns, const Value* values, const float* x, BlockSums& sums) {
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
            sums.even.lanes[i] += widen_one(values[i]) * x[columns[i]];
            sums.odd.lanes[i] += widen_one(values[kBlockRows + i]) * x[columns[kBlockRows + i]];
        }
    }
    static void store_rows(const BlockSums& sums, float* rows) { store(rows, add(sums.even, sums.odd)); }

    // Eight steps of slots after each other; may write eight entries too many.
    template <typename Value>
    static void append_eight_steps(const std::uint32_t* columns, const Value* values, const std::uint8_t* firsts,
                                   RowEntries& rows) {
        for (std::int64_t k = 0; k < 8; ++k) append_step(columns[k], values + k * kBlockRows, firsts[k], rows);
    }

    // A quad of slots; may write four entries too many.
    static constexpr auto append_quad = trim::append_quad;

    static constexpr std::int64_t few_tokens(std::size_t) { return 1; }

    // Never: lists are as fast where inputs are looked up in memory anyway.
    static constexpr double step_cost(std::size_t) { return __builtin_inf(); }

    // How inputs are laid out for `add_products` with values of this type.
    template <typename Value>
    static constexpr auto arrangement(const Value*) { return arrange_plainly; }
};

}  // namespace

extern const Kernels portable_kernels = kernels<Portable>("portable");

}  // namespace trim
