// A token of p for chosen rows of logits, each read once (diffusion/posterior_draw.py says how and why). A block a row;
// a warp takes 128 tiles of 8 columns at a time, four a thread.
#include "portable.cuh"

namespace xdlm {

constexpr int kDrawThreads = 256, kDrawBlocks = 3;  // of an SM: at least 24 warps, each lane with 64 bytes on the way
constexpr int kTile = 8, kLanes = 32, kWords = 4;  // a counter's four words go to four tiles, kLanes apart
constexpr uint32_t kTokenDraw = 1, kTileDraws = 1u << 30, kRefiningDraws = 1u << 31, kRefineBelow = 1u << 12;
constexpr int kNoTile = 0x7fffffff;

// ---- random numbers (diffusion/counter_rng.py) ------------------------------------------------------------------
struct Words {
  uint32_t word[4];
};
struct Philox {
  uint32_t k0, k1, c0, c1, c2, c3;
  XDLM_FN void round() {
    const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
};

struct Counter {
  uint32_t seed, stream, position, step, row;
  XDLM_FN Philox start(uint32_t draw) const { return {seed, stream, position, step, row, draw}; }
  XDLM_FN Words words(uint32_t draw) const {
    Philox p = start(draw);
    XDLM_UNROLL for (int i = 0; i < 10; ++i) p.round();
    return {{p.c0, p.c1, p.c2, p.c3}};
  }
  // The same in little code, for where it is rare.
  XDLM_FN Words rare_words(uint32_t draw) const {
    Philox p = start(draw);
    XDLM_ROLLED for (int i = 0; i < 10; ++i) p.round();
    return {{p.c0, p.c1, p.c2, p.c3}};
  }
};

// log2 of a tile's exponential of mean 1: of 32 random bits, and of 64 where it is small and wins.
XDLM_FN float log2_exponential(uint32_t word, uint32_t tile, const Counter& counter) {
  constexpr float unit = 2.3283064365386963e-10f;  // 2^-32
  if (word >= 1u << 31) return fast_log2(-kLn2 * fast_log2((float(~word) + 0.5f) * unit));
  float low = 0.5f;
  if (word < kRefineBelow) low = (float(counter.rare_words(kRefiningDraws + tile).word[0]) + 0.5f) * unit;
  return fast_log2(-log1pf(-(float(word) + low) * unit));
}

// ---- tiles ------------------------------------------------------------------------------------------------------
// One rank's columns of a row: `real` of them are not padding, `mask` is the mask's; of a nucleus, floor and the last
// column of those equal to it. Columns before `vectors` may be read by 8.
struct Columns {
  int count, real, vectors, mask;
  float floor;
  int64_t last;
};

XDLM_FN bool is_out(float x, int column, const Columns& c) {
  return column >= c.real || column == c.mask || x < c.floor || (x == c.floor && column > c.last);
}

template <class T> XDLM_FN void fetch(const T* source, int column, const Columns& c, Vector<T>& v) {
  if (column + kTile <= c.vectors) {
    load(source + column, v);
  } else {
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) v.items[i] = from_float<T>(0.f);
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) if (column + i < c.count) v.items[i] = source[column + i];
  }
}

// 2^((x - top) scale) of a tile, -inf and 0 at what is out; returns top.
template <class T> XDLM_FN float weights(const Vector<T>& v, int column, const Columns& c, float scale, float (&w)[8]) {
  decode(v, w);
  const bool whole = column + kTile <= c.real && unsigned(c.mask - column) >= unsigned(kTile);
  if (!whole || c.floor != -INFINITY) {
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) w[i] = is_out(w[i], column + i, c) ? -INFINITY : w[i];
  }
  float top = w[0];
  XDLM_UNROLL for (int i = 1; i < kTile; ++i) top = fmaxf(top, w[i]);
  const float zero = top == -INFINITY ? 0.f : top;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) w[i] = fast_exp2((w[i] - zero) * scale);
  return top;
}

XDLM_FN float tile_sum(const float (&w)[8]) {
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}

// The column of a tile where the cumulative weight passes u of the total; never one of weight 0.
XDLM_FN int inverse_cdf(const float (&w)[8], const Words& words) {
  const double u = (double(words.word[2] >> 5) * 67108864.0 + double(words.word[3] >> 6)) * 0x1p-53;
  double cdf[kTile], sum = 0.0;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) cdf[i] = sum += double(w[i]);
  const double target = fmin(u * sum, nextafter(sum, 0.0));
  int column = 0;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) column += cdf[i] <= target;
  return column;
}

// ---- the race ---------------------------------------------------------------------------------------------------
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
      const float top = weights(v[i], int(t - first_tile) * kTile, c, scale, w);
      const float fraction = fast_log2(tile_sum(w)) - log2_exponential(words.word[i], uint32_t(t), counter);
      const double key = double(top) * draw.scale + double(fraction);
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
  const T* source = static_cast<const T*>(draw.logits) + draw.index[m] * draw.row_stride;
  const bool aligned = uintptr_t(draw.logits) % 16 == 0 && draw.row_stride * int64_t(sizeof(T)) % 16 == 0;
  Columns c;
  c.count = int(draw.columns);
  c.real = int(larger<int64_t>(0, smaller<int64_t>(draw.vocab_size - draw.first_id, draw.columns)));
  c.vectors = aligned ? c.count & ~(kTile - 1) : 0;
  c.mask = draw.mask_id < 0 ? -1 : int(draw.mask_id - draw.first_id);
  c.floor = draw.floor != nullptr ? draw.floor[m] : -INFINITY;
  c.last = draw.last != nullptr ? draw.last[m] - draw.first_id : draw.columns;
  const Counter counter{uint32_t(draw.seed), uint32_t(draw.stream_word), uint32_t(draw.position[m]),
                        uint32_t(draw.step), uint32_t(draw.row_id[m])};
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
    weights(v, winner * kTile, c, float(draw.scale), w);
    column = winner * kTile + inverse_cdf(w, counter.rare_words(kTokenDraw));
  }
  const int64_t z = draw.zt[m] - draw.first_id;
  float x_z = -INFINITY;
  if (z >= 0 && z < c.count && !is_out(to_float(source[z]), int(z), c)) x_z = to_float(source[z]);
  out[m] = key;
  out[M + m] = double(draw.first_id + column);
  out[2 * M + m] = double(x_z) * draw.scale;
}

}  // namespace xdlm

using namespace xdlm;

int xdlm_posterior_draw(const XdlmDraw* draw, double* draw_3M, void* stream) {
  if (draw->bytes != int64_t(sizeof(XdlmDraw))) return kBadBinding;
  if (draw->dtype != kFloat32 && draw->dtype != kBfloat16) return kBadDtype;
  const bool sound = draw->rows >= 0 && draw->columns > 0 && draw->columns < (int64_t(1) << 31) - 2048 &&
                     draw->first_id >= 0 && draw->first_id % kTile == 0 && draw->row_stride >= 0;
  if (!sound || draw->vocab_size >= int64_t(1) << 31) return kBadShape;
  const int threads = threads_for((draw->columns + kWords - 1) / kWords, kDrawThreads);
  const size_t shared = 32 * sizeof(double);
  return draw->dtype == kFloat32
             ? launch(posterior_draw_kernel<float>, draw->rows, threads, 1, shared, stream, *draw, draw_3M)
             : launch(posterior_draw_kernel<bf16>, draw->rows, threads, 1, shared, stream, *draw, draw_3M);
}
