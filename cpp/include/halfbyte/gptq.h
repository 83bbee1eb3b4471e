// Kernels of GPTQ (Frantar et al. 2023, arXiv:2210.17323): input Hessians and column-by-column rounding with error
// feedback.
//
// Hessian. H = sum over tokens of x x^T is symmetric, so only its lower triangle of kPanelWidth-square *tiles* exists:
// tile (i, j), i >= j, is number i (i + 1) / 2 + j, row-major, float64. That is the memory of one full float32 matrix.
// Products are summed in float32 over at most kTokenChunk tokens, and those sums in float64: nothing drifts.
//
// Feedback. With the reversed Cholesky factorisation H = R R^T, R upper triangular, the best correction of column k for
// the errors e = w - w_hat of the columns before it is
//   target[k] = w[k] + sum_{j < k} e[j] * R[j, k] / R[k, k]
// and rounding it adds (target[k] - w_hat[k])^2 * R[k, k]^2 to the quadratic loss. The textbook's upper factor of H^-1
// is R^-1: the same numbers, but no inverse is needed (LDLQ, Chee et al. 2023, arXiv:2307.13304).
//
// Polish. With e = w - w_hat, the gradient e H says what every column would gain alone. Sweeps over the columns take
// the best code of each given all others, then the best scale and zero point of each group: e H e^T never grows.
//
// Order of arithmetic: fixed by sizes alone, so results do not depend on threads or on which rows go together. The
// levels with fused multiply-add (avx2 and above) give equal bits; the scalar level rounds products too.
#pragma once
#include "halfbyte/elementwise.h"
#include "halfbyte/types.h"

namespace halfbyte {

constexpr int64_t kPanelWidth = 48;      // columns of a Hessian tile; rows of a weight that are rounded together
constexpr int64_t kPanelsPerBlock = 12;  // at most: a block of tiles is what one call of hessian_block adds
constexpr int64_t kTokenChunk = 4096;    // tokens summed in float32
constexpr int64_t kFeedbackColumns = 8;  // columns in one panel of feedback factors
constexpr int64_t kRoundBlock = 128;     // columns whose errors are fed back at once
constexpr int64_t kRoundPanels = 4;      // panels of rows in one call of round_rows, at most

static constexpr int64_t hessian_tiles(int64_t features) {
  const int64_t panels = ceil_div(features, kPanelWidth);
  return panels * (panels + 1) / 2;
}

// Tokens [0, tokens) of row-major x; tokens <= kTokenChunk. With y, of the same shape, the sum is y^T x, a full
// row-major matrix [features, features].
struct HessianInput {
  const void* x;
  FloatType type;
  int64_t tokens, features;
  const void* y = nullptr;
};

// Tiles (i, j) with row_begin <= i < row_end and column_begin <= j < column_end (panels, at most kPanelsPerBlock each).
struct PanelBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};

// Columns are visited by *slots*: column_of_slot[s] is the column, or -1 for padding. A block holds slots [begin, end),
// end - begin <= kRoundBlock, begin a multiple of kFeedbackColumns. At the first block of a range, the errors so far
// are fed back to all slots up to range_end, since a group whose scale is then chosen reaches that far.
struct RoundBlock {
  int64_t begin, end, range_begin, range_end;
};

struct RoundProblem {
  const void* weight;  // [rows, columns]
  FloatType weight_type;
  int64_t rows, columns;
  const int32_t* column_of_slot;  // [slots]
  int64_t slots;                  // a multiple of kFeedbackColumns
  const RoundBlock* blocks;
  int64_t block_count, longest_range;
  // R[j, k] / R[k, k] in panels of kFeedbackColumns slots k; a panel has the rows j before its end, one after another.
  // Panel p begins at feedback_offset(p). Zero in padding and for j >= k.
  const float* feedback;
  const float* pivot;  // [slots]: R[k, k]^2, 0 for padding
  int64_t group_size;
  // Static scales are given; otherwise each group's are searched for when its first slot comes up,
  // weighted by importance ([columns], may be null). Then the slots of a group must follow one another and begin with a
  // block or in one.
  bool search;
  SearchOptions options;  // also says which codes there are
  const float* importance;
  float* scale;         // [rows, groups]; read or written
  int32_t* zero_point;  // [rows, groups]
  uint8_t* codes;       // [rows, columns]: q as one byte, two's complement; binary: 0 is -scale, 1 is +scale; or the
                        // index in the codebook
  float* loss;          // [rows]
};

static constexpr int64_t feedback_offset(int64_t panel) {
  return kFeedbackColumns * kFeedbackColumns * (panel * (panel + 1) / 2);
}

// Columns that the polish works on together: a group, or as many whole groups as kRoundBlock holds. A range takes
// round_up(polish_range, kFeedbackColumns) slots, the last one fewer.
static constexpr int64_t polish_range(int64_t group_size) {
  return group_size > kRoundBlock ? group_size : kRoundBlock / group_size * group_size;
}

struct PolishProblem {
  const void* weight;  // [rows, columns]
  FloatType weight_type;
  int64_t rows, columns;
  const float* hessian;  // in panels of kFeedbackColumns slots; a panel has all rows of H, one after another
  int64_t group_size;
  SearchOptions options;  // which codes there are, and how scales are stored
  int sweeps;
  bool refit;           // scales and zero points too
  float* scale;         // [rows, groups]; all three are read and written
  int32_t* zero_point;  // [rows, groups]
  uint8_t* codes;       // [rows, columns]
};

struct GptqKernels {
  // Adds the products of the tokens to the tiles (with y: to the matrix) of one block. scratch: hessian_scratch floats,
  // 64-byte aligned.
  void (*hessian_block)(const HessianInput& input, const PanelBlock& block, double* tiles, float* scratch);
  int64_t hessian_scratch;
  // Rounds rows [row_begin, row_end), row_begin a multiple of kPanelWidth, at most kRoundPanels * kPanelWidth rows.
  // scratch: round_scratch(problem, rows) bytes, 64-byte aligned.
  void (*round_rows)(const RoundProblem& problem, int64_t row_begin, int64_t row_end, void* scratch);
  int64_t (*round_scratch)(const RoundProblem& problem, int64_t rows);
  // The same for the polish.
  void (*polish_rows)(const PolishProblem& problem, int64_t row_begin, int64_t row_end, void* scratch);
  int64_t (*polish_scratch)(const PolishProblem& problem, int64_t rows);
};

}  // namespace halfbyte
