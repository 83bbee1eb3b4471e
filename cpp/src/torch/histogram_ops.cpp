// histogram_update_: private counts for each thread, added up where no value was NaN. search_histogram: the range of
// codes that loses least.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "halfbyte/dispatch.h"
#include "halfbyte/histogram_search.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least

template <class Count>
void add_to(Tensor& counts, const std::vector<int64_t>& totals) {
  auto* out = static_cast<Count*>(counts.mutable_data_ptr());
  for (size_t bin = 0; bin < totals.size(); ++bin) out[bin] += static_cast<Count>(totals[bin]);
}

}  // namespace

Tensor histogram_update_(Tensor counts, Tensor x, double low, double high) {
  const FloatType type = float_type(x, "x");
  check(counts.dim() == 1 && counts.is_contiguous(), "counts is not a contiguous vector");
  const bool integers = counts.scalar_type() == ScalarType::Long;
  if (!integers) check_type(counts, ScalarType::Double, "counts");
  const int64_t bins = counts.size(0);
  check(bins >= 1 && bins <= kMaxHistogramBins, "counts has ", bins, " bins; 1 to ", kMaxHistogramBins, " are allowed");
  const HistogramRange range = {.low = static_cast<float>(low),
                                .bins_per_unit = static_cast<float>(static_cast<double>(bins) / (high - low)),
                                .bins = bins};
  check(low < high && std::isfinite(range.low) && std::isfinite(range.bins_per_unit) && range.bins_per_unit > 0,
        "low=", low, " and high=", high, " are not a range that ", bins, " bins can cut in float32");

  const Tensor input = as_contiguous(x);
  const auto* in = static_cast<const char*>(input.const_data_ptr());
  const int64_t count = input.numel(), bytes = type == FloatType::kFloat32 ? 4 : 2;
  // A chunk pays for its copies of the bins with at least as many elements.
  const int64_t chunks = std::clamp<int64_t>(count / std::max(kGrain, kHistogramCopies * bins), 1,
                                             static_cast<int64_t>(torch::stable::get_num_threads()));
  std::vector<std::vector<int64_t>> parts(static_cast<size_t>(chunks));
  std::atomic<int64_t> nans = 0;
  const auto kernel = kernels().histogram.count;
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::vector<int64_t>& totals = parts[static_cast<size_t>(chunk)];
      totals.resize(static_cast<size_t>(bins));
      std::vector<uint32_t> copies(static_cast<size_t>(kHistogramCopies * bins));
      const int64_t chunk_end = count * (chunk + 1) / chunks;
      for (int64_t at = count * chunk / chunks; at < chunk_end; at += kMaxHistogramCount) {
        std::fill(copies.begin(), copies.end(), 0u);
        nans += kernel(in + at * bytes, type, std::min(kMaxHistogramCount, chunk_end - at), range, copies.data());
        const uint32_t* copy = copies.data();
        for (int64_t n = 0; n < kHistogramCopies; ++n, copy += bins) {
          for (int64_t bin = 0; bin < bins; ++bin) totals[static_cast<size_t>(bin)] += copy[bin];
        }
      }
    }
  });
  Tensor nan_count = new_tensor({}, ScalarType::Long);
  *static_cast<int64_t*>(nan_count.mutable_data_ptr()) = nans;
  if (nans > 0) return nan_count;
  for (const std::vector<int64_t>& totals : parts) (integers ? add_to<int64_t> : add_to<double>)(counts, totals);
  return nan_count;
}

Tensor search_histogram(Tensor counts, double low, double high, int64_t qmin, int64_t qmax, bool symmetric) {
  check(counts.dim() == 1 && counts.is_contiguous(), "counts is not a contiguous vector");
  const bool integers = counts.scalar_type() == ScalarType::Long;
  if (!integers) check_type(counts, ScalarType::Double, "counts");
  const int64_t bins = counts.size(0);
  check(bins >= 1 && bins <= kMaxHistogramBins, "counts has ", bins, " bins; 1 to ", kMaxHistogramBins, " are allowed");
  check(std::isfinite(low) && std::isfinite(high) && low < high, "low=", low, " and high=", high, " are not a range");
  check(qmin < qmax && qmax > 0, "qmin=", qmin, " and qmax=", qmax, " are not a range of codes");
  std::vector<double> values(static_cast<size_t>(bins)), moments(static_cast<size_t>(3 * (bins + 1)));
  for (int64_t i = 0; i < bins; ++i) {
    values[static_cast<size_t>(i)] = integers
                                         ? static_cast<double>(static_cast<const int64_t*>(counts.const_data_ptr())[i])
                                         : static_cast<const double*>(counts.const_data_ptr())[i];
  }
  const HistogramView view = {values.data(), bins, low, (high - low) / static_cast<double>(bins)};
  const SearchedRange range = search_histogram_range(view, {qmin, qmax, symmetric}, moments.data());
  Tensor result = new_tensor({3}, ScalarType::Double);
  auto* out = static_cast<double*>(result.mutable_data_ptr());
  out[0] = range.low, out[1] = range.high, out[2] = range.mean_squared_error;
  return result;
}

}  // namespace halfbyte::ops
