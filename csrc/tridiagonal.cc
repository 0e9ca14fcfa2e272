// Eigenvalues of a symmetric tridiagonal matrix by the QL iteration without square roots of Pal, Walker and Kahan
// (Parlett, The Symmetric Eigenvalue Problem, section 8.15), on squares of the off-diagonal entries.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "singular_values.h"

namespace normscope {
namespace {

constexpr double kHalfUlp = std::numeric_limits<double>::epsilon() / 2;
constexpr std::size_t kSweepsEach = 50;  // two are usual

// One block [first, last] whose off-diagonal entries are all there. d is the diagonal, b the squared off-diagonal.
class Iteration {
 public:
  Iteration(double* d, double* b, std::size_t sweeps) : d_(d), b_(b), sweeps_(sweeps) {}

  bool solve(std::size_t first, std::size_t last) {
    while (first < last) {
      std::size_t end = first;
      while (end < last && !negligible(end)) ++end;
      if (end < last) b_[end] = 0.0;
      if (end == first) {
        ++first;  // d[first] is an eigenvalue
      } else if (sweeps_-- == 0) {
        return false;
      } else {
        sweep(first, end);
      }
    }
    return true;
  }

 private:
  bool negligible(std::size_t i) const { return b_[i] <= kHalfUlp * kHalfUlp * std::fabs(d_[i] * d_[i + 1]); }

  // The eigenvalue of the leading 2 x 2 block that is nearer to its first entry (Wilkinson).
  double shift(std::size_t first) const {
    const double root = std::sqrt(b_[first]);
    const double half_gap = (d_[first + 1] - d_[first]) / (2.0 * root);
    return d_[first] - root / (half_gap + std::copysign(std::hypot(half_gap, 1.0), half_gap));
  }

  void sweep(std::size_t first, std::size_t last) {
    const double sigma = shift(first);
    double gamma = d_[last] - sigma, p = gamma * gamma, s = 0.0;
    double previous_p = 1.0, previous_r = 1.0;
    for (std::size_t i = last; i-- > first;) {
      const double b = b_[i], r = p + b;
      if (i + 1 != last) b_[i + 1] = s * r;
      // The cosine is p / r and the sine b / r; gamma is divided once, so that no two divisions wait for each other.
      const double old_gamma = gamma, next = d_[i];
      s = b / r;
      gamma = (p * (next - sigma) - b * old_gamma) / r;
      d_[i + 1] = old_gamma + (next - gamma);
      const double next_p = p != 0.0 ? gamma * gamma * (r / p) : b * (previous_p / previous_r);
      previous_p = p;
      previous_r = r;
      p = next_p;
    }
    b_[first] = s * p;
    d_[first] = sigma + gamma;
  }

  double* d_;
  double* b_;
  std::size_t sweeps_;
};

}  // namespace

bool tridiagonal_eigenvalues(double* diagonal, double* off_diagonal, std::size_t size) {
  std::size_t first = 0;
  for (std::size_t last = 0; last < size; ++last) {
    const bool ends = last + 1 == size || std::fabs(off_diagonal[last]) <= kHalfUlp *
                                                                               std::sqrt(std::fabs(diagonal[last])) *
                                                                               std::sqrt(std::fabs(diagonal[last + 1]));
    if (!ends) {
      off_diagonal[last] *= off_diagonal[last];
      continue;
    }
    // The iteration works from the first entry on and wants the small ones there.
    if (std::fabs(diagonal[last]) < std::fabs(diagonal[first])) {
      std::reverse(diagonal + first, diagonal + last + 1);
      std::reverse(off_diagonal + first, off_diagonal + last);
    }
    if (!Iteration(diagonal, off_diagonal, kSweepsEach * (last - first + 1)).solve(first, last)) return false;
    first = last + 1;
  }
  std::sort(diagonal, diagonal + size);
  return std::isfinite(std::accumulate(diagonal, diagonal + size, 0.0));
}

}  // namespace normscope
