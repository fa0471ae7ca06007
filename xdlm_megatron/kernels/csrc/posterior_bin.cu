// The tokens of one bin of chosen rows, where a survey could not tell which of them are in the nucleus. A block a row, one
// read.
#include "posterior_bins.cuh"

namespace xdlm {

constexpr int kBinBlocks = 3;  // of an SM

template <class T>
XDLM_KERNEL(kDrawThreads, kBinBlocks) posterior_bin_kernel(XdlmDraw draw, const int64_t* XDLM_RESTRICT bin_M,
                                                           const int64_t* XDLM_RESTRICT end_M,
                                                           float* XDLM_RESTRICT logits_E, int64_t* XDLM_RESTRICT mass_E,
                                                           int64_t* XDLM_RESTRICT best_E) {
  uint32_t& count = *reinterpret_cast<uint32_t*>(shared_memory());
  const int64_t m = block_index(), begin = m == 0 ? 0 : end_M[m - 1];
  const int bin = int(bin_M[m]);
  const T* source = row_of<T>(draw, m);
  const Columns c = columns_of(draw, sizeof(T));
  const Counter counter = counter_of(draw, m);
  const float scale = float(draw.scale);
  if (thread_index() == 0) count = 0;
  sync_block();
  for (int tile = thread_index(); tile * kTile < c.count; tile += block_threads()) {
    Vector<T> v;
    float x[kTile], w[kTile];
    fetch(source, tile * kTile, c, v);
    const float top = logits_of(v, tile * kTile, c, x);
    unsigned held = 0;
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) {
      held |= unsigned(x[i] > -INFINITY && bin_of(place_of(x[i], scale)) == bin) << i;
      w[i] = x[i];
    }
    if (held == 0) continue;
    const int64_t place = draw.first_id / kTile + tile, block = place / (kWords * kLanes);
    const Words words = counter.rare_words(kTileDraws + uint32_t(block * kLanes + place % kLanes));
    weigh(w, top, scale);
    const double key = first_key(w, top, draw.scale, word_of(words, int(place / kLanes % kWords)), uint32_t(place), counter);
    all_rings(w, top, draw.scale, key, place, counter, [&](int i, double ring) {
      if ((held >> i & 1) == 0) return;
      const int64_t id = place * kTile + i, at = begin + atomic_add(&count, 1);
      if (at >= end_M[m]) return;
      logits_E[at] = x[i];
      mass_E[at] = mass_of(place_of(x[i], scale));
      best_E[at] = packed(ring, id);
    });
  }
  sync_block();
  for (int64_t at = begin + count + thread_index(); at < end_M[m]; at += block_threads()) {
    logits_E[at] = 0.f;
    mass_E[at] = 0;
    best_E[at] = kNoKey;
  }
}

}  // namespace xdlm

using namespace xdlm;

int xdlm_posterior_bin(const XdlmDraw* draw, const int64_t* bin_M, const int64_t* end_M, float* logits_E, int64_t* mass_E,
                       int64_t* best_E, void* stream) {
  const int error = check(*draw);
  if (error != 0) return error;
  if (!xdlm_survey_fits(draw)) return kDoesNotFit;
  const auto kernel = draw->dtype == kFloat32 ? posterior_bin_kernel<float> : posterior_bin_kernel<bf16>;
  return launch(kernel, draw->rows, threads_for(draw->columns, kDrawThreads), 1, sizeof(uint32_t), stream, *draw, bin_M,
                end_M, logits_E, mass_E, best_E);
}
