// Calls every function of csrc/api.h that works on the loss, on small inputs in heap blocks of exactly their size, for
// a build with sanitizers. The last row has no weight, and the logits end before it: reading it is out of bounds.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <memory>
#include <vector>
#include "api.h"

namespace {

constexpr int64_t kRows = 4;
int failures = 0;

void expect(bool holds, const char* what, int64_t columns, int64_t dtype, double k) {
  if (holds) return;
  printf("%s: columns %d, dtype %d, k %g\n", what, int(columns), int(dtype), k);
  ++failures;
}

uint16_t bfloat16(float x) {
  union {
    float f;
    uint32_t bits;
  } u{x};
  return uint16_t(u.bits >> 16);
}

struct Case {
  int64_t columns, dtype;
  float k;
  size_t bytes() const { return dtype == kFloat32 ? 4 : 2; }
  int64_t ids[2][kRows];
  float rates[3][kRows];
  XdlmRows rows;

  // Logits [rows, columns] of shard `rank`, without the last row if it is only read.
  std::unique_ptr<unsigned char[]> logits(int64_t rank, int64_t held) {
    std::unique_ptr<unsigned char[]> block(new unsigned char[size_t(held * columns) * bytes()]);
    for (int64_t i = 0; i < held * columns; ++i) {
      const float x = 3.f * sinf(float(i * 7 + rank * 13 + 1));
      if (dtype == kFloat32)
        reinterpret_cast<float*>(block.get())[i] = x;
      else
        reinterpret_cast<uint16_t*>(block.get())[i] = bfloat16(x);
    }
    return block;
  }
};

void fill(Case& c, int64_t ranks) {
  const int64_t vocab = ranks * c.columns - 2;  // two columns of padding
  for (int64_t i = 0; i < kRows; ++i) {
    c.ids[0][i] = i == 0 ? vocab - 1 : i == 1 ? 3 : 5;  // the mask, x0, another
    c.ids[1][i] = 3;
    c.rates[0][i] = 0.4f;
    c.rates[1][i] = 0.6f;
    c.rates[2][i] = i + 1 < kRows ? -1.f : 0.f;
  }
  c.rows = XdlmRows{nullptr,   c.ids[0],  c.ids[1],  c.rates[0], c.rates[1], c.rates[2], kRows,
                    c.columns, c.columns, c.dtype,   0,          vocab,      vocab - 1,  c.k};
}

bool sound(const float* loss) {
  bool all = loss[kRows - 1] == 0.f && loss[0] > 0.f;
  for (int64_t i = 0; i < kRows; ++i) all = all && isfinite(loss[i]);
  return all;
}

void split(int64_t columns, int64_t dtype, float k, int64_t ranks) {
  Case c{columns, dtype, k, {}, {}, {}};
  fill(c, ranks);
  std::vector<float> stats(ranks * 4 * kRows), merged(5 * kRows), sums(ranks * 2 * kRows), loss(kRows), terms(6 * kRows);
  std::vector<std::unique_ptr<unsigned char[]>> shards;
  int error = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    shards.push_back(c.logits(r, kRows - 1));
    c.rows.logits = shards.back().get();
    c.rows.first_id = r * columns;
    error |= xdlm_nelbo_stats(&c.rows, stats.data() + r * 4 * kRows, nullptr);
  }
  error |= xdlm_nelbo_merge(&c.rows, stats.data(), ranks, merged.data(), nullptr);
  for (int64_t r = 0; r < ranks && k > 0; ++r) {
    c.rows.logits = shards[r].get();
    c.rows.first_id = r * columns;
    error |= xdlm_nelbo_sums(&c.rows, merged.data(), sums.data() + r * 2 * kRows, nullptr);
  }
  error |= xdlm_nelbo_finish(&c.rows, merged.data(), k > 0 ? sums.data() : nullptr, ranks, loss.data(), terms.data(),
                             nullptr);
  const std::vector<float> upstream{1.f, 0.f, 0.5f, 2.f};
  for (int64_t r = 0; r < ranks; ++r) {
    auto out = c.logits(r, kRows);
    c.rows.logits = shards[r].get();
    c.rows.first_id = r * columns;
    error |= xdlm_nelbo_grad(&c.rows, terms.data(), upstream.data(), out.get(), columns, nullptr);
    error |= xdlm_nelbo_rescale(&c.rows, upstream.data(), out.get(), nullptr);
  }
  expect(error == 0, "an error number", columns, dtype, k);
  expect(sound(loss.data()), "split: a loss that cannot be", columns, dtype, k);
}

void whole(int64_t columns, int64_t dtype, float k, int64_t cluster) {
  Case c{columns, dtype, k, {}, {}, {}};
  fill(c, 1);
  auto logits = c.logits(0, kRows - 1), out = c.logits(0, kRows);
  c.rows.logits = logits.get();
  std::vector<float> loss(kRows), terms(6 * kRows);
  int error = xdlm_nelbo_whole(&c.rows, loss.data(), terms.data(), out.get(), columns, cluster, nullptr);
  error |= xdlm_nelbo_whole(&c.rows, loss.data(), terms.data(), nullptr, 0, cluster, nullptr);
  expect(error == 0, "an error number", columns, dtype, k);
  expect(sound(loss.data()), "whole: a loss that cannot be", columns, dtype, k);
  auto both = c.logits(0, kRows);  // the gradient over the logits
  c.rows.logits = both.get();
  error = xdlm_nelbo_whole(&c.rows, loss.data(), terms.data(), both.get(), columns, cluster, nullptr);
  expect(error == 0 && sound(loss.data()), "in place: a loss that cannot be", columns, dtype, k);
  const bool same = memcmp(both.get(), out.get(), size_t(kRows * columns) * c.bytes()) == 0;
  expect(same, "in place: another gradient", columns, dtype, k);
}

}  // namespace

int main() {
  for (float k : {0.f, 0.1f})
    for (int64_t dtype : {int64_t(kFloat32), int64_t(kBfloat16)})
      for (int64_t columns : {int64_t(61), int64_t(520)}) {
        split(columns, dtype, k, columns == 61 ? 2 : 1);
        whole(columns, dtype, k, columns == 61 ? 2 : 3);
      }
  whole(61, kFloat32, 0.1f, 1);
  whole(61, kBfloat16, 0.1f, 8);  // whose last blocks have no columns
  XdlmRows bad{};
  bad.dtype = 7;
  expect(xdlm_nelbo_stats(&bad, nullptr, nullptr) == kBadDtype, "a bad dtype is taken", 0, 7, 0);
  puts(failures ? "failed" : "all sound");
  return failures != 0;
}
