// What the sampler asks of rows of logits: the largest, and the logarithm of the sum of exponents.
//
// A row's bits depend on nothing but the row.

#pragma once

#include <algorithm>
#include <cmath>

#include "cpu_threads.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t CHAINS = 4;  // independent sums, so that one need not wait for another
constexpr int64_t STRIDE = CHAINS * LANES;

// Return numbers `start` to `start` + LANES of a row (n,), and `filler` where it has ended.
inline Floats load_up_to(const float* row, int64_t start, int64_t n, float filler) {
  if (start + LANES <= n) return load<Floats>(row + start);
  Floats x = Floats{} + filler;
  if (start < n) std::memcpy(&x, row + start, 4 * (n - start));
  return x;
}

// Return the largest number of a row; NaN is larger than none.
inline float largest_of(const float* row, int64_t n) {
  Floats largest[CHAINS];
  std::fill_n(largest, CHAINS, Floats{} - INFINITY);
  for (int64_t start = 0; start < n; start += STRIDE) {
    for (int c = 0; c < CHAINS; c++) {
      Floats x = load_up_to(row, start + c * LANES, n, -INFINITY);
      largest[c] = x > largest[c] ? x : largest[c];
    }
  }
  const float* numbers = (const float*)largest;
  return *std::max_element(numbers, numbers + STRIDE);
}

// Return where the first of a row's largest numbers is.
inline int32_t first_largest_of(const float* row, int64_t n) {
  int64_t at = std::find(row, row + n, largest_of(row, n)) - row;
  return std::min(at, n - 1);  // nothing but NaN
}

// Return log(sum(exp(x))) of a row: its sums are by lane, then over lanes, in float32.
inline float log_sum_exp_of(const float* row, int64_t n) {
  float largest = largest_of(row, n);
  float shift = std::isfinite(largest) ? largest : 0;
  Floats sums[CHAINS] = {};
  for (int64_t start = 0; start < n; start += STRIDE) {
    for (int c = 0; c < CHAINS; c++) {
      sums[c] += exp(load_up_to(row, start + c * LANES, n, -INFINITY) - shift);
    }
  }
  Floats lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (int j = 0; j < LANES; j++) sum += lanes[j];
  return shift + std::log(sum);
}

// Call row_result(row, n) for each of the rows x (M, n), and write what it returns to y (M,).
template <class Result>
void for_each_row(const float* x, int64_t M, int64_t n, Result (*row_result)(const float*, int64_t),
                  Result* y) {
  team.run(M, M * n < PARALLEL_WORK / 8, [&](int64_t i) { y[i] = row_result(x + i * n, n); });
}

}  // namespace
