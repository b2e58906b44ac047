#include "contrastive_gradients.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace m2ae::cpu {
namespace {

float inverse_norm(const Normalization& normalization, int64_t row) {
  return (normalization.given != nullptr ? normalization.given : normalization.made)[row];
}

// Writes the gradient of row i of one side from that of its packed row, h [depth].
void finish_row(
    const PackedRows& side, int64_t i, const float* h, double scale, GradientOutput output) {
  const Kernels& kernel = kernels();
  const Normalization& normalization = side.normalization();
  const int operand = int(side.operand());
  const char* const row = side.rows(i);
  double a = scale, b = 0;
  const int64_t at = side.present().row_of(i);
  if (normalization.normalize) {
    const float inverse = inverse_norm(normalization, at);
    a *= inverse / double(side.factor(i));
    const bool is_unit = inverse < float(1 / normalization.eps);  // else divided by eps, a constant
    // The row is a unit vector but for rounding, which what is along it must not show.
    if (is_unit)
      b = -a * kernel.dot_gradient[operand](row, h, side.depth()) /
          kernel.dot_rows[operand](row, row, side.depth());
  }
  char* const to =
      static_cast<char*>(output.gradient) + at * side.width() * bytes_of(output.element);
  const auto write = kernel.write_gradient[int(output.element)][operand];
  write(h, a, row, b, side.width(), to);
}

void zero_absent_rows(const PackedRows& side, GradientOutput output) {
  const PresentRows& present = side.present();
  if (present.count == present.all) return;
  const int64_t bytes = side.width() * bytes_of(output.element);
  for (int64_t row = 0; row < present.all; ++row)
    if (present.place_of(row) < 0)
      std::memset(static_cast<char*>(output.gradient) + row * bytes, 0, bytes);
}

}  // namespace

void finish_queries(const GradientFinish& finish, GradientOutput output) {
  const Kernels& kernel = kernels();
  const PackedRows &x = finish.x, &y = finish.y;
  const int64_t depth = x.depth();
  zero_absent_rows(x, output);
  run_parallel(x.tiles(), finish.parallel, [&](int64_t t) {
    const int64_t end = std::min((t + 1) * x.tile(), x.count());
    for (int64_t i = t * x.tile(); i < end; ++i) {
      float* const h = finish.sums.rows(0, i);
      for (int64_t g = 1; g < finish.sums.grid().column_groups; ++g)
        kernel.add(h, finish.sums.rows(g, i), depth);
      const int32_t j = finish.pairs.target[i];
      if (finish.coefficient != nullptr && j >= 0) {
        const float factor = finish.coefficient[i] * x.factor(i) * y.factor(j);
        kernel.add_row[int(y.operand())](y.rows(j), factor, h, depth);
      }
      finish_row(x, i, h, finish.scale, output);
    }
  });
}

void finish_keys(const GradientFinish& finish, GradientOutput output) {
  const Kernels& kernel = kernels();
  const PackedRows &x = finish.x, &y = finish.y;
  const int64_t depth = y.depth(), tile = y.tile();
  const QueriesOfKeys of =
      finish.coefficient == nullptr ? QueriesOfKeys{} : queries_of_keys(finish.pairs);
  zero_absent_rows(y, output);
  run_parallel(y.tiles(), finish.parallel, [&](int64_t t) {
    const int64_t begin = t * tile, end = std::min(begin + tile, y.count());
    float* const sums = finish.sums.columns(0, t);  // [depth, tile]
    for (int64_t g = 1; g < finish.sums.grid().row_groups; ++g)
      kernel.add(sums, finish.sums.columns(g, t), depth * tile);
    Buffer<float> rows(kPadding * depth);
    for (int64_t first = begin; first < end; first += kPadding) {
      kernel.transpose32(sums + (first - begin), tile, depth, kPadding, rows.data(), depth);
      for (int64_t j = first; j < std::min(first + kPadding, end); ++j) {
        float* const h = &rows[(j - first) * depth];
        if (finish.coefficient != nullptr) {
          for (int32_t q = of.start[j]; q < of.start[j + 1]; ++q) {
            const int32_t i = of.query[q];
            const float factor = finish.coefficient[i] * x.factor(i) * y.factor(j);
            kernel.add_row[int(x.operand())](x.rows(i), factor, h, depth);
          }
        }
        finish_row(y, j, h, finish.scale, output);
      }
    }
  });
}

}  // namespace m2ae::cpu
