// C interface of the native CPU engine: y = x W^T for a sparse W, and for a dense one where it serves one token.
//
// No Python and no torch in here, so that any host can call it. Every function checks what it is given and answers with
// a status; memory outside the arrays of a matrix is never touched, whatever they hold.
//
// A sparse matrix (runtimes/native/matrix.py makes it) has its rows sorted by how many weights they keep, most first. The
// first of them are stored as a bitmap, in groups of four rows and words of 64 columns, as `bitmap-4x64` has it. A
// kernel reads both streams strictly forward:
//
//                    word 0                        word 1
//     mask    | row 0 | row 1 | row 2 | row 3 | row 0 | row 1 | ...     64 bits each, column j is bit j % 64
//     values  | kept of row 0 | of row 1 | ...                          as many as the mask has bits, without gaps
//              group 0                                            group 1 follows, and so on
//
// Rows that fill up the last group, and columns that fill up the last word, have no bits. The other rows stand in blocks
// of eight, each weight either in a slot or in a list. Slots are places that every row of a block has in every window of
// eight columns, as many as the window has steps: none to eight, the same number for all windows of the block. The columns
// of a step are numbers within the window, four bits for each row, from the lowest:
//
//              step 0                        step 1 of the window, if any
//     columns | row 0, row 1, ..., row 7    | row 0, row 1, ... | ...   32 bits
//     values  | row 0 | row 1 | ... | row 7 | row 0 | row 1 | ...       8 values
//
// A row fills its slots in the order of its columns; those that are left have the column 8 and a value of zero.
//
// With 8-bit values, windows are 16 columns wide and have four steps at a time, none to 16, each four of them a quad,
// whose columns are 16 bytes (four words, lowest byte first) and whose values are 32, four for each row:
//
//              byte 0                  byte 4          byte 8          byte 12
//     columns | rows 0, 2: slot 0 | .. | rows 1, 3 | .. | rows 4, 6 | .. | rows 5, 7 | ..    lower and upper four bits
//     values  | row 0: slot 0 | slot 1 | slot 2 | slot 3 | row 1: slot 0 | ...
//
// Slots that are left have a value of zero and the last column of the row in the window; where it has none there, 15 in
// the first slot and 0 in the others. What does not fit is listed:
//
//              step 0                        step 1
//     columns | row 0 | row 1 | ... | row 7 | row 0 | row 1 | ...       rising in each row; 16 bits
//     values  | row 0 | row 1 | ... | row 7 | row 0 | row 1 | ...
//              block 0                                            block 1 follows, and so on
//
// A list has an even number of steps; a row that is shorter repeats its last column with values of zero.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TRIM_NATIVE_API __attribute__((visibility("default")))

// How a value is stored. Each is multiplied by the scale of its row, which only 8-bit integers must have.
enum { TRIM_NATIVE_F32, TRIM_NATIVE_BF16, TRIM_NATIVE_F16, TRIM_NATIVE_I8 };

// Values that must be readable behind the last one, whatever they are: a kernel loads whole registers, then selects.
enum { TRIM_NATIVE_TAIL = 64 };

enum {
    TRIM_NATIVE_OK,
    TRIM_NATIVE_NO_MATRIX,     // null, a side that is not positive, or an unknown value type
    TRIM_NATIVE_BAD_SIZE,      // an array is missing, misaligned or not as long as the sides demand
    TRIM_NATIVE_BAD_ORDER,     // a row that does not exist
    TRIM_NATIVE_BAD_MASK,      // mask or lists, their starts and values disagree
    TRIM_NATIVE_BAD_INPUTS,    // inputs or outputs are missing, or a stride is shorter than a row
    TRIM_NATIVE_BAD_THREADS,   // fewer than one, or absurdly many
    TRIM_NATIVE_NO_MEMORY,     // the scratch space cannot be had
    TRIM_NATIVE_UNKNOWN_ISA,   // no such instruction set in this build
    TRIM_NATIVE_LACKS_ISA,     // this processor does not have it
    TRIM_NATIVE_BAD_LIMIT,     // of inputs, not between 2 and 32767; or one, or scales of inputs, with other values
};

// One sparse matrix; sizes count elements. All of it belongs to the caller.
typedef struct TrimNativeMatrix {
    int64_t rows, columns;      // below 2^31
    int64_t bitmap_rows;        // so many rows are a bitmap: all, or a multiple of four
    const int32_t* order;       // [rows]: the row that stands at each place of the layout
    int64_t order_size;
    const uint64_t* mask;       // [groups, words, 4], with groups = ceil(bitmap_rows / 4), words = ceil(columns / 64)
    int64_t mask_size;
    const int64_t* group_start; // [groups + 1]: where the values of each group begin
    int64_t group_start_size;
    const void* values;         // [group_start[groups]] and the tail
    int64_t values_size;        // the tail included
    const int64_t* slot_start;  // [blocks + 1]: steps before each block, with blocks = ceil((rows - bitmap_rows) / 8);
    int64_t slot_start_size;    // or null: no block has slots
    const uint32_t* slot_columns; // [slot_start[blocks]]
    int64_t slot_columns_size;
    const void* slot_values;    // [slot_start[blocks] * 8]
    int64_t slot_values_size;
    const int64_t* list_start;  // [blocks + 1]: where the list of each block begins
    int64_t list_start_size;
    const uint16_t* list_columns; // [list_start[blocks]]
    int64_t list_columns_size;
    const void* list_values;    // [list_start[blocks]]
    int64_t list_values_size;
    const float* scales;        // [rows] in the order of the rows of W; null, but for 8-bit integers: 1 for each row
    int64_t scales_size;
    int32_t value_type;
    int32_t input_limit;        // of 8-bit integers: what inputs are rounded to at most, see below; else 0
    const float* input_scales;  // of 8-bit integers, [columns]: powers of two by which inputs are multiplied; or null
    int64_t input_scales_size;
} TrimNativeMatrix;

// A dense matrix, row after row.
typedef struct TrimNativeDense {
    int64_t rows, columns;      // below 2^31
    const void* values;         // [rows, columns]
    int64_t values_size;
    const float* scales;        // as of a sparse matrix
    int64_t scales_size;
    int32_t value_type;
} TrimNativeDense;

// Threads to share work among. `run` calls work(task, 0), ..., work(task, count - 1), in any order and on any threads,
// and returns when all of them have.
typedef struct TrimNativePool {
    int32_t threads;     // work is divided into at most so many shares
    int32_t least_share; // and into none that costs less than so many weights, about 0.3 ns each: what waking one takes
    void (*run)(void* context, int32_t count, void (*work)(void* task, int32_t share), void* task);
    void* context;
} TrimNativePool;

// outputs[t, i] = sum_j W[i, j] inputs[t, j], summed in float32.
//
//     inputs  [tokens, columns], rows `input_stride` apart      outputs [tokens, rows], rows `output_stride` apart
//
// The result has the same bits for any number of threads. It does not depend on how many tokens there are either, but
// that a few are multiplied one by one, and more of them together. On an error status outputs hold nothing of use.
//
// With 8-bit values each token's inputs are first made integers up to the limit: multiplied by the largest power of two
// that allows it, by which the outputs are divided again, and rounded half to even. If then no row's sum of |value| times
// the limit is 2^24 or more, the result has the same bits for any number of tokens and any instruction set too: the exact
// sum, rounded once, when it is multiplied by the scale of its row. A token with NaN or infinity gives NaN.
TRIM_NATIVE_API int32_t trim_native_linear(const TrimNativeMatrix* matrix, const float* inputs, int64_t tokens,
                                           int64_t input_stride, float* outputs, int64_t output_stride,
                                           int32_t threads);

// The same on the host's own threads.
TRIM_NATIVE_API int32_t trim_native_linear_on(const TrimNativePool* pool, const TrimNativeMatrix* matrix,
                                              const float* inputs, int64_t tokens, int64_t input_stride, float* outputs,
                                              int64_t output_stride);

// The same for a dense W and tokens without gaps; their sizes say how many there are.
TRIM_NATIVE_API int32_t trim_native_dense(const TrimNativeDense* matrix, const float* inputs, int64_t inputs_size,
                                          float* outputs, int64_t outputs_size, int32_t threads);

TRIM_NATIVE_API int32_t trim_native_dense_on(const TrimNativePool* pool, const TrimNativeDense* matrix,
                                             const float* inputs, int64_t inputs_size, float* outputs,
                                             int64_t outputs_size);

// Rows that are to become blocks.
typedef struct TrimNativeRows {
    int64_t rows, columns;     // of the matrix W, below 2^31
    const uint8_t* mask;       // [rows, columns]: 1 where a weight is kept, else 0
    int64_t mask_size;
    const int64_t* row_start;  // [rows + 1]: where each row begins in the values
    int64_t row_start_size;
    const void* values;        // [row_start[rows]]
    int64_t values_size;
    const int32_t* order;      // [order_size]: the rows in question, in the order of the blocks
    int64_t order_size;
    int32_t value_type;
} TrimNativeRows;

// How many steps of slots each block should have: where its slots and its list then begin. `step_cost` is what a step
// costs, in listed weights; a row of more columns than a list can name is all slots.
//
//     slot_start, list_start  [blocks + 1], as in `TrimNativeMatrix`
TRIM_NATIVE_API int32_t trim_native_plan(const TrimNativeRows* rows, double step_cost, int64_t* slot_start,
                                         int64_t* list_start, int64_t starts_size);

// Fills blocks for which there was a plan; their arrays are zeros beforehand, and of the sizes that the starts say.
TRIM_NATIVE_API int32_t trim_native_lay_out(const TrimNativeRows* rows, const int64_t* slot_start,
                                            const int64_t* list_start, int64_t starts_size, uint32_t* slot_columns,
                                            void* slot_values, uint16_t* list_columns, void* list_values);

// The limit with which inputs are rounded least, where no row's sum of |value| is above `most`. The sum times the limit
// stays below 2^31, as it must, and, with `as_floats` and unless that would be coarser than 8 bits, below 2^24.
TRIM_NATIVE_API int32_t trim_native_input_limit(int64_t most, int32_t as_floats);

// What a step of slots with values of a type costs with the instruction set in use, in listed weights; infinite where
// there is no such type.
TRIM_NATIVE_API double trim_native_step_cost(int32_t value_type);

// The instruction set in use: "portable", "avx2" or "avx512". The best this processor has, unless one was selected.
TRIM_NATIVE_API const char* trim_native_isa(void);

// Use the named instruction set from now on, or the best one for null. Not while another thread multiplies.
TRIM_NATIVE_API int32_t trim_native_select_isa(const char* name);

// What a status means, as the end of a sentence.
TRIM_NATIVE_API const char* trim_native_message(int32_t status);

#ifdef __cplusplus
}
#endif
