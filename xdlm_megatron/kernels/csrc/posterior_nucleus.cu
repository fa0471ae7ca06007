// A token of the first top_p of p for chosen rows, each read once, where one rank has the whole vocabulary: a cluster of
// blocks keeps a row in its shared memory, finds there where the nucleus ends as diffusion/nucleus.py does, and runs the
// race among its tokens.
//
// Tokens are ordered by logit, and equals by id: the bits of both make one number, of which each search fixes eight more
// bits until no token of those left would fit. A thread visits the same tiles in every pass, and notes those that matter.
#include "posterior_bins.cuh"

namespace xdlm {

constexpr int kNucleusBlocks = 2;               // of an SM: one loads while the other computes
constexpr int kTilesAWarp = kWords * kLanes;
constexpr int kMostBlocks = 8;                  // the largest cluster that every device with clusters has
constexpr int64_t kSliceBytes = 64 * 1024;      // of a row in a block, so that kNucleusBlocks fit
constexpr int kTilesAThread = 64;               // a bit each
constexpr int kColumnBits = 24, kDigits = 256;
template <class T> constexpr int kOrderBits = kColumnBits + 8 * int(sizeof(T));

// Where the nucleus ends: bins above `bin` lie inside, and of that bin's tokens those of an order of `least` or more.
struct End {
  uint64_t least, prefix;  // prefix: of the order of the tokens that do not all fit into room
  int64_t room, mass;
  int bin, slot;
};

struct alignas(128) Scratch {
  uint32_t copies[kSlots * kCopies];
  int64_t sums[2][kSlots];  // for the others of the cluster, who may be one search behind
  int64_t total[kSlots];
  int64_t best, winners[kMostBlocks];
  float tops[kMostBlocks], reduce[32];
  End end;

  // What all blocks have added to the slots, in `total`; the copies are empty again.
  XDLM_DEVICE void add_up(int search, int slots, int cluster) {
    sync_block();
    int64_t* own = sums[search % 2];
    for (int slot = thread_index(); slot < slots; slot += block_threads()) {
      int64_t sum = 0;
      for (int copy = 0; copy < kCopies; ++copy) {
        sum += copies[slot * kCopies + copy];
        copies[slot * kCopies + copy] = 0;
      }
      own[slot] = sum;
    }
    exchange(cluster);
    for (int slot = thread_index(); slot < slots; slot += block_threads()) {
      int64_t sum = 0;
      for (int rank = 0; rank < cluster; ++rank) sum += in_block(own, rank)[slot];
      total[slot] = sum;
    }
    sync_block();
  }

  XDLM_DEVICE void add(int slot, uint32_t mass) {
    atomic_add(&copies[slot * kCopies + thread_index() % kCopies], mass);
  }
};

// How much of the slots fits, and how a slot's mass counts.
struct Room {
  int64_t left;
  XDLM_FN int64_t of(int64_t) const { return left; }
  XDLM_FN int64_t weight(int, int64_t mass) const { return mass; }
};
// Bins from the top one down, of which top_p fit, in units of 2^-30 of the top one's level.
struct Budget {
  double top_p;
  int top_bin;
  XDLM_FN int64_t of(int64_t all) const { return smaller(int64_t(double(all) * top_p), all - 1); }
  XDLM_FN int below(int slot) const { return (top_bin >> 4) - ((top_bin - slot) >> 4); }
  XDLM_FN int64_t weight(int slot, int64_t mass) const { return (mass << kMassBits) >> below(slot); }
};

// By one warp: end.slot is the first slot that does not all fit, end.mass its mass, end.room what of it fits.
template <class Fit> XDLM_DEVICE void find_slot(Scratch& scratch, int slots, Fit fit) {
  const int lane = thread_index(), each = slots / kLanes;
  int64_t own = 0;
  for (int slot = lane * each; slot < (lane + 1) * each; ++slot) own += fit.weight(slot, scratch.total[slot]);
  int64_t after = own;
  for (int width = 1; width < kLanes; width *= 2) {
    const int64_t other = shuffle(after, larger(0, lane - width));
    if (lane >= width) after += other;
  }
  const int64_t room = fit.of(shuffle(after, kLanes - 1));
  if (after <= room || after - own > room) return;
  int64_t before = after - own;
  int slot = lane * each;
  for (;; ++slot) {
    const int64_t here = fit.weight(slot, scratch.total[slot]);
    if (before + here > room) break;
    before += here;
  }
  scratch.end.slot = slot;
  scratch.end.room = room - before;
  scratch.end.mass = scratch.total[slot];
}

// ---- a row ------------------------------------------------------------------------------------------------------
// A block's columns of it, in shared memory in whole tiles, -inf where there is no token.
template <class T> struct Slice {
  T* kept;
  int begin, tiles;
  float scale;

  // The n-th tile of this thread.
  XDLM_DEVICE int tile(int n) const {
    const int warp = thread_index() / kLanes, warps = block_threads() / kLanes;
    return (warp + n / kWords * warps) * kTilesAWarp + n % kWords * kLanes + thread_index() % kLanes;
  }
  XDLM_DEVICE int most_tiles() const {  // of a thread
    const int warps = block_threads() / kLanes;
    return (tiles + warps * kTilesAWarp - 1) / (warps * kTilesAWarp) * kWords;
  }
  XDLM_FN void logits(int tile, float (&x)[8]) const {
    Vector<T> v;
    load(kept + tile * kTile, v);
    decode(v, x);
  }
  XDLM_FN int bin(float x) const { return bin_of(place_of(x, scale)); }
  // A larger number comes first.
  XDLM_FN uint64_t order(float x, int column) const {
    uint32_t bits = bits_of(x + 0.f);  // both zeros are +0
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits >> (32 - 8 * sizeof(T))) << kColumnBits | uint64_t((1 << kColumnBits) - 1 - begin - column);
  }
  XDLM_FN bool holds(const End& end, float x, int column) const {
    const int at = bin(x);
    return x > -INFINITY && (at > end.bin || (at == end.bin && order(x, column) >= end.least));
  }
};

// Copy the columns, all of them in flight at once, and hide what is no token. A thread's tiles are there for itself.
template <class T> XDLM_DEVICE void keep(const Slice<T>& slice, const T* source, const Columns& c) {
  for (int n = 0; n < slice.most_tiles(); ++n) {
    const int column = slice.tile(n) * kTile;
    if (column >= c.count) continue;
    if (column + kTile <= c.vectors) {
      copy_async(slice.kept + column, source + column);
    } else {
      Vector<T> v;
      fetch(source, column, c, v);
      store(slice.kept + column, v);
    }
  }
  wait_for_copies();
  for (int n = 0; n < slice.most_tiles(); ++n) {
    const int column = slice.tile(n) * kTile;
    if (column >= c.count || (column + kTile <= c.real && unsigned(c.mask - column) >= unsigned(kTile))) continue;
    for (int i = 0; i < kTile; ++i)
      if (c.is_out(column + i)) slice.kept[column + i] = from_float<T>(-INFINITY);
  }
}

template <class T>
XDLM_DEVICE float largest_logit(Scratch& scratch, const Slice<T>& slice, int rank, int cluster) {
  float highest = -INFINITY;
  for (int n = 0; n < slice.most_tiles(); ++n) {
    if (slice.tile(n) >= slice.tiles) continue;
    float x[kTile];
    slice.logits(slice.tile(n), x);
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) highest = max_or_nan(highest, x[i]);
  }
  highest = reduce_block(highest, LargestLogit{}, scratch.reduce);
  if (thread_index() < cluster) in_block(scratch.tops, thread_index())[rank] = highest;
  exchange(cluster);
  for (int i = 0; i < cluster; ++i) highest = max_or_nan(highest, scratch.tops[i]);
  return highest;
}

// Finds the end; returns which tiles of this thread may have a token inside, a bit each.
template <class T>
XDLM_DEVICE uint64_t find_end(Scratch& scratch, const Slice<T>& slice, float highest, double top_p, int cluster) {
  const int top_bin = slice.bin(highest);
  const Budget budget{top_p, top_bin};
  End& end = scratch.end;
  for (int n = 0; n < slice.most_tiles(); ++n) {
    if (slice.tile(n) >= slice.tiles) continue;
    float x[kTile];
    slice.logits(slice.tile(n), x);
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) {
      const float y = place_of(x[i], slice.scale);
      const int below = top_bin - bin_of(y);
      if (x[i] > -INFINITY && below < kSlots) scratch.add(below, mass_of(y));
    }
  }
  scratch.add_up(0, kSlots, cluster);
  if (thread_index() < kLanes) find_slot(scratch, kSlots, budget);
  sync_block();
  if (thread_index() == 0) {
    const int below = budget.below(end.slot);
    end.bin = top_bin - end.slot;
    end.room = (((end.room + 1) << below) - 1) >> kMassBits;  // the most that fits, in units of the bin's level
    if (end.slot == 0) end.room = larger<int64_t>(end.room, mass_of(place_of(highest, slice.scale)));
    end.prefix = 0;
    end.least = end.room >= end.mass ? 0 : uint64_t(1) << kOrderBits<T>;
  }
  sync_block();

  uint64_t inside = 0, at_end = 0;
  for (int n = 0; n < slice.most_tiles(); ++n) {
    if (slice.tile(n) >= slice.tiles) continue;
    float x[kTile];
    slice.logits(slice.tile(n), x);
    int most = -kLargest * kBinsALevel - 1;
    bool has_end = false;
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) {
      if (!(x[i] > -INFINITY)) continue;
      most = larger(most, slice.bin(x[i]));
      has_end |= slice.bin(x[i]) == end.bin;
    }
    inside |= uint64_t(most >= end.bin) << n;
    at_end |= uint64_t(has_end) << n;
  }
  int search = 1;
  for (int shift = kOrderBits<T> - 8; shift >= 0; shift -= 8, ++search) {
    const End now = end;
    if (now.least == 0 || now.room < int64_t(1) << kMassBits) break;  // all fit, or none that is left
    for (uint64_t bits = at_end; bits != 0; bits &= bits - 1) {
      const int tile = slice.tile(first_bit(bits));
      float x[kTile];
      slice.logits(tile, x);
      XDLM_UNROLL for (int i = 0; i < kTile; ++i) {
        const uint64_t order = slice.order(x[i], tile * kTile + i);
        if (x[i] > -INFINITY && slice.bin(x[i]) == now.bin && order >> (shift + 8) == now.prefix)
          scratch.add(kDigits - 1 - int(order >> shift & (kDigits - 1)), mass_of(place_of(x[i], slice.scale)));
      }
    }
    scratch.add_up(search, kDigits, cluster);
    if (thread_index() < kLanes) find_slot(scratch, kDigits, Room{now.room});
    sync_block();
    if (thread_index() == 0) {
      end.prefix = now.prefix * kDigits + uint64_t(kDigits - 1 - end.slot);
      end.least = (end.prefix + 1) << shift;
    }
    sync_block();
  }
  return inside;
}

// The first of the nucleus' tokens in these tiles to ring is in scratch.best.
template <class T>
XDLM_DEVICE void race(Scratch& scratch, const Slice<T>& slice, uint64_t inside, double scale, const Counter& counter) {
  const End end = scratch.end;
  const int first_tile = slice.begin / kTile;
  for (int group = 0; group < slice.most_tiles(); group += kWords) {
    if ((inside >> group & ((1 << kWords) - 1)) == 0) continue;
    const int block = (first_tile + slice.tile(group)) / kTilesAWarp;
    const Words words = counter.words(kTileDraws + uint32_t(block * kLanes + thread_index() % kLanes));
    XDLM_ROLLED for (int i = 0; i < kWords; ++i) {
      if ((inside >> (group + i) & 1) == 0) continue;
      const int tile = slice.tile(group + i);
      float w[kTile], top = -INFINITY;
      slice.logits(tile, w);
      unsigned held = 0;
      XDLM_UNROLL for (int j = 0; j < kTile; ++j) {
        held |= unsigned(slice.holds(end, w[j], tile * kTile + j)) << j;
        top = fmaxf(top, w[j]);
      }
      if (held == 0) continue;
      weigh(w, top, slice.scale);
      const int64_t place = first_tile + tile;
      const double key = first_key(w, top, scale, word_of(words, i), uint32_t(place), counter);
      if (peek(&scratch.best) > packed(key, 0)) continue;
      all_rings(w, top, scale, key, place, counter, [&](int j, double ring) {
        if (held >> j & 1) atomic_max(&scratch.best, packed(ring, place * kTile + j));
      });
    }
  }
}

template <class T>
XDLM_KERNEL(kDrawThreads, kNucleusBlocks) posterior_nucleus_kernel(XdlmDraw draw, double top_p, double* XDLM_RESTRICT out,
                                                                   int cluster, int columns) {
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared_memory());
  const int64_t m = block_index() / cluster, M = draw.rows;
  const int rank = int(block_index() % cluster);
  Columns c = columns_of(draw, sizeof(T));
  const int begin = rank * columns, z = draw.zt[m] < c.count ? int(draw.zt[m]) : -1;
  c.real = smaller(larger(0, c.real - begin), columns);
  c.count = smaller(larger(0, c.count - begin), columns);
  c.vectors = smaller(larger(0, c.vectors - begin), columns);
  c.mask = c.mask < 0 ? -1 : c.mask - begin;
  const Slice<T> slice{reinterpret_cast<T*>(shared_memory() + sizeof(Scratch)), begin, (c.count + kTile - 1) / kTile,
                       float(draw.scale)};
  for (int i = thread_index(); i < kSlots * kCopies; i += block_threads()) scratch.copies[i] = 0;
  if (thread_index() == 0) scratch.best = kNoKey;
  if (cluster > 1) sync_cluster();  // nobody writes to a block that has not started
  keep(slice, row_of<T>(draw, m) + begin, c);
  const float highest = largest_logit(scratch, slice, rank, cluster);
  const bool leads = rank == 0 && thread_index() == 0;
  if (!(fabsf(highest) < INFINITY)) {  // no token, or a NaN, which an infinite logit is too
    if (leads) out[m] = highest == -INFINITY ? -INFINITY : NAN;
    if (leads) out[M + m] = 0.0;
    if (leads) out[2 * M + m] = -INFINITY;
    return;
  }
  const uint64_t inside = find_end(scratch, slice, highest, top_p, cluster);
  race(scratch, slice, inside, draw.scale, counter_of(draw, m));
  sync_block();
  if (thread_index() == 0) {
    in_block(scratch.winners, 0)[rank] = scratch.best;
    if (z >= begin && z < begin + c.count) {
      const float x = to_float(slice.kept[z - begin]);
      out[2 * M + m] = slice.holds(scratch.end, x, z - begin) ? double(x) * draw.scale : -INFINITY;
    } else if (rank == 0 && z < 0) {
      out[2 * M + m] = -INFINITY;
    }
  }
  exchange(cluster);
  if (!leads) return;
  int64_t best = scratch.winners[0];
  for (int i = 1; i < cluster; ++i) best = larger(best, scratch.winners[i]);
  out[m] = key_of(best);
  out[M + m] = double(id_of(best));
}

// Columns of a block, in whole turns of a warp.
int64_t slice_of(const XdlmDraw& draw, int64_t cluster) {
  const int64_t turn = kTilesAWarp * kTile, turns = (draw.columns + turn - 1) / turn;
  return (turns + cluster - 1) / cluster * turn;
}

int threads_for_slice(int64_t columns) { return threads_for((columns + kWords - 1) / kWords, kDrawThreads); }

bool fits(const XdlmDraw& draw, int64_t cluster, int64_t most_bytes) {
  const int64_t columns = slice_of(draw, cluster);
  return columns * (draw.dtype == kFloat32 ? 4 : 2) <= most_bytes &&
         columns <= int64_t(kTilesAThread) * kTile * threads_for_slice(columns);
}

}  // namespace xdlm

using namespace xdlm;

int64_t xdlm_nucleus_cluster(const XdlmDraw* draw) {
  if (draw->first_id != 0 || draw->columns < draw->vocab_size || draw->vocab_size > kMostIds) return 0;
  const int64_t largest = xdlm_has_clusters() ? kMostBlocks : 1;
  for (int64_t cluster = 1; cluster <= largest; cluster *= 2)
    if (fits(*draw, cluster, kSliceBytes)) return cluster;
  return fits(*draw, largest, most_shared_bytes() - int64_t(sizeof(Scratch))) ? largest : 0;
}

int xdlm_posterior_nucleus(const XdlmDraw* draw, double top_p, double* draw_3M, int64_t cluster, void* stream) {
  const int error = check(*draw);
  if (error != 0) return error;
  if (cluster == 0) cluster = xdlm_nucleus_cluster(draw);
  if (cluster == 0) return kDoesNotFit;
  if (cluster > 1 && !xdlm_has_clusters()) return kNoClusters;
  const int64_t columns = slice_of(*draw, cluster);
  const size_t bytes = sizeof(Scratch) + size_t(columns * (draw->dtype == kFloat32 ? 4 : 2));
  const auto kernel = draw->dtype == kFloat32 ? posterior_nucleus_kernel<float> : posterior_nucleus_kernel<bf16>;
  return launch(kernel, draw->rows * cluster, threads_for_slice(columns), int(cluster), bytes, stream, *draw, top_p,
                draw_3M, int(cluster), int(columns));
}
