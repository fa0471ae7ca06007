// The arithmetic of the loss: on 8 logits of a row, and on the numbers of a token. The same formulas, in the same
// names, as diffusion/row_ops.py and diffusion/nelbo.py. Everything is float32.
#pragma once
#include "portable.cuh"

namespace xdlm {

// ---- rows -------------------------------------------------------------------------------------------------------
// Some columns of a row: how many, how many of them are before the padding, which may be read in vectors of 8
// (columns before `vectors`), and where mask, x0 and z_t lie among them (anywhere else: another rank's or block's).
struct Part {
  int columns, real, vectors, mask, x0, zt;
};

XDLM_FN Part part_of(const XdlmRows& rows, int64_t row, int begin, int columns, bool aligned) {
  const int64_t first = rows.first_id + begin, left = rows.vocab_size - first;
  Part part;
  part.columns = columns;
  part.real = int(larger<int64_t>(0, smaller<int64_t>(left, columns)));
  part.vectors = aligned ? columns & ~7 : 0;
  part.mask = int(rows.mask_id - first);  // a mask_id of -1 is in no part
  part.x0 = int(rows.x0[row] - first);
  part.zt = int(rows.zt[row] - first);
  return part;
}

// Whether a token has a loss: dalpha != 0, and z_t is the mask if k = 0.
XDLM_FN bool is_live(const XdlmRows& rows, int64_t row) {
  return rows.dalpha[row] != 0.f && (rows.uniform_ratio > 0.f || rows.zt[row] == rows.mask_id);
}

template <class T> XDLM_FN void read8(const T* source, int j, const Part& part, Vector<T>& v) {
  if (j + 8 <= part.vectors) {
    load(source + j, v);
  } else {
    XDLM_UNROLL for (int i = 0; i < 8; ++i) v.items[i] = j + i < part.columns ? source[j + i] : T{};
  }
}
template <class T> XDLM_FN void write8(T* target, int j, const Part& part, const float (&x)[8]) {
  Vector<T> v;
  encode(x, v);
  if (j + 8 <= part.vectors) {
    store(target + j, v);
  } else {
    XDLM_UNROLL for (int i = 0; i < 8; ++i) if (j + i < part.columns) target[j + i] = v.items[i];
  }
}
// -inf at mask and padding, and at x0 if it is to stay out.
XDLM_FN void exclude8(float (&x)[8], int j, const Part& part, bool without_x0) {
  const int real = part.real - j, mask = part.mask - j, x0 = without_x0 ? part.x0 - j : -1;
  if (real < 8 || unsigned(mask) < 8u || unsigned(x0) < 8u) {
    XDLM_UNROLL for (int i = 0; i < 8; ++i) if (i >= real || i == mask || i == x0) x[i] = -INFINITY;
  }
}
// The logit of an id that is part of this row, is real and is not the mask; else -inf.
template <class T> XDLM_FN float pick(const T* source, int column, const Part& part) {
  return column >= 0 && column < part.real && column != part.mask ? to_float(source[column]) : -INFINITY;
}

// A bound on some logits and the sum of exp(l - bound).
struct Softmax {
  float top, sum;
};
XDLM_FN Softmax merge(Softmax a, Softmax b) {
  const float top = fmaxf(a.top, b.top), zero = top == -INFINITY ? 0.f : top;
  return {top, a.sum * fast_exp2((a.top - zero) * kLog2e) + b.sum * fast_exp2((b.top - zero) * kLog2e)};
}
XDLM_FN void add8(Softmax& s, const float (&x)[8]) {  // a NaN reaches the sum
  float top = s.top;
  XDLM_UNROLL for (int i = 0; i < 8; ++i) top = fmaxf(top, x[i]);
  const float zero = top == -INFINITY ? 0.f : top;
  float sum = s.sum * fast_exp2((s.top - zero) * kLog2e);
  XDLM_UNROLL for (int i = 0; i < 8; ++i) sum += fast_exp2((x[i] - zero) * kLog2e);
  s.top = top;
  s.sum = sum;
}

// q = scale exp(l - top). The maximum is subtracted first: |l| eps would be too much.
XDLM_FN void exponentials8(float (&x)[8], float top, float scale) {
  XDLM_UNROLL for (int i = 0; i < 8; ++i) x[i] = scale * fast_exp2((x[i] - top) * kLog2e);
}

// T = sum of log1p(q), s = sum of q a with a = q / (1 + q), over e != x0.
struct Sums {
  float T, s;
};
// q is at most `scale`: below these bounds the product of four (1 + q), or of two, has an inverse in float32.
constexpr float kFourFit = 2.9e9f, kTwoFit = 8e18f;

// log1p(w) for all = 1 + w. The device's logarithm is only good to 2^-22 of absolute error: near 0 a series.
XDLM_FN float fast_log1p(float w, float all) {
  const float series = fmaf(fmaf(fmaf(fmaf(fmaf(-1.f / 6, w, 0.2f), w, -0.25f), w, 1.f / 3), w, -0.5f), w, 1.f);
  return w < 0.0625f ? w * series : fast_log2(all) * kLn2;
}
// Four at once: (1 + q0)(1 + q1)(1 + q2)(1 + q3) - 1 is built without ever rounding 1 + q, one logarithm and one
// inverse serve all of them.
XDLM_FN void add4(Sums& sums, float q0, float q1, float q2, float q3) {
  const float u = fmaf(q0, q1, q0 + q1), v = fmaf(q2, q3, q2 + q3), w = fmaf(u, v, u + v);
  const float all = 1.f + w, inverse = fast_inverse(all);
  sums.T += fast_log1p(w, all);
  const float inverse_u = inverse * (1.f + v), inverse_v = inverse * (1.f + u);
  const float s_u = fmaf(q0 * q0, 1.f + q1, q1 * q1 * (1.f + q0)), s_v = fmaf(q2 * q2, 1.f + q3, q3 * q3 * (1.f + q2));
  sums.s = fmaf(s_u, inverse_u, fmaf(s_v, inverse_v, sums.s));
}
XDLM_FN void add1(Sums& sums, float q) {
  const float all = 1.f + q;
  sums.T += fast_log1p(q, all);
  sums.s = fmaf(q, q * fast_inverse(all), sums.s);
}
XDLM_FN void add8(Sums& sums, const float (&q)[8], float scale) {
  if (scale <= kFourFit) {
    add4(sums, q[0], q[1], q[2], q[3]);
    add4(sums, q[4], q[5], q[6], q[7]);
  } else {
    XDLM_UNROLL for (int i = 0; i < 8; ++i) add1(sums, q[i]);
  }
}

// What the gradient needs of a token: X at x0, q (G + R a) + [e = z] Z elsewhere.
struct Terms {
  float top, scale, R, G, X, Z;
};
XDLM_FN bool is_dead(const Terms& t) { return t.R == 0.f && t.G == 0.f && t.X == 0.f && t.Z == 0.f; }

XDLM_FN void gradient8(float (&q)[8], int j, const Part& part, const Terms& t) {
  if (t.R == 0.f) {  // k = 0
    XDLM_UNROLL for (int i = 0; i < 8; ++i) q[i] *= t.G;
  } else if (t.scale <= kTwoFit) {
    XDLM_UNROLL for (int i = 0; i < 8; i += 2) {
      const float a = 1.f + q[i], b = 1.f + q[i + 1], inverse = fast_inverse(a * b);
      q[i] *= fmaf(q[i] * b * inverse, t.R, t.G);
      q[i + 1] *= fmaf(q[i + 1] * a * inverse, t.R, t.G);
    }
  } else {
    XDLM_UNROLL for (int i = 0; i < 8; ++i) q[i] *= fmaf(q[i] * fast_inverse(1.f + q[i]), t.R, t.G);
  }
  const int x0 = part.x0 - j, zt = part.zt - j;
  if (unsigned(x0) < 8u || unsigned(zt) < 8u) {
    XDLM_UNROLL for (int i = 0; i < 8; ++i) {
      if (i == zt) q[i] += t.Z;
      if (i == x0) q[i] = t.X;
    }
  }
}

// ---- tokens -----------------------------------------------------------------------------------------------------
// x - log1p(x) for x >= 0, accurate near 0 (diffusion/nelbo.py has the series).
XDLM_FN float x_minus_log1p(float x) {
  if (!(x < 0.3f)) return x - log1pf(x);
  const float y = x / (2.f + x), square = y * y;
  float series = 1.f / 23.f;
  XDLM_UNROLL for (int odd = 21; odd > 1; odd -= 2) series = fmaf(series, square, 1.f / float(odd));
  return x * y - 2.f * y * square * series;
}
// log1p(u) - u / (1 + u) for u >= 0, accurate near 0.
XDLM_FN float log1p_minus_ratio(float u) {
  const float ratio = u / (1.f + u);
  return u < 0.3f ? u * ratio - x_minus_log1p(u) : log1pf(u) - ratio;
}

// One token of the batch.
struct Token {
  int64_t zt, x0, mask;
  float alpha, beta, dalpha, k, c;
};
XDLM_FN Token token_of(const XdlmRows& rows, int64_t row) {
  const float alpha = rows.alpha[row], beta = rows.beta[row], k = rows.uniform_ratio;
  const float c = beta * (k / float(rows.vocab_size)) / alpha;
  return Token{rows.zt[row], rows.x0[row], rows.mask_id, alpha, beta, rows.dalpha[row], k, c};
}

struct Merged {
  float top, scale, rest, log_px, p_z;
};
// stats: four numbers a rank, `stride` apart: a bound, the sum of the others' exponentials, logits of x0 and z_t.
XDLM_FN Merged merge_token(const Token& t, const float* stats, int64_t ranks, int64_t stride) {
  float top = -INFINITY, l_x = -INFINITY, l_z = -INFINITY, others = 0.f;
  for (int64_t r = 0; r < ranks; ++r) {
    const float* mine = stats + 4 * r * stride;
    l_x = max_or_nan(l_x, mine[2 * stride]);
    l_z = max_or_nan(l_z, mine[3 * stride]);
    top = max_or_nan(top, max_or_nan(mine[0], mine[2 * stride]));
  }
  for (int64_t r = 0; r < ranks; ++r) {
    const float* mine = stats + 4 * r * stride;
    others += mine[stride] * expf(mine[0] - top);
  }
  const float total = others + expf(l_x - top), log_total = logf(total);
  Merged m;
  m.top = top;
  m.scale = 1.f / (t.k > 0.f ? total * t.c : total);
  m.rest = others / total;
  m.log_px = m.rest < 0.5f ? log1pf(-m.rest) : l_x - top - log_total;
  m.p_z = expf(l_z - top - log_total);
  return m;
}

// sums: T and s of a rank, `stride` apart; null at k = 0. Returns the loss, fills the terms. t is live.
XDLM_FN float finish_token(const Token& t, const Merged& m, const float* sums, int64_t ranks, int64_t stride,
                           Terms& out) {
  const float weight = -t.dalpha / t.beta;
  if (!(t.k > 0.f)) {
    out = Terms{m.top, m.scale, 0.f, weight, -weight * m.rest, 0.f};
    return -weight * m.log_px;
  }
  float T = 0.f, s = 0.f;
  for (int64_t r = 0; r < ranks; ++r) {
    T += sums[2 * r * stride];
    s += sums[(2 * r + 1) * stride];
  }
  const float c = t.c, p_x = expf(m.log_px), v = m.rest / (p_x + c), u = m.p_z / c;
  const bool same = t.zt == t.x0, masked = t.zt == t.mask;
  const float kl = (1.f + c) * log1pf(v) - c * T;  // not negative but for rounding
  const float itakura_saito = same ? x_minus_log1p(v) / t.alpha : masked ? 0.f : log1p_minus_ratio(u) / t.alpha;
  const float rho = weight * (same ? c / (1.f + c) : 1.f);
  const float a_x = p_x / (p_x + c), a_z = m.p_z / (m.p_z + c);
  const float h = a_x * (same ? m.rest + v / t.alpha : m.rest), mean_a = c * s;
  out.top = m.top;
  out.scale = m.scale;
  out.R = rho * c;
  out.Z = same || masked ? 0.f : rho * a_z * a_z / t.alpha;
  out.G = out.R * (h - mean_a) - c * out.Z;
  out.X = -rho * (h * m.rest + p_x * mean_a) - p_x * out.Z;
  return rho * ((kl < 0.f ? 0.f : kl) + itakura_saito);
}

}  // namespace xdlm
