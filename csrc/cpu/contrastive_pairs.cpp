#include "contrastive_pairs.h"

#include <algorithm>
#include <limits>
#include <unordered_map>
#include <utility>

namespace m2ae::cpu {
namespace {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

PresentRows present_rows(int64_t rows, const RowValues<bool>& mask) {
  PresentRows present;
  present.all = present.count = rows;
  if (!mask.given()) return present;
  present.place = Buffer<int32_t>(rows);
  int32_t count = 0;
  for (int64_t i = 0; i < rows; ++i) present.place[i] = mask[i] ? count++ : -1;
  present.count = count;
  if (count == rows) {
    present.place = {};
    return present;
  }
  present.row = Buffer<int32_t>(std::max(count, 1));  // an empty one would mean all
  for (int64_t i = 0; i < rows; ++i)
    if (present.place[i] >= 0) present.row[present.place[i]] = int32_t(i);
  return present;
}

// Ids as 32-bit numbers: themselves where they fit, or else counted.
void number_ids(
    const RowValues<int64_t>& query_ids,
    const RowValues<int64_t>& key_ids,
    PresentRows* queries,
    PresentRows* keys) {
  bool fits = true;
  const auto each = [&](const RowValues<int64_t>& ids, PresentRows* rows, const auto& visit) {
    for (int64_t i = 0; i < rows->count; ++i) visit(ids[rows->row_of(i)], i);
  };
  const auto look = [&](int64_t id, int64_t) { fits = fits && id == int64_t(int32_t(id)); };
  each(query_ids, queries, look);
  each(key_ids, keys, look);
  std::unordered_map<int64_t, int32_t> numbers;
  for (const auto& [ids, rows] : {std::pair(&query_ids, queries), std::pair(&key_ids, keys)}) {
    rows->id = Buffer<int32_t>(rows->count);
    each(*ids, rows, [&, rows = rows](int64_t id, int64_t i) {
      rows->id[i] =
          fits ? int32_t(id) : numbers.try_emplace(id, int32_t(numbers.size())).first->second;
    });
  }
}

}  // namespace

ContrastivePairs contrastive_pairs(
    const char* op, int64_t N, int64_t M, const PairArguments& arguments) {
  STD_TORCH_CHECK(
      N <= kMostRows && M <= kMostRows, op, ": expected less than 2^31 rows, got ", N, " and ", M);
  const RowValues<bool> query_mask(op, "query_mask", arguments.query_mask, N);
  const RowValues<bool> key_mask(op, "key_mask", arguments.key_mask, M);
  const RowValues<int64_t> target(op, "target", arguments.target, N);
  const RowValues<int64_t> query_ids(op, "query_ids", arguments.query_ids, N);
  const RowValues<int64_t> key_ids(op, "key_ids", arguments.key_ids, M);

  ContrastivePairs pairs;
  pairs.queries = present_rows(N, query_mask);
  pairs.keys = present_rows(M, key_mask);
  pairs.same_id = SameId(arguments.same_id);
  STD_TORCH_CHECK(
      arguments.same_id >= 0 && arguments.same_id < kSameIds &&
          (pairs.same_id == kSameIdNegative || (query_ids.given() && key_ids.given())),
      op,
      ": expected same_id 0, or 1 or 2 with ids of both sides, got ",
      arguments.same_id);
  if (pairs.same_id != kSameIdNegative) number_ids(query_ids, key_ids, &pairs.queries, &pairs.keys);

  const int64_t n = pairs.queries.count, offset = arguments.target_offset;
  const auto place_of = [&](int64_t key) {
    return key >= 0 && key < M ? pairs.keys.place_of(key) : -1;
  };
  pairs.target = Buffer<int32_t>(n);
  if (target.given()) pairs.ignored = Buffer<bool>(n);
  if (arguments.exclude_self) pairs.self = Buffer<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = pairs.queries.row_of(i), itself = row + offset;
    const int64_t key = target.given() ? target[row] : itself;
    const bool is_ignored = target.given() && key == arguments.ignore_index;
    STD_TORCH_CHECK(
        is_ignored || (key >= 0 && key < M),
        op,
        ": expected targets in [0, M = ",
        M,
        ") or ignore_index, got ",
        key);
    const bool is_absent = is_ignored || (arguments.exclude_self && key == itself);
    pairs.target[i] = is_absent ? -1 : place_of(key);
    if (target.given()) pairs.ignored[i] = is_ignored;
    if (arguments.exclude_self) pairs.self[i] = place_of(itself);
  }
  return pairs;
}

QueriesOfKeys queries_of_keys(const ContrastivePairs& pairs) {
  const int64_t n = pairs.queries.count, m = pairs.keys.count;
  QueriesOfKeys of;
  of.start = Buffer<int32_t>(m + 1);
  std::fill_n(of.start.data(), m + 1, 0);
  for (int64_t i = 0; i < n; ++i)
    if (pairs.target[i] >= 0) ++of.start[pairs.target[i] + 1];
  for (int64_t j = 0; j < m; ++j) of.start[j + 1] += of.start[j];
  of.query = Buffer<int32_t>(of.start[m]);
  Buffer<int32_t> next(m);
  std::copy_n(of.start.data(), m, next.data());
  for (int64_t i = 0; i < n; ++i)
    if (pairs.target[i] >= 0) of.query[next[pairs.target[i]]++] = int32_t(i);
  return of;
}

}  // namespace m2ae::cpu
