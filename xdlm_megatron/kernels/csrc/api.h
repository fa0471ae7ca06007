// The C interface of the kernels, the same for the CUDA and the host build. No exceptions, no allocation; a call
// returns 0 or an error number and works asynchronously on `stream` (the host build: at once). Integers are
// int64_t and reals float throughout, so that the binding needs no table of types.
#pragma once
#include <stdint.h>

#define XDLM_API extern "C" __attribute__((visibility("default")))

enum XdlmDtype { kFloat32 = 0, kBfloat16 = 1 };

// Own error numbers lie above CUDA's.
enum XdlmError { kBadDtype = 100001, kBadShape = 100002, kDoesNotFit = 100003, kBadBinding = 100004, kNoClusters = 100005 };

// Rows of logits, one rank's columns [rows, columns] with row_stride elements from row to row, and what the loss
// knows of their tokens. Column j is the id first_id + j; ids from vocab_size on are padding; mask_id is -1 where
// there is no mask.
struct XdlmRows {
  const void* logits;
  const int64_t* zt;
  const int64_t* x0;
  const float* alpha;
  const float* beta;
  const float* dalpha;
  int64_t rows, columns, row_stride, dtype;
  int64_t first_id, vocab_size, mask_id;
  float uniform_ratio;
};

// The text of an error number.
XDLM_API const char* xdlm_error(int64_t code);
// Bytes of XdlmRows: a binding compares them with its own.
XDLM_API int64_t xdlm_rows_bytes(void);
// Whether the blocks of a cluster reach each other: the current device has clusters, and the code that it runs was
// compiled for one that has. PTX for less than 9.0 has no clusters wherever it is compiled in the end.
XDLM_API int64_t xdlm_has_clusters(void);

// The passes over the vocabulary and the per-token steps between them; row_ops.py says what they compute.
XDLM_API int xdlm_nelbo_stats(const XdlmRows*, float* stats_4N, void* stream);
XDLM_API int xdlm_nelbo_merge(const XdlmRows*, const float* stats_R4N, int64_t ranks, float* merged_5N, void* stream);
XDLM_API int xdlm_nelbo_sums(const XdlmRows*, const float* merged_5N, float* sums_2N, void* stream);
// sums_R2N is null at uniform_ratio 0.
XDLM_API int xdlm_nelbo_finish(const XdlmRows*, const float* merged_5N, const float* sums_R2N, int64_t ranks,
                               float* loss_N, float* terms_6N, void* stream);
// upstream_N null: 1. out may be the logits.
XDLM_API int xdlm_nelbo_grad(const XdlmRows*, const float* terms_6N, const float* upstream_N, void* out,
                             int64_t out_stride, void* stream);
// Multiply the rows of a gradient (of the logits' shape, stride and dtype) by upstream_N, in place.
XDLM_API int xdlm_nelbo_rescale(const XdlmRows*, const float* upstream_N, void* grad, void* stream);

// All of it on one rank: every row is read once and, where out is not null, its gradient for an upstream gradient of
// 1 is written once. A cluster of blocks keeps the row in its shared memory. cluster: 0 for xdlm_nelbo_cluster's.
XDLM_API int xdlm_nelbo_whole(const XdlmRows*, float* loss_N, float* terms_6N, void* out, int64_t out_stride,
                              int64_t cluster, void* stream);
// Blocks a row needs on the current device: 1, 2, 4 or 8 (without clusters 1); 0 if it does not fit.
XDLM_API int64_t xdlm_nelbo_cluster(const XdlmRows*);

// Rows to draw a token from: row index[i] of the logits, at z_t zt[i], for i < rows. Its random numbers are those of
// the counters (position[i], step, row_id[i], draw) under (seed, stream). bytes is this structure's size.
struct XdlmDraw {
  int64_t bytes;
  const void* logits;
  const int64_t* index;
  const int64_t* zt;
  const int64_t* position;
  const int64_t* row_id;
  int64_t rows, columns, row_stride, dtype;
  int64_t first_id, vocab_size, mask_id;
  int64_t seed, stream_word, step;
  double scale;  // log2(e) / temperature
};

// token_race.py says what it computes: key, id and x of z_t.
XDLM_API int xdlm_posterior_draw(const XdlmDraw*, double* draw_3M, void* stream);

// survey.py says what it computes: the largest logit and z_t's, and for each of 512 slots a mass and a key with its id.
XDLM_API int xdlm_posterior_survey(const XdlmDraw*, float* logits_2M, int64_t* mass_MS, int64_t* best_MS, void* stream);
// The tokens of bin bin_M[i] of row i (survey.py's BinTokens), in any order, from end_M[i - 1] on and up to end_M[i]: their
// logits, masses and keys with ids. Room that is left has mass 0.
XDLM_API int xdlm_posterior_bin(const XdlmDraw*, const int64_t* bin_M, const int64_t* end_M, float* logits_E,
                                int64_t* mass_E, int64_t* best_E, void* stream);
// Whether they can, on any number of ranks: the vocabulary has at most 524,224 ids.
XDLM_API int64_t xdlm_survey_fits(const XdlmDraw*);

// The draw from the first top_p of p, of rows of the whole vocabulary; x is -inf where z_t is outside. A cluster of blocks
// keeps the row in its shared memory. cluster: 0 for xdlm_nucleus_cluster's.
XDLM_API int xdlm_posterior_nucleus(const XdlmDraw*, double top_p, double* draw_3M, int64_t cluster, void* stream);
// Blocks a row needs on the current device: 1, 2, 4 or 8 (without clusters 1); 0 if it does not fit, is a part of the
// vocabulary, or has more ids than a survey can take.
XDLM_API int64_t xdlm_nucleus_cluster(const XdlmDraw*);
