// Gram matrices in waves that fit in bounded memory, then one eigenvalue problem a job, largest first.
#include "singular_values.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "threads.h"

namespace normscope {
namespace {

constexpr std::size_t kWaveBytes = std::size_t{64} << 20;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Squares of singular values that neither overflow nor vanish when they are squared once more.
constexpr double kSmallestSquare = 1e-100, kLargestSquare = 1e100;

struct Extent {
  bool finite;
  double largest;
};

Extent extent_of(const Matrix& matrix) {
  Extent extent{true, 0.0};
  const std::size_t rows = matrix.side_by_side ? matrix.steps : matrix.vectors;
  const std::size_t length = matrix.side_by_side ? matrix.vectors : matrix.steps;
  for (std::size_t row = 0; row < rows; ++row) {
    const RunSums sums =
        kernels(matrix.dtype).gradient(element_at(matrix.data, matrix.dtype, row * matrix.stride), length);
    extent.largest = std::max(extent.largest, sums.max_abs);
    // The sum of magnitudes may overflow where no element is infinite; a NaN shows in it.
    extent.finite = extent.finite && !std::isnan(sums.sum_abs) && !std::isinf(sums.max_abs);
  }
  return extent;
}

double largest_square(const Symmetric& gram) {
  double largest = 0.0;
  for (std::size_t i = 0; i < gram.size; ++i) {
    const double square = gram.data[i * gram.stride + i];
    if (!(square <= std::numeric_limits<double>::max())) return kNaN;
    largest = std::max(largest, square);
  }
  return largest;
}

SpectrumStatus spectrum_of(const Symmetric& gram, double scale, double* values) {
  const std::size_t n = gram.size;
  thread_local AlignedRoom kept;
  const std::size_t size = tridiagonal_room(gram.stride);
  double* room = kept.at_least(size + n);
  double* off_diagonal = room + size;
  matrix_kernels(DType::float64).tridiagonalise(gram, values, off_diagonal, room);
  if (!tridiagonal_eigenvalues(values, off_diagonal, n)) {
    std::fill(values, values + n, kNaN);
    return SpectrumStatus::failed;
  }
  std::reverse(values, values + n);
  for (std::size_t i = 0; i < n; ++i) values[i] = std::sqrt(std::max(values[i], 0.0)) / scale;
  return SpectrumStatus::complete;
}

SpectrumStatus finish(Matrix matrix, std::vector<SymmetricRoom>& room, double* values) {
  const std::size_t n = matrix.vectors;
  const double square = largest_square(room[0].view());
  if (square >= kSmallestSquare && square <= kLargestSquare) return spectrum_of(room[0].view(), 1.0, values);
  const Extent extent = extent_of(matrix);
  std::fill(values, values + n, extent.finite ? 0.0 : kNaN);
  if (!extent.finite) return SpectrumStatus::nonfinite;
  if (extent.largest == 0.0) return SpectrumStatus::complete;
  // Out of range, which only float64 elements can be: once more with the largest of them near 1.
  matrix.scale = std::ldexp(1.0, -std::clamp(std::ilogb(extent.largest), -1022, 1022));
  room[0] = SymmetricRoom(n);
  gram({matrix}, room, 1);
  return spectrum_of(room[0].view(), matrix.scale, values);
}

}  // namespace

std::vector<SpectrumStatus> singular_values(const std::vector<Matrix>& matrices, const std::vector<double*>& values,
                                            int threads) {
  std::vector<SpectrumStatus> results(matrices.size(), SpectrumStatus::complete);
  for (std::size_t start = 0; start < matrices.size();) {
    std::vector<Matrix> wave;
    std::vector<SymmetricRoom> grams;
    std::size_t end = start, bytes = 0;
    for (; end < matrices.size() && (end == start || bytes < kWaveBytes); ++end) {
      bytes += matrices[end].vectors * matrices[end].vectors * sizeof(double);
      wave.push_back(matrices[end]);
      grams.emplace_back(matrices[end].vectors);
    }
    gram(wave, grams, threads);

    std::vector<std::size_t> order(wave.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return wave[a].vectors > wave[b].vectors; });
    auto solve = [&](std::size_t position) {
      const std::size_t index = order[position];
      std::vector<SymmetricRoom> room;
      room.push_back(std::move(grams[index]));
      if (wave[index].vectors > 0) results[start + index] = finish(wave[index], room, values[start + index]);
    };
    parallel_for(wave.size(), threads, solve);
    start = end;
  }
  return results;
}

}  // namespace normscope
