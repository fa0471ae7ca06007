// What one read of chosen rows tells of every nucleus (diffusion/survey.py): for each bin of probability its mass and the
// first of its tokens to ring. A block a row. The bins lie in a ring of slots, which moves up when a larger logit comes.
//
// Few tokens have a clock of their own drawn: a tile whose first ring comes after that of a token in a higher level, or
// in the bin of its own most probable token, has none that could be the first of a bin and of all bins above it.
#include "posterior_bins.cuh"

namespace xdlm {

constexpr int kSurveyBlocks = 2;  // of an SM
constexpr int kLevels = kSlots / kBinsALevel;
constexpr int kNoBin = -(1 << 30);
XDLM_FN int slot_of(int bin) { return bin & (kSlots - 1); }

struct Table {
  uint32_t mass[kSlots * kCopies];
  int64_t best[kSlots];
  int64_t above[kLevels];  // the best of the levels higher than that of a slot's ring
  float reduce[32];

  // The slots of the bins in (from, to] are those of bins that have none any more.
  XDLM_DEVICE void clear(int from, int to) {
    for (int i = thread_index(); i < (to - from) * kCopies; i += block_threads())
      mass[slot_of(from + 1 + i / kCopies) * kCopies + i % kCopies] = 0;
    for (int i = thread_index(); i < to - from; i += block_threads()) best[slot_of(from + 1 + i)] = kNoKey;
  }

  // By one warp: the level of the top bin may have higher slots in the ring that belong to the lowest level of all.
  XDLM_DEVICE void look_up(int top_bin) {
    const int lane = thread_index(), top_level = top_bin >> 4;
    int64_t most = kNoKey;
    for (int i = 0; i < kBinsALevel; ++i) {
      const int bin = (top_level - lane) * kBinsALevel + i;
      if (bin <= top_bin) most = larger(most, best[slot_of(bin)]);
    }
    // and of the lanes before this one, which have the levels above
    for (int width = 1; width < kLevels; width *= 2) {
      const int64_t other = shuffle(most, larger(0, lane - width));
      most = larger(most, other);
    }
    const int64_t higher = shuffle(most, larger(0, lane - 1));
    above[(top_level - lane) & (kLevels - 1)] = lane == 0 ? kNoKey : higher;
  }
};

// ---- a tile -----------------------------------------------------------------------------------------------------
struct Ring {
  int top_bin;
  float scale;
  XDLM_FN bool has(int bin) const { return bin > top_bin - kSlots; }
};

template <class T>
XDLM_DEVICE void survey_tile(Table& table, const Ring& ring, const Vector<T>& v, int column, const Columns& c,
                             uint32_t word, double scale, int64_t tile, const Counter& counter) {
  float x[kTile], w[kTile];
  const float top = logits_of(v, column, c, x);
  if (top == -INFINITY) return;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) {
    const float y = place_of(x[i], ring.scale);
    const int bin = bin_of(y);
    if (x[i] > -INFINITY && ring.has(bin))
      atomic_add(&table.mass[slot_of(bin) * kCopies + thread_index() % kCopies], mass_of(y));
    w[i] = x[i];
  }
  const int top_bin = bin_of(place_of(top, ring.scale));
  if (!ring.has(top_bin)) return;
  weigh(w, top, ring.scale);
  const double key = first_key(w, top, scale, word, uint32_t(tile), counter);
  if (!(key > -INFINITY)) return;  // NaN, of which the row's largest logit tells
  const int64_t most = packed(key, 0);
  if (table.above[(top_bin >> 4) & (kLevels - 1)] > most || peek(&table.best[slot_of(top_bin)]) > most) return;
  all_rings(w, top, scale, key, tile, counter, [&](int i, double ring_of_i) {
    const int bin = bin_of(place_of(x[i], ring.scale));
    if (x[i] > -INFINITY && ring.has(bin)) atomic_max(&table.best[slot_of(bin)], packed(ring_of_i, tile * kTile + i));
  });
}

template <class T>
XDLM_KERNEL(kDrawThreads, kSurveyBlocks) posterior_survey_kernel(XdlmDraw draw, float* XDLM_RESTRICT logits_2M,
                                                                 int64_t* XDLM_RESTRICT mass_MS,
                                                                 int64_t* XDLM_RESTRICT best_MS) {
  Table& table = *reinterpret_cast<Table*>(shared_memory());
  const int64_t m = block_index();
  const T* source = row_of<T>(draw, m);
  const Columns c = columns_of(draw, sizeof(T));
  const Counter counter = counter_of(draw, m);
  const int64_t first_tile = draw.first_id / kTile, end_tile = first_tile + (c.count + kTile - 1) / kTile;
  const int lane = thread_index() % kLanes, warps = block_threads() / kLanes;
  constexpr int kTilesAWarp = kWords * kLanes;
  Ring ring{kNoBin, float(draw.scale)};
  float highest = -INFINITY;
  table.clear(0, kSlots);
  for (int64_t begin = first_tile / kTilesAWarp; begin * kTilesAWarp < end_tile; begin += warps) {
    const int64_t block = begin + thread_index() / kLanes, tile = block * kTilesAWarp + lane;
    Vector<T> v[kWords];
    XDLM_UNROLL for (int i = 0; i < kWords; ++i) {
      const int64_t t = tile + i * kLanes;
      if (t < first_tile || t >= end_tile) continue;
      const int column = int(t - first_tile) * kTile;
      float x[kTile];
      fetch(source, column, c, v[i]);
      logits_of(v[i], column, c, x);
      XDLM_UNROLL for (int j = 0; j < kTile; ++j) highest = max_or_nan(highest, x[j]);
    }
    highest = reduce_block(highest, LargestLogit{}, table.reduce);
    const int top_bin = highest > -INFINITY ? bin_of(place_of(highest, ring.scale)) : ring.top_bin;
    if (top_bin > ring.top_bin) {
      table.clear(larger(ring.top_bin, top_bin - kSlots), top_bin);
      ring.top_bin = top_bin;
      sync_block();
    }
    if (thread_index() < kLevels) table.look_up(ring.top_bin);
    sync_block();
    const Words words = counter.words(kTileDraws + uint32_t(block * kLanes + lane));
    XDLM_UNROLL for (int i = 0; i < kWords; ++i) {
      const int64_t t = tile + i * kLanes;
      if (t >= first_tile && t < end_tile)
        survey_tile(table, ring, v[i], int(t - first_tile) * kTile, c, words.word[i], draw.scale, t, counter);
    }
  }
  sync_block();
  for (int slot = thread_index(); slot < kSlots; slot += block_threads()) {
    int64_t mass = 0;
    for (int copy = 0; copy < kCopies; ++copy) mass += table.mass[slot * kCopies + copy];
    mass_MS[m * kSlots + slot] = mass;
    best_MS[m * kSlots + slot] = table.best[slot];
  }
  if (thread_index() != 0) return;
  logits_2M[m] = highest;
  logits_2M[draw.rows + m] = logit_of_zt(draw, m, source, c);
}

}  // namespace xdlm

using namespace xdlm;

int64_t xdlm_survey_fits(const XdlmDraw* draw) {
  return draw->vocab_size <= kMostIds;
}

int xdlm_posterior_survey(const XdlmDraw* draw, float* logits_2M, int64_t* mass_MS, int64_t* best_MS, void* stream) {
  const int error = check(*draw);
  if (error != 0) return error;
  if (!xdlm_survey_fits(draw)) return kDoesNotFit;
  const auto kernel = draw->dtype == kFloat32 ? posterior_survey_kernel<float> : posterior_survey_kernel<bf16>;
  return launch(kernel, draw->rows, threads_of(*draw), 1, sizeof(Table), stream, *draw, logits_2M, mass_MS, best_MS);
}
