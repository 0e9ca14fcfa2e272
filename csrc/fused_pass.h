// The fused pass: everything that is known of a gradient (and its weight) after reading it once.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "tensor_view.h"

namespace normscope {

// Columns of the statistics; python/normscope/stats.py says what each means and how two parts of a tensor merge.
enum Column : std::size_t {
  kSumSquares,
  kSumSquaresLarge,
  kSumSquaresSmall,
  kSumAbs,
  kMaxAbs,
  kNonfinite,
  kDot,
  kDotLarge,
  kDotSmall,
  kWeightSquares,
  kWeightSquaresLarge,
  kWeightSquaresSmall,
  kCount,
  kColumns
};
inline constexpr std::array<const char*, kColumns> kColumnNames = {"sum_squares",
                                                                   "sum_squares_large",
                                                                   "sum_squares_small",
                                                                   "sum_abs",
                                                                   "max_abs",
                                                                   "nonfinite",
                                                                   "dot",
                                                                   "dot_large",
                                                                   "dot_small",
                                                                   "weight_squares",
                                                                   "weight_squares_large",
                                                                   "weight_squares_small",
                                                                   "count"};

// The *_large and *_small columns hold what float64 squares would lose, divided or multiplied by 2^kRangeShift.
inline constexpr int kRangeShift = 1200;

struct PassEntry {
  TensorView gradient;
  TensorView weight;  // used where has_weight
  bool has_weight = false;
  // Set for a sparse gradient: `gradient` then holds its stored rows, of segment_length elements, and row i of the
  // gradient lies beside row weight_rows[i] of the contiguous weight. Weight sums cover those rows only.
  Segments segments;
  std::size_t segment_length = 0;
  Segments weight_rows;
  double* energies = nullptr;  // [rows]: sum of squares of each row, where asked for
  int energy_exponent = 0;     // out: energies are those of the gradient times 2^-energy_exponent
  bool wants_sums = true;
};

// Fills sums [entries + 1, kColumns], row by row and the last row with all entries merged, and the energies. Returns
// whether any *_large or *_small column holds anything.
bool fused_pass(std::vector<PassEntry>& entries, double* sums, int threads);

}  // namespace normscope
