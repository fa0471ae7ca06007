// The race among the tokens of a row (diffusion/token_race.py says how and why): its random numbers and its tiles of 8
// columns. A warp takes 128 of them at a time, four a thread.
#pragma once
#include "portable.cuh"

namespace xdlm {

constexpr int kDrawThreads = 256;
constexpr int kTile = 8, kLanes = 32, kWords = 4;  // a counter's four words go to four tiles, kLanes apart
constexpr uint32_t kTileDraws = 1u << 30, kRefiningDraws = 1u << 31, kFirstDraws = 5u << 29, kLaterDraws = 3u << 30;
constexpr uint32_t kRefineBelow = 1u << 12;

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

// log2 of an exponential of mean 1, of 32 random bits and a fraction of their unit.
XDLM_FN float log2_exponential(uint32_t word, float low) {
  constexpr float unit = 2.3283064365386963e-10f;  // 2^-32
  if (word >= 1u << 31) return fast_log2(-kLn2 * fast_log2((float(~word) + 0.5f) * unit));
  return fast_log2(-log1pf(-(float(word) + low) * unit));
}
XDLM_FN float log2_exponential(uint32_t word, uint32_t low_word) {
  return log2_exponential(word, (float(low_word) + 0.5f) * 2.3283064365386963e-10f);
}
// A tile's: of 64 random bits where it is small and wins.
XDLM_FN float log2_exponential_of_tile(uint32_t word, uint32_t tile, const Counter& counter) {
  if (word >= kRefineBelow) return log2_exponential(word, 0.5f);
  return log2_exponential(word, counter.rare_words(kRefiningDraws + tile).word[0]);
}

// ---- tiles ------------------------------------------------------------------------------------------------------
// One rank's columns of a row: `real` of them are not padding, `mask` is the mask's. Those before `vectors` may be
// read by 8.
struct Columns {
  int count, real, vectors, mask;
  XDLM_FN bool is_out(int column) const { return column >= real || column == mask; }
};

XDLM_FN Columns columns_of(const XdlmDraw& draw, int64_t item_bytes) {
  const bool aligned = uintptr_t(draw.logits) % 16 == 0 && draw.row_stride * item_bytes % 16 == 0;
  Columns c;
  c.count = int(draw.columns);
  c.real = int(larger<int64_t>(0, smaller<int64_t>(draw.vocab_size - draw.first_id, draw.columns)));
  c.vectors = aligned ? c.count & ~(kTile - 1) : 0;
  c.mask = draw.mask_id < 0 ? -1 : int(draw.mask_id - draw.first_id);
  return c;
}

XDLM_FN Counter counter_of(const XdlmDraw& draw, int64_t m) {
  return {uint32_t(draw.seed), uint32_t(draw.stream_word), uint32_t(draw.position[m]), uint32_t(draw.step),
          uint32_t(draw.row_id[m])};
}

template <class T> XDLM_FN void fetch(const T* source, int column, const Columns& c, Vector<T>& v) {
  if (column + kTile <= c.vectors) {
    load(source + column, v);
  } else {
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) v.items[i] = from_float<T>(0.f);
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) if (column + i < c.count) v.items[i] = source[column + i];
  }
}

// A tile's logits, -inf at what is out; returns the largest (fmaxf drops a NaN).
template <class T> XDLM_FN float logits_of(const Vector<T>& v, int column, const Columns& c, float (&x)[8]) {
  decode(v, x);
  if (column + kTile > c.real || unsigned(c.mask - column) < unsigned(kTile)) {
    XDLM_UNROLL for (int i = 0; i < kTile; ++i) x[i] = c.is_out(column + i) ? -INFINITY : x[i];
  }
  float top = x[0];
  XDLM_UNROLL for (int i = 1; i < kTile; ++i) top = fmaxf(top, x[i]);
  return top;
}

// 2^((x - top) scale), 0 at what is out.
XDLM_FN void weigh(float (&x)[8], float top, float scale) {
  const float zero = top == -INFINITY ? 0.f : top;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) x[i] = fast_exp2((x[i] - zero) * scale);
}

XDLM_FN float tile_sum(const float (&w)[8]) {
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}

// The column of a tile where the cumulative weight passes u of the total; never one of weight 0.
XDLM_FN int inverse_cdf(const float (&w)[8], const Words& words) {
  const double u = (double(words.word[0] >> 5) * 67108864.0 + double(words.word[1] >> 6)) * 0x1p-53;
  double cdf[kTile], sum = 0.0;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) cdf[i] = sum += double(w[i]);
  const double target = fmin(u * sum, nextafter(sum, 0.0));
  int column = 0;
  XDLM_UNROLL for (int i = 0; i < kTile; ++i) column += cdf[i] <= target;
  return column;
}

// The word of a tile's first ring.
XDLM_FN uint32_t word_of(const Words& words, int i) {
  return i < 2 ? (i == 0 ? words.word[0] : words.word[1]) : (i == 2 ? words.word[2] : words.word[3]);
}

// -log2 of the time of a tile's first ring. The same bits in every kernel: no compiler chooses where to round.
XDLM_FN double first_key(const float (&w)[8], float top, double scale, uint32_t word, uint32_t tile, const Counter& counter) {
  return fma(double(top), scale, double(fast_log2(tile_sum(w)) - log2_exponential_of_tile(word, tile, counter)));
}

// The shard's row of which a block's `m` speaks.
template <class T> XDLM_FN const T* row_of(const XdlmDraw& draw, int64_t m) {
  return static_cast<const T*>(draw.logits) + draw.index[m] * draw.row_stride;
}

// z_t's logit; -inf where it is the mask or another rank's.
template <class T> XDLM_FN float logit_of_zt(const XdlmDraw& draw, int64_t m, const T* source, const Columns& c) {
  const int64_t z = draw.zt[m] - draw.first_id;
  return z >= 0 && z < c.count && !c.is_out(int(z)) ? to_float(source[z]) : -INFINITY;
}

inline int check(const XdlmDraw& draw) {
  if (draw.bytes != int64_t(sizeof(XdlmDraw))) return kBadBinding;
  if (draw.dtype != kFloat32 && draw.dtype != kBfloat16) return kBadDtype;
  const bool sound = draw.rows >= 0 && draw.columns > 0 && draw.columns < (int64_t(1) << 31) - 2048 &&
                     draw.first_id >= 0 && draw.first_id % kTile == 0 && draw.row_stride >= 0;
  return sound && draw.vocab_size < int64_t(1) << 31 ? 0 : kBadShape;
}

inline int threads_of(const XdlmDraw& draw) {
  return threads_for((draw.columns + kWords - 1) / kWords, kDrawThreads);
}

}  // namespace xdlm
