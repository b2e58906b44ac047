// One tile of the matrix of logits of a contrastive loss, as its loops get it; plain data.
#pragma once

#include <cstdint>

namespace m2ae::cpu {

// What pairs of one id are, where they are not a query and its target.
enum SameId : int { kSameIdNegative = 0, kSameIdAbsent = 1, kSameIdPositive = 2 };
constexpr int kSameIds = 3;

constexpr int64_t kLargestTile =
    256;  // rows and columns: 256 KB of float32, in a second-level cache

struct LogitTile {
  const float* products;  // [rows, ld]
  int64_t ld;
  int64_t rows, columns;                // those that are there
  int64_t padded_rows, padded_columns;  // those that products read of the gradient, in rows of
  int64_t gradient_ld;
  const float* row_factor;     // [rows] or nullptr: products are to be multiplied with it and
  const float* column_factor;  // [columns]
  int64_t first_column;        // in the matrix, as the next two
  const int32_t* target;       // [rows], column of the positive, or -1
  const int32_t* self;         // [rows], column that is absent, or -1; may be nullptr
  const int32_t* row_id;       // [rows]; ids only if same_id is not negative
  const int32_t* column_id;    // [columns]
};

}  // namespace m2ae::cpu
