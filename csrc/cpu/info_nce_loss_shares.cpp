#include "info_nce_loss_shares.h"

#include <algorithm>
#include <cmath>

namespace m2ae::cpu {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

}  // namespace

Upstream::Upstream(
    const char* op,
    const Tensor& gradient,
    const Tensor& neg,
    const Tensor& pos,
    const Tensor& num,
    const PresentRows& rows,
    bool wanted)
    : rows_(rows),
      wanted_(wanted),
      gradient_(op, "the upstream gradient", gradient, wanted ? rows.all : 0),
      neg_(op, "neg", neg, wanted ? rows.all : 0),
      pos_(op, "pos", pos, wanted ? rows.all : 0),
      num_(op, "num", num, wanted ? rows.all : 0) {}

double Upstream::pos(int64_t i) const {
  return pos_[row(i)] * kLog2E;
}

double Upstream::lse(int64_t i) const {
  return pos(i) + softplus(neg_[row(i)]) * kLog2E;
}

double Upstream::sigma(int64_t i) const {
  return 1 / (1 + std::exp(-double(neg_[row(i)])));
}

double Upstream::of_positive(int64_t i, double logit) const {
  if (count(i) == 1) return -sigma(i);  // no difference: it may be much smaller than 1
  const double r = std::exp2(logit - pos(i));
  return (r - 1 / count(i)) - r * sigma(i);
}

double unit_of(const Upstream& queries, const Upstream& keys) {
  double most = 0;
  bool finite = true;
  for (const Upstream* of : {&queries, &keys}) {
    for (int64_t i = 0; i < of->rows().count; ++i) {
      const double weight = std::fabs(of->weight(i));
      most = std::max(most, weight);
      finite = finite && std::isfinite(weight);
    }
  }
  if (!finite) return 1;
  return most == 0 ? 0 : std::ldexp(1.0, std::ilogb(most));
}

DirectionShares::DirectionShares(const Upstream& of, bool robust, bool by_id)
    : of_(of), by_id_(by_id) {
  const int64_t size = of.rows().count;
  negative_ = Buffer<float>(size);
  if (robust) lse_ = Buffer<float>(size);
  if (!by_id) return;
  for (Buffer<float>* buffer : {&weight_, &positive_, &single_, &inverse_count_, &sigma_})
    *buffer = Buffer<float>(size);
  if (robust) pos_ = Buffer<float>(size);
}

bool DirectionShares::fill(int64_t i, double unit, const NceRange& range) {
  const bool in_loss = of_.in_loss(i);
  const double weight = of_.weight(i) / unit, lse = in_loss ? of_.lse(i) : 0;
  // Within it, powers of two are floats.
  const auto fits = [&](double exponent) { return range.robust || std::fabs(exponent) <= 126; };
  const double reference = range.scale.reference;
  negative_[i] = float(range.robust ? weight : weight * std::exp2(reference - lse));
  if (range.robust) lse_[i] = float(lse);
  const bool fits_negatives = weight == 0 || fits(reference - lse);
  if (!by_id_) return fits_negatives;
  const double pos = in_loss ? of_.pos(i) : 0;
  const bool single = in_loss && of_.count(i) == 1, several = in_loss && !single;
  weight_[i] = float(weight);
  single_[i] = single ? 1 : 0;
  positive_[i] = several ? float(range.robust ? 1 : std::exp2(reference - pos)) : 0;
  inverse_count_[i] = in_loss ? float(1 / of_.count(i)) : 0;
  sigma_[i] = in_loss ? float(of_.sigma(i)) : 0;
  if (range.robust) pos_[i] = float(pos);
  return fits_negatives && (!several || fits(reference - pos));
}

NceShares DirectionShares::at(int64_t i) const {
  const auto from = [&](const Buffer<float>& of) {
    return of.size() == 0 ? nullptr : of.data() + i;
  };
  return {
      from(negative_),
      from(lse_),
      from(weight_),
      from(positive_),
      from(pos_),
      from(single_),
      from(inverse_count_),
      from(sigma_)};
}

}  // namespace m2ae::cpu
