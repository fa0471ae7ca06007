// Bins of probability (diffusion/survey.py): a sixteenth of a power of two each, with masses in integers, so that no order
// of summation matters; and the clocks of all columns of a tile.
#pragma once
#include "posterior_race.cuh"

namespace xdlm {

constexpr int kBinsALevel = 16, kSlots = 512;
constexpr int kCopies = 8;  // of the masses: the threads of a warp often add to the same slot
constexpr int kLargest = 1 << 17, kMassBits = 15, kIdBits = 19;
// Of this vocabulary all may fall into one slot: an eighth of them, 2^16 each, in the 32 bits of a copy.
constexpr int64_t kMostIds = (int64_t(1) << 19) - 64, kIdMask = (int64_t(1) << kIdBits) - 1;
constexpr int64_t kNoKey = INT64_MIN;

// Adding 1.5 * 2^23 rounds a float below 2^22 to an integer, which the lowest bits then hold.
XDLM_FN float rounded(float x) { return (x + 12582912.f) - 12582912.f; }
XDLM_FN int integer_of(float x) { return int(bits_of(x + 12582912.f) - 0x4b400000u); }

XDLM_FN float place_of(float x, float scale) { return fminf(fmaxf(x * scale, -float(kLargest)), float(kLargest)); }
XDLM_FN int bin_of(float y) { return integer_of(float(kBinsALevel) * y - 0.5f); }
// 2^(y - level) in units of 2^-15; the level is that of the bin.
XDLM_FN uint32_t mass_of(float y) {
  const float bin = rounded(float(kBinsALevel) * y - 0.5f);
  const float level = rounded(bin * (1.f / kBinsALevel) - 15.f / 32.f);  // floor(bin / 16)
  return uint32_t(integer_of(32768.f * fast_exp2(y - level)));
}
// The first bits of a key and an id as one number, as diffusion/survey.py unpacks it. `ordered` is its own inverse.
XDLM_FN int64_t ordered(int64_t bits) { return bits ^ (bits >> 63 & INT64_MAX); }
XDLM_FN int64_t packed(double key, int64_t id) { return (ordered(bits_of(key)) | kIdMask) - id; }
XDLM_FN double key_of(int64_t best) { return double_of(ordered(best & ~kIdMask)); }
XDLM_FN int64_t id_of(int64_t best) { return kIdMask - (best & kIdMask); }

struct LargestLogit {
  XDLM_DEVICE float operator()(float a, float b) const { return max_or_nan(a, b); }
};

// `take(i, key)` for all columns of a tile whose first ring has `key`: the first's, and of each other one an exponential
// time more than the first.
template <class Take>
XDLM_DEVICE void all_rings(const float (&w)[8], float top, double scale, double key, int64_t tile, const Counter& counter,
                           Take take) {
  const int first = inverse_cdf(w, counter.rare_words(kFirstDraws + uint32_t(tile)));
  XDLM_UNROLL for (int pair = 0; pair < kTile / 2; ++pair) {
    const Words words = counter.rare_words(kLaterDraws + 4 * uint32_t(tile) + uint32_t(pair));
    XDLM_UNROLL for (int half = 0; half < 2; ++half) {
      const int i = 2 * pair + half;
      const float ratio = fast_log2(w[i]) - log2_exponential(words.word[2 * half], words.word[2 * half + 1]);
      const double own = fma(double(top), scale, double(ratio));
      const float apart = float(fabs(own - key));
      const double later = fmin(own, key) - double(fast_log2(1.f + fast_exp2(-apart)));
      take(i, i == first ? key : later);
    }
  }
}

}  // namespace xdlm
