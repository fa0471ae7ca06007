// Draws from small inputs in heap blocks of exactly their size, for a build with sanitizers. The row before the first
// that is drawn from is not there: reading it is out of bounds.
#include <math.h>
#include <stdio.h>
#include <memory>
#include <vector>
#include "api.h"

namespace {

constexpr int64_t kRows = 3;
int failures = 0;

void expect(bool holds, const char* what, int64_t columns, int64_t dtype) {
  if (holds) return;
  printf("%s: columns %d, dtype %d\n", what, int(columns), int(dtype));
  ++failures;
}

uint16_t bfloat16(float x) {
  union {
    float f;
    uint32_t bits;
  } u{x};
  return uint16_t(u.bits >> 16);
}

// Rows [1, kRows] of a shard whose first id is `first`, one number for each id.
std::unique_ptr<unsigned char[]> logits(int64_t first, int64_t columns, int64_t dtype) {
  std::unique_ptr<unsigned char[]> block(new unsigned char[size_t(kRows * columns) * (dtype == kFloat32 ? 4 : 2)]);
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t j = 0; j < columns; ++j) {
      const float x = 0.5f * rintf(6.f * sinf(float((first + j) * 7 + row * 13 + 1)));  // many equals
      if (dtype == kFloat32)
        reinterpret_cast<float*>(block.get())[row * columns + j] = x;
      else
        reinterpret_cast<uint16_t*>(block.get())[row * columns + j] = bfloat16(x);
    }
  return block;
}

struct Drawn {
  std::vector<double> token, of_nucleus;
  std::vector<float> logits;
  std::vector<int64_t> mass, best;
};

Drawn draw(int64_t first, int64_t columns, int64_t vocab, int64_t dtype) {
  const std::vector<int64_t> index{3, 1, 2, 2}, zt{vocab - 1, 3, 0, vocab - 2}, position{0, 5, 6, 7}, row_id{9, 9, 4, 4};
  const int64_t M = int64_t(index.size());
  const auto block = logits(first, columns, dtype);
  const unsigned char* before = block.get() - columns * (dtype == kFloat32 ? 4 : 2);
  const XdlmDraw what{sizeof(XdlmDraw), before, index.data(), zt.data(), position.data(), row_id.data(), M, columns,
                      columns, dtype, first, vocab, vocab - 1, 11, 5, 2, 1.4426950408889634};
  Drawn out{std::vector<double>(size_t(3 * M)), std::vector<double>(size_t(3 * M)), std::vector<float>(size_t(2 * M)),
            std::vector<int64_t>(size_t(512 * M)), std::vector<int64_t>(size_t(512 * M))};
  expect(xdlm_posterior_draw(&what, out.token.data(), nullptr) == 0, "draw", columns, dtype);
  expect(xdlm_posterior_survey(&what, out.logits.data(), out.mass.data(), out.best.data(), nullptr) == 0, "survey",
         columns, dtype);
  // the bin of the most probable token of each row; room for all tokens
  std::vector<int64_t> bin, end, masses(size_t(columns * M)), bests(size_t(columns * M));
  std::vector<float> seen(size_t(columns * M));
  for (int64_t i = 0; i < M; ++i) {
    bin.push_back(int64_t(rint(16.f * fmaxf(out.logits[i], -9.f) * float(what.scale) - 0.5f)));
    end.push_back((i + 1) * columns);
  }
  expect(xdlm_posterior_bin(&what, bin.data(), end.data(), seen.data(), masses.data(), bests.data(), nullptr) == 0, "bin",
         columns, dtype);
  for (int64_t i = 0; i < M; ++i) {
    int64_t mass = 0;
    for (int64_t j = i * columns; j < (i + 1) * columns; ++j) mass += masses[j];
    expect(mass == (out.logits[i] == -INFINITY ? 0 : out.mass[i * 512 + (bin[i] & 511)]), "a bin's mass", columns, dtype);
  }
  if (first == 0 && columns >= vocab)
    for (int64_t cluster : {2, 0})
      expect(xdlm_posterior_nucleus(&what, 0.9, out.of_nucleus.data(), cluster, nullptr) == 0, "nucleus", columns, dtype);
  else
    expect(xdlm_posterior_nucleus(&what, 0.9, nullptr, 0, nullptr) == kDoesNotFit, "a part has no nucleus", columns, dtype);
  return out;
}

void check(int64_t columns, int64_t dtype) {
  const int64_t vocab = columns - 2;  // the mask is the last id; two columns of padding
  const auto both = draw(0, columns, vocab, dtype);
  const auto& whole = both.token;
  for (int i = 0; i < 4; ++i) {
    for (const auto& token : {whole, both.of_nucleus})
      expect(isfinite(token[i]) && token[4 + i] >= 0 && token[4 + i] < double(vocab - 1), "a token", columns, dtype);
    int64_t best = INT64_MIN, mass = 0;  // the draw is the best of all bins
    for (int slot = 0; slot < 512; ++slot) {
      mass += both.mass[i * 512 + slot];
      if (both.best[i * 512 + slot] > best) best = both.best[i * 512 + slot];
    }
    expect(double((1 << 19) - 1 - (best & ((1 << 19) - 1))) == whole[4 + i], "the survey's best", columns, dtype);
    expect(mass >= (vocab - 1) * 32768, "masses", columns, dtype);
  }
  expect(whole[8] == -INFINITY && both.logits[4] == -INFINITY, "the mask has no logit", columns, dtype);
  if (columns % 16) return;
  const auto left = draw(0, columns / 2, vocab, dtype), right = draw(columns / 2, columns / 2, vocab, dtype);
  for (int i = 0; i < 4; ++i) {
    const auto& best = left.token[i] >= right.token[i] ? left.token : right.token;
    expect(best[i] == whole[i] && best[4 + i] == whole[4 + i], "slices", columns, dtype);
    expect(fmax(left.token[8 + i], right.token[8 + i]) == whole[8 + i], "the logit of z", columns, dtype);
  }
}

}  // namespace

int main() {
  for (int64_t columns : {5, 45, 64, 1031, 2064})
    for (int64_t dtype : {kFloat32, kBfloat16}) check(columns, dtype);
  XdlmDraw bad{};
  expect(xdlm_posterior_draw(&bad, nullptr, nullptr) == kBadBinding, "another binding", 0, 0);
  bad.bytes = sizeof bad;
  expect(xdlm_posterior_draw(&bad, nullptr, nullptr) == kBadShape, "no columns", 0, 0);
  bad.dtype = 7;
  expect(xdlm_posterior_draw(&bad, nullptr, nullptr) == kBadDtype, "no such dtype", 0, 0);
  if (failures == 0) printf("all sound\n");
  return failures != 0;
}
