// A token of p for chosen rows of logits, each read once, a block a row.
#include "posterior_race.cuh"

namespace xdlm {

constexpr int kDrawBlocks = 3;  // of an SM: at least 24 warps, each lane with 64 bytes on the way
constexpr int kNoTile = 0x7fffffff;

struct LargestOrNaN {
  XDLM_DEVICE double operator()(double a, double b) const { return a >= b || a != a ? a : b; }
};
struct Lowest {
  XDLM_DEVICE int operator()(int a, int b) const { return smaller(a, b); }
};

// The best key of this thread's tiles, and its tile. A NaN stays.
template <class T>
XDLM_DEVICE double race(const T* source, const Columns& c, const XdlmDraw& draw, const Counter& counter, int& winner) {
  const int64_t first_tile = draw.first_id / kTile, end_tile = first_tile + (c.count + kTile - 1) / kTile;
  const int lane = thread_index() % kLanes, warps = block_threads() / kLanes;
  const float scale = float(draw.scale);
  double best = -INFINITY;
  winner = kNoTile;
  int64_t block = first_tile / (kWords * kLanes) + thread_index() / kLanes;
  for (; block * kWords * kLanes < end_tile; block += warps) {
    Vector<T> v[kWords];
    const int64_t tile = block * kWords * kLanes + lane;
    XDLM_UNROLL for (int i = 0; i < kWords; ++i) {
      const int64_t t = tile + i * kLanes;
      if (t >= first_tile && t < end_tile) fetch(source, int(t - first_tile) * kTile, c, v[i]);
    }
    const Words words = counter.words(kTileDraws + uint32_t(block * kLanes + lane));
    XDLM_UNROLL for (int i = 0; i < kWords; ++i) {
      const int64_t t = tile + i * kLanes;
      if (t < first_tile || t >= end_tile) continue;
      float w[kTile];
      const float top = logits_of(v[i], int(t - first_tile) * kTile, c, w);
      weigh(w, top, scale);
      const double key = first_key(w, top, draw.scale, words.word[i], uint32_t(t), counter);
      if (!(best >= key || best != best)) {
        best = key;
        winner = int(t - first_tile);
      }
    }
  }
  return best;
}

template <class T> XDLM_KERNEL(kDrawThreads, kDrawBlocks) posterior_draw_kernel(XdlmDraw draw, double* XDLM_RESTRICT out) {
  const int64_t m = block_index(), M = draw.rows;
  const T* source = row_of<T>(draw, m);
  const Columns c = columns_of(draw, sizeof(T));
  const Counter counter = counter_of(draw, m);
  int winner;
  const double own = race(source, c, draw, counter, winner);
  const double key = reduce_block(own, LargestOrNaN{}, reinterpret_cast<double*>(shared_memory()));
  winner = reduce_block(own == key ? winner : kNoTile, Lowest{}, reinterpret_cast<int*>(shared_memory()));
  if (thread_index() != 0) return;
  int column = 0;
  if (winner != kNoTile) {
    Vector<T> v;
    float w[kTile];
    fetch(source, winner * kTile, c, v);
    weigh(w, logits_of(v, winner * kTile, c, w), float(draw.scale));
    const int64_t tile = draw.first_id / kTile + winner;
    column = winner * kTile + inverse_cdf(w, counter.rare_words(kFirstDraws + uint32_t(tile)));
  }
  out[m] = key;
  out[M + m] = double(draw.first_id + column);
  out[2 * M + m] = double(logit_of_zt(draw, m, source, c)) * draw.scale;
}

}  // namespace xdlm

using namespace xdlm;

int xdlm_posterior_draw(const XdlmDraw* draw, double* draw_3M, void* stream) {
  const int error = check(*draw);
  if (error != 0) return error;
  const auto kernel = draw->dtype == kFloat32 ? posterior_draw_kernel<float> : posterior_draw_kernel<bf16>;
  return launch(kernel, draw->rows, threads_of(*draw), 1, 32 * sizeof(double), stream, *draw, draw_3M);
}
