// Calls the core from several threads at once, each of which asks for threads of its own, and compares every result
// with that of one thread. Outside a PyTorch process the jobs run on std::thread, which ThreadSanitizer sees into.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string_view>
#include <thread>
#include <vector>

#include "fused_pass.h"
#include "gram.h"
#include "kernels.h"
#include "order_statistics.h"
#include "singular_values.h"
#include "threads.h"

namespace {

using namespace normscope;

constexpr int kCallers = 4;
constexpr int kRounds = 3;

// Numbers in [-1, 1) that need all 53 bits.
std::vector<double> numbers(std::size_t count, std::uint64_t seed) {
  std::vector<double> values(count);
  std::uint64_t state = seed;
  for (double& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = std::scalbn(static_cast<double>(state >> 11), -52) - 1.0;
  }
  return values;
}

std::vector<float> narrow(const std::vector<double>& values) { return {values.begin(), values.end()}; }

// The leading half of a float32 is a bfloat16.
std::vector<std::uint16_t> bfloat16(const std::vector<double>& values) {
  std::vector<std::uint16_t> result;
  for (float value : narrow(values)) {
    result.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16));
  }
  return result;
}

template <class Element>
TensorView matrix(const std::vector<Element>& data, DType dtype, std::int64_t rows, std::int64_t columns,
                  std::int64_t row_stride, std::int64_t column_stride) {
  const std::array shape{rows, columns}, strides{row_stride, column_stride};
  return {data.data(), dtype, shape.size(), shape.data(), strides.data()};
}

struct Inputs {
  std::vector<double> wide = numbers(300 * 700, 1);
  std::vector<float> gradient = narrow(wide), weight = narrow(numbers(300 * 700, 2));
  std::vector<std::uint16_t> half = bfloat16(wide);
  std::vector<float> hostile = gradient;
  std::vector<double> huge = wide;
  std::vector<std::int64_t> order, offsets, positions, every_row;  // 900 stored rows of 100 become 300

  Inputs() {
    hostile[70'000] = std::numeric_limits<float>::quiet_NaN();
    hostile[150'000] = -std::numeric_limits<float>::infinity();
    for (double& value : huge) value *= 0x1p700;
    for (std::int64_t row = 0; row < 900; ++row) order.push_back(row * 7 % 900);
    for (std::int64_t row = 0; row <= 300; ++row) offsets.push_back(3 * row);
    positions.resize(300);
    std::iota(positions.rbegin(), positions.rend(), 0);
    every_row.resize(301);
    std::iota(every_row.begin(), every_row.end(), 0);
  }

  // Contiguous, transposed, strided, not finite, out of range, beside weights of the same and of another layout;
  // sparse.
  std::vector<PassEntry> entries() const {
    std::vector<PassEntry> list(7);
    list[0].gradient = matrix(gradient, DType::float32, 300, 700, 700, 1);
    list[1].gradient = matrix(gradient, DType::float32, 700, 300, 1, 700);
    list[2].gradient = matrix(wide, DType::float64, 150, 350, 1400, 2);
    list[3].gradient = matrix(half, DType::bfloat16, 300, 650, 700, 1);
    list[4].gradient = matrix(hostile, DType::float32, 300, 700, 700, 1);
    list[5].gradient = matrix(huge, DType::float64, 300, 700, 700, 1);
    list[0].weight = list[4].weight = matrix(weight, DType::float32, 300, 700, 700, 1);
    list[1].weight = matrix(weight, DType::float32, 700, 300, 300, 1);
    list[5].weight = matrix(wide, DType::float64, 300, 700, 1, 300);
    PassEntry& sparse = list[6];
    sparse.gradient = matrix(gradient, DType::float32, 900, 100, 100, 1);
    sparse.segments = {order.data(), offsets.data(), 300};
    sparse.segment_length = 100;
    sparse.weight = matrix(weight, DType::float32, 300, 100, 100, 1);
    sparse.weight_rows = {positions.data(), every_row.data(), 300};
    for (PassEntry& entry : list) entry.has_weight = entry.weight.data != nullptr;
    return list;
  }

  // Tall and wide, of one block and of several, not finite, out of range.
  std::vector<Matrix> matrices() const {
    return {
        {.data = gradient.data(), .dtype = DType::float32, .vectors = 20, .steps = 10'000, .stride = 20},
        {.data = gradient.data(),
         .dtype = DType::float32,
         .vectors = 280,
         .steps = 700,
         .stride = 700,
         .side_by_side = false},
        {.data = half.data(), .dtype = DType::bfloat16, .vectors = 100, .steps = 300, .stride = 700},
        {.data = hostile.data(), .dtype = DType::float32, .vectors = 300, .steps = 700, .stride = 300},
        {.data = huge.data(), .dtype = DType::float64, .vectors = 33, .steps = 90, .stride = 40},
    };
  }
};

// Singular values of the matrices and their Gram matrices' products with three vectors, one matrix after another.
void add_spectra(const Inputs& inputs, int threads, std::vector<double>& values) {
  const std::vector<Matrix> matrices = inputs.matrices();
  std::vector<std::vector<double>> spectra;
  std::vector<AlignedRoom> rooms;
  std::vector<double*> targets;
  std::vector<Vectors> blocks, products;
  for (const Matrix& each : matrices) {
    targets.push_back(spectra.emplace_back(each.vectors).data());
    const std::size_t stride = round_up(each.vectors, kLanes);
    double* block = rooms.emplace_back(6 * stride).data();
    for (std::size_t q = 0; q < 3; ++q) std::copy_n(inputs.wide.data() + q, each.vectors, block + q * stride);
    blocks.push_back({block, stride, 3});
    products.push_back({block + 3 * stride, stride, 3});
  }
  for (const SpectrumStatus status : singular_values(matrices, targets, threads)) {
    values.push_back(static_cast<double>(status));
  }
  gram_products(matrices, blocks, products, threads);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    values.insert(values.end(), spectra[i].begin(), spectra[i].end());
    values.insert(values.end(), products[i].data, products[i].data + 3 * products[i].stride);
  }
}

// All that the core says of the inputs: sums, energies, the order statistics of one tensor's energies, spectra.
std::vector<double> results(const Inputs& inputs, int threads) {
  std::vector<PassEntry> entries = inputs.entries();
  std::vector<std::vector<double>> energies;
  for (PassEntry& entry : entries) {
    energies.emplace_back(entry.segments.offsets != nullptr ? entry.segments.count : entry.gradient.rows);
    entry.energies = energies.back().data();
  }
  std::vector<double> values((entries.size() + 1) * kColumns);
  fused_pass(entries, values.data(), threads);
  for (const std::vector<double>& rows : energies) values.insert(values.end(), rows.begin(), rows.end());

  const std::array fractions{0.5, 0.9, 0.99};
  std::array<double, fractions.size()> counts{};
  const OrderQuery query{.energies = energies[1].data(),
                         .count = energies[1].size(),
                         .threshold = 0.9,
                         .fractions = fractions.data(),
                         .n_fractions = fractions.size(),
                         .stride = 26};
  const OrderResult order = order_statistics(query, counts.data());
  values.insert(values.end(), counts.begin(), counts.end());
  values.insert(values.end(), {order.gini, order.fraction_below, order.group_variance, order.group_max, order.group_min,
                               order.group_mean});
  add_spectra(inputs, threads, values);
  return values;
}

bool same_bits(double a, double b) { return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b); }

std::size_t count_differences(const std::vector<double>& a, const std::vector<double>& b) {
  std::size_t differences = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) differences += same_bits(a[i], b[i]) ? 0 : 1;
  return differences;
}

// Results of concurrent calls that differ from those of one call on one thread.
std::size_t differences_on(const Inputs& inputs) {
  const std::vector<double> expected = results(inputs, 1);
  std::array<std::size_t, kCallers> differences{};
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < kRounds; ++round) {
        const int threads = 1 + (static_cast<int>(caller) + round) % kCallers;
        differences[caller] += count_differences(results(inputs, threads), expected);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  return std::accumulate(differences.begin(), differences.end(), std::size_t{0});
}

// Two calls that write to the same place. ThreadSanitizer must see it: it proves that it looks into the core.
void race() {
  const std::vector<double> data = numbers(100'000, 3);
  std::vector<double> sums(2 * kColumns);
  const auto call = [&] {
    std::vector<PassEntry> entries(1);
    entries[0].gradient = matrix(data, DType::float64, 100, 1000, 1000, 1);
    fused_pass(entries, sums.data(), 2);
  };
  std::thread other(call);
  call();
  other.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (std::string_view(thread_source()) != "std::thread") return EXIT_FAILURE;
  if (argc == 2 && std::string_view(argv[1]) == "race") {
    race();
    return EXIT_SUCCESS;
  }
  const Inputs inputs;
  std::array<const char*, 8> sets{};
  const std::size_t n_sets = instruction_sets(sets.data(), sets.size());
  bool all_same = true;
  for (std::size_t s = 0; s < n_sets; ++s) {
    use_instruction_set(sets[s]);
    const std::size_t differences = differences_on(inputs);
    std::printf("%s: %d concurrent calls, %zu values differ\n", sets[s], kCallers * kRounds, differences);
    all_same = all_same && differences == 0;
  }
  return all_same ? EXIT_SUCCESS : EXIT_FAILURE;
}
