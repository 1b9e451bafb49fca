// projection_i19_o37_silu_f32_avx512_01b122f2: written by rewriter from a specification; edit the template, not this file.
//   inputs = 19
//   outputs = 37
//   activation = Activation.SILU
//   dtype = float32, instructions = avx512
//
// A linear layer and its activation. A task is some tokens of one sequence, and all outputs or, where threads would be idle
// otherwise, a part of them. Its inputs are transposed into panels of as many tokens as accumulators in registers are
// wide; weights, which are rows already, are the left operands as they lie, so that nobody needs to pack them. Block by
// block of weights all panels go by, and what they add up to is turned back, activated and written once.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

// What a caller of a projection fills in. Strides count elements; the last axis of x, weight and out is dense.
struct ProjectionLaunch {
  const float *x, *weight, *bias;  // bias null for none
  float *out;
  int64_t batch, tokens;
  int64_t weight_stride;               // from one output's weights to the next one's
  int64_t x_stride[2], out_stride[2];  // batch, token
  int64_t threads;                     // how many will call the work function
  char *workspace;                     // plan() bytes, by the caller, 64-byte aligned
  int64_t next, workers;               // the task that nobody has taken yet, and the threads that have come
};

// Vectors of 16 floats in the compiler's own notation; intrinsics only where it has no word for it.
constexpr int W = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef vf vf_anywhere __attribute__((aligned(1), may_alias));
typedef vh vh_anywhere __attribute__((aligned(1), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
// A function of its own, of which callers know nothing: GCC 12 takes some that write vectors through pointers to floats
// for functions without effects, and drops the calls.
#if defined(__clang__)
#define OUTLINE static __attribute__((noinline))
#else
#define OUTLINE static __attribute__((noipa))
#endif

INLINE vf load(const float *p) { return *(const vf_anywhere *)p; }
INLINE void store(float *p, vf x) { *(vf_anywhere *)p = x; }
INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lane l of FIRST_s is a[l] where l has bit s clear, else b[l - s]; of SECOND_s a[l + s], else b[l].
#define FIRST_8(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define SECOND_8(a, b) SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define FIRST_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define SECOND_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define FIRST_2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SECOND_2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define FIRST_1(a, b) SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define SECOND_1(a, b) SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)

// Rows of a W x W block become its columns.
INLINE void transpose(vf *rows) {
  { vf a = rows[0], b = rows[8]; rows[0] = FIRST_8(a, b); rows[8] = SECOND_8(a, b); }
  { vf a = rows[1], b = rows[9]; rows[1] = FIRST_8(a, b); rows[9] = SECOND_8(a, b); }
  { vf a = rows[2], b = rows[10]; rows[2] = FIRST_8(a, b); rows[10] = SECOND_8(a, b); }
  { vf a = rows[3], b = rows[11]; rows[3] = FIRST_8(a, b); rows[11] = SECOND_8(a, b); }
  { vf a = rows[4], b = rows[12]; rows[4] = FIRST_8(a, b); rows[12] = SECOND_8(a, b); }
  { vf a = rows[5], b = rows[13]; rows[5] = FIRST_8(a, b); rows[13] = SECOND_8(a, b); }
  { vf a = rows[6], b = rows[14]; rows[6] = FIRST_8(a, b); rows[14] = SECOND_8(a, b); }
  { vf a = rows[7], b = rows[15]; rows[7] = FIRST_8(a, b); rows[15] = SECOND_8(a, b); }
  { vf a = rows[0], b = rows[4]; rows[0] = FIRST_4(a, b); rows[4] = SECOND_4(a, b); }
  { vf a = rows[1], b = rows[5]; rows[1] = FIRST_4(a, b); rows[5] = SECOND_4(a, b); }
  { vf a = rows[2], b = rows[6]; rows[2] = FIRST_4(a, b); rows[6] = SECOND_4(a, b); }
  { vf a = rows[3], b = rows[7]; rows[3] = FIRST_4(a, b); rows[7] = SECOND_4(a, b); }
  { vf a = rows[8], b = rows[12]; rows[8] = FIRST_4(a, b); rows[12] = SECOND_4(a, b); }
  { vf a = rows[9], b = rows[13]; rows[9] = FIRST_4(a, b); rows[13] = SECOND_4(a, b); }
  { vf a = rows[10], b = rows[14]; rows[10] = FIRST_4(a, b); rows[14] = SECOND_4(a, b); }
  { vf a = rows[11], b = rows[15]; rows[11] = FIRST_4(a, b); rows[15] = SECOND_4(a, b); }
  { vf a = rows[0], b = rows[2]; rows[0] = FIRST_2(a, b); rows[2] = SECOND_2(a, b); }
  { vf a = rows[1], b = rows[3]; rows[1] = FIRST_2(a, b); rows[3] = SECOND_2(a, b); }
  { vf a = rows[4], b = rows[6]; rows[4] = FIRST_2(a, b); rows[6] = SECOND_2(a, b); }
  { vf a = rows[5], b = rows[7]; rows[5] = FIRST_2(a, b); rows[7] = SECOND_2(a, b); }
  { vf a = rows[8], b = rows[10]; rows[8] = FIRST_2(a, b); rows[10] = SECOND_2(a, b); }
  { vf a = rows[9], b = rows[11]; rows[9] = FIRST_2(a, b); rows[11] = SECOND_2(a, b); }
  { vf a = rows[12], b = rows[14]; rows[12] = FIRST_2(a, b); rows[14] = SECOND_2(a, b); }
  { vf a = rows[13], b = rows[15]; rows[13] = FIRST_2(a, b); rows[15] = SECOND_2(a, b); }
  { vf a = rows[0], b = rows[1]; rows[0] = FIRST_1(a, b); rows[1] = SECOND_1(a, b); }
  { vf a = rows[2], b = rows[3]; rows[2] = FIRST_1(a, b); rows[3] = SECOND_1(a, b); }
  { vf a = rows[4], b = rows[5]; rows[4] = FIRST_1(a, b); rows[5] = SECOND_1(a, b); }
  { vf a = rows[6], b = rows[7]; rows[6] = FIRST_1(a, b); rows[7] = SECOND_1(a, b); }
  { vf a = rows[8], b = rows[9]; rows[8] = FIRST_1(a, b); rows[9] = SECOND_1(a, b); }
  { vf a = rows[10], b = rows[11]; rows[10] = FIRST_1(a, b); rows[11] = SECOND_1(a, b); }
  { vf a = rows[12], b = rows[13]; rows[12] = FIRST_1(a, b); rows[13] = SECOND_1(a, b); }
  { vf a = rows[14], b = rows[15]; rows[14] = FIRST_1(a, b); rows[15] = SECOND_1(a, b); }
}

// Lane l of the result is the sum over the lanes of rows[l].
INLINE vf sums(vf *rows) {
  rows[0] = FIRST_8(rows[0], rows[8]) + SECOND_8(rows[0], rows[8]);
  rows[1] = FIRST_8(rows[1], rows[9]) + SECOND_8(rows[1], rows[9]);
  rows[2] = FIRST_8(rows[2], rows[10]) + SECOND_8(rows[2], rows[10]);
  rows[3] = FIRST_8(rows[3], rows[11]) + SECOND_8(rows[3], rows[11]);
  rows[4] = FIRST_8(rows[4], rows[12]) + SECOND_8(rows[4], rows[12]);
  rows[5] = FIRST_8(rows[5], rows[13]) + SECOND_8(rows[5], rows[13]);
  rows[6] = FIRST_8(rows[6], rows[14]) + SECOND_8(rows[6], rows[14]);
  rows[7] = FIRST_8(rows[7], rows[15]) + SECOND_8(rows[7], rows[15]);
  rows[0] = FIRST_4(rows[0], rows[4]) + SECOND_4(rows[0], rows[4]);
  rows[1] = FIRST_4(rows[1], rows[5]) + SECOND_4(rows[1], rows[5]);
  rows[2] = FIRST_4(rows[2], rows[6]) + SECOND_4(rows[2], rows[6]);
  rows[3] = FIRST_4(rows[3], rows[7]) + SECOND_4(rows[3], rows[7]);
  rows[0] = FIRST_2(rows[0], rows[2]) + SECOND_2(rows[0], rows[2]);
  rows[1] = FIRST_2(rows[1], rows[3]) + SECOND_2(rows[1], rows[3]);
  rows[0] = FIRST_1(rows[0], rows[1]) + SECOND_1(rows[0], rows[1]);
  return rows[0];
}

INLINE float sum_of(vf x) {
  x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  x += SHUFFLE(x, x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  x += SHUFFLE(x, x, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0);
  return x[0];
}

INLINE float largest_of(vf x) {
  x = larger(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  x = larger(x, SHUFFLE(x, x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  x = larger(x, SHUFFLE(x, x, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
  return x[0];
}

// 2^x for x <= 0: a polynomial of degree 5 on [-1/2, 1/2]; 0 below 2^-126, NaN for NaN.
INLINE vf exp2_of(vf x) {
  // max() keeps a NaN in its second operand
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-126.0f), (__m512)x);
  const __m512 whole = _mm512_roundscale_ps(y, 8);
  const vf part = (vf)_mm512_sub_ps(y, whole);
  vf power = splat(0.001327647152f);
  power = power * part + splat(0.009675541331f);
  power = power * part + splat(0.05550713275f);
  power = power * part + splat(0.2402211972f);
  power = power * part + splat(0.6931469671f);
  power = power * part + splat(1.000000072f);
  const __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(there, (__m512)power, whole);
}

// One storage type and its way into and out of vectors of single precision.
typedef float T;
INLINE vf widen(const T *p) { return load(p); }
INLINE void narrow(T *p, vf x) { store(p, x); }
INLINE float scalar(T x) { return x; }

// The same for a part of a vector; what lies beyond is neither read nor written, and reads as 0.
INLINE vf widen_part(const T *p, int count) {
  T copy[W] = {};
  memcpy(copy, p, (size_t)count * sizeof(T));
  return widen(copy);
}
INLINE void narrow_part(T *p, vf x, int count) {
  T copy[W];
  narrow(copy, x);
  memcpy(p, copy, (size_t)count * sizeof(T));
}

// c += a * b, where an operand's 32-bit unit is one float.
INLINE vf multiply(vf c, vf a, vf b) {
  return a * b + c;
}

// c[R x 16N] = or += a[R x depth] * b[depth x 16N], in units; accumulators never leave registers. From one depth of a to
// the next are STEP units: more than one where a is transposed.
template <int R, int N, int STEP>
INLINE void product_block(const float *a, int lda, const float *b, int64_t ldb, int depth, float *c, int ldc,
                          bool add) {
  vf sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = vf{};
  for (int d = 0; d < depth; ++d) {
    vf right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(b + d * ldb + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf left = splat(a[r * lda + d * STEP]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = multiply(sum[r][n], left, right[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float *place = c + r * ldc + n * W;
      store(place, add ? load(place) + sum[r][n] : sum[r][n]);  // tile by tile: long sums keep their precision
    }
}

template <int N, int STEP>
static __attribute__((noinline)) void product(int rows, const float *a, int lda, const float *b, int64_t ldb,
                                              int depth, float *c, int ldc, bool add) {
  switch (rows) {
    case 1: product_block<1, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 2: product_block<2, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 3: product_block<3, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 4: product_block<4, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 5: product_block<5, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 6: product_block<6, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
  }
}

// c[rows x 16V] = or += a * b, rows <= MR, V vectors wide.
template <int V, int STEP = 1>
INLINE void product_wide(int rows, const float *a, int lda, const float *b, int64_t ldb, int depth, float *c, int ldc,
                         bool add) {
  constexpr int N = V < 4 ? V : 4, REST = V % N;
  for (int n = 0; n + N <= V; n += N) product<N, STEP>(rows, a, lda, b + n * W, ldb, depth, c + n * W, ldc, add);
  if (REST) product<(REST ? REST : 1), STEP>(rows, a, lda, b + (V - REST) * W, ldb, depth, c + (V - REST) * W, ldc, add);
}

// What a feed-forward block applies between its products.
INLINE vf activated(vf x) {
  const vf slope = x;
  const vf decay = exp2_of((slope < 0 ? slope : -slope) * splat(1.4426950408889634f));
  return x * (slope < 0 ? decay : splat(1.0f)) / (1.0f + decay);
}

constexpr int I = 19, O = 37;
constexpr int MR = 6, V = 4, PANEL = V * W;      // outputs and tokens that are held in registers
constexpr int TOKENS = 256, ROWS = 96, DEPTH = 768;  // tokens of a task, outputs and inputs of a block of weights
constexpr int IP = (I + W - 1) / W * W;
constexpr int64_t BLOCKS = (O + ROWS - 1) / ROWS;

struct Scratch {
  alignas(64) float panels[TOKENS / PANEL][IP][PANEL];
  alignas(64) float sums[TOKENS / PANEL][ROWS][PANEL];
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` tokens' inputs become panels; what is not there is zero.
OUTLINE void hold_tokens(Scratch &s, const float *x, int64_t stride, int count) {
  for (int t = 0; t < (count + PANEL - 1) / PANEL * PANEL; t += W)
    for (int i = 0; i < I; i += W) {
      vf block[W];
      for (int l = 0; l < W; ++l) {
        const float *row = x + (t + l) * stride + i;
        block[l] = t + l >= count ? vf{} : I - i >= W ? load(row) : widen_part(row, I - i);
      }
      transpose(block);
      for (int l = 0; l < W; ++l) store(&s.panels[t / PANEL][i + l][t % PANEL], block[l]);
    }
}

// Sums of `rows` outputs from `first` on, of all panels.
OUTLINE void add_up(const ProjectionLaunch &launch, Scratch &s, int64_t first, int rows, int panels) {
  for (int i = 0; i < I; i += DEPTH) {
    const int depth = (int)least(DEPTH, I - i);
    for (int p = 0; p < panels; ++p)
      for (int r = 0; r < rows; r += MR)
        product<V, 1>((int)least(MR, rows - r), launch.weight + (first + r) * launch.weight_stride + i,
                      (int)launch.weight_stride, s.panels[p][i], PANEL, depth, s.sums[p][r], PANEL, i > 0);
  }
}

OUTLINE void write_out(const ProjectionLaunch &launch, Scratch &s, int64_t first, int rows, float *out, int count) {
  alignas(64) float bias[ROWS] = {};
  if (launch.bias) memcpy(bias, launch.bias + first, (size_t)rows * sizeof(float));
  for (int t = 0; t < count; t += W)  // a few tokens at a time: their rows lie far apart
    for (int r = 0; r < rows; r += W) {
      vf block[W];
      for (int l = 0; l < W; ++l) block[l] = load(&s.sums[t / PANEL][r + l][t % PANEL]) + splat(bias[r + l]);
      transpose(block);
      for (int l = 0; l < W && t + l < count; ++l) {
        float *to = out + (t + l) * launch.out_stride[1] + first + r;
        if (rows - r >= W) store(to, activated(block[l]));
        else narrow_part(to, activated(block[l]), rows - r);
      }
    }
}

// Tasks of a sequence's tokens, and how many blocks of outputs each has.
INLINE int64_t parts_of(const ProjectionLaunch &launch) { return (launch.tokens + TOKENS - 1) / TOKENS; }

INLINE int64_t blocks_of(const ProjectionLaunch &launch) {
  const int64_t parts = launch.batch * parts_of(launch);
  return parts < 1 || launch.threads <= parts ? BLOCKS : (BLOCKS * parts + launch.threads - 1) / launch.threads;
}

INLINE int64_t slices_of(const ProjectionLaunch &launch) {
  const int64_t each = blocks_of(launch);
  return (BLOCKS + each - 1) / each;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The bytes of workspace that `launch->threads` threads take.
EXPORT int64_t projection_i19_o37_silu_f32_avx512_01b122f2_plan(ProjectionLaunch *launch) {
  if (launch->threads < 1) launch->threads = 1;
  return launch->threads * (int64_t)sizeof(Scratch);
}

// Before the first call of the work function, once the workspace is there.
EXPORT void projection_i19_o37_silu_f32_avx512_01b122f2_start(ProjectionLaunch *launch) { launch->next = launch->workers = 0; }

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void projection_i19_o37_silu_f32_avx512_01b122f2_work(void *pointer) {
  ProjectionLaunch &launch = *(ProjectionLaunch *)pointer;
  const int64_t worker = __atomic_fetch_add(&launch.workers, 1, __ATOMIC_RELAXED);
  if (worker >= launch.threads) return;
  Scratch &s = ((Scratch *)launch.workspace)[worker];
  const int64_t parts = parts_of(launch), each = blocks_of(launch), slices = slices_of(launch);
  for (;;) {
    const int64_t number = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (number >= launch.batch * parts * slices) return;
    const int64_t slice = number % slices, part = number / slices % parts, sequence = number / slices / parts;
    const int64_t token = part * TOKENS;
    const int count = (int)least(TOKENS, launch.tokens - token);
    hold_tokens(s, launch.x + sequence * launch.x_stride[0] + token * launch.x_stride[1], launch.x_stride[1], count);
    float *out = launch.out + sequence * launch.out_stride[0] + token * launch.out_stride[1];
    for (int64_t block = slice * each; block < least((slice + 1) * each, BLOCKS); ++block) {
      const int rows = (int)least(ROWS, O - block * ROWS);
      add_up(launch, s, block * ROWS, rows, (count + PANEL - 1) / PANEL);
      write_out(launch, s, block * ROWS, rows, out, count);
    }
  }
}

// start() and work() on `threads` threads of the caller's pool, which is entered as OpenMP's runtime is; on this
// thread alone if `pool` is null.
EXPORT void projection_i19_o37_silu_f32_avx512_01b122f2_run(ProjectionLaunch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  projection_i19_o37_silu_f32_avx512_01b122f2_start(launch);
  if (pool && launch->threads > 1) pool(projection_i19_o37_silu_f32_avx512_01b122f2_work, launch, (unsigned)launch->threads, 0);
  else projection_i19_o37_silu_f32_avx512_01b122f2_work(launch);
}
