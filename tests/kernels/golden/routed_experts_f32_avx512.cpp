// routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4: written by rewriter from a specification; edit the template, not this file.
//   hidden = 24
//   inner = 40
//   experts = 3
//   activation = Activation.GELU_TANH
//   gated = False
//   up_bias = True
//   down_bias = True
//   once = False
//   dtype = float32, instructions = avx512
//
// Routed feed-forward blocks. First a task is a few places of one expert: its tokens are gathered into scratch, taken
// through the first products panel by panel, and each panel is activated while it is at hand. Then a task is a slice of
// features: inner features of all experts, in order, by the slice's columns, weighted and added up where they belong, so
// that no two threads write one number and sums have one order. Products and sums are in single precision.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

// What a caller fills in; everything is dense.
struct RoutedLaunch {
  const void *x, *gate, *up, *down, *base;               // [N, H], [E, H, F] twice, [E, F, H], [N, H]; base may be null
  const float *gate_bias, *up_bias, *down_bias, *weights;  // [E, F] twice, [E, H], [E, M]
  const int32_t *rows;                                     // [E, M], -1 where a place is empty
  void *out;                                               // [N, H]
  int64_t tokens, places;                                  // N, M
  int64_t threads;  // how many will call the work function
  char *workspace;  // plan() bytes, by the caller, 64-byte aligned
  int64_t next;     // the task that nobody has taken yet
  int64_t workers;  // how many have begun
  int64_t second;   // which products are being made
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
  const vf slope = x * (splat(0.07135481282719746f) * x * x + splat(1.5957691216057308f));  // (1 + tanh y) / 2 = sigmoid(2 y)
  const vf decay = exp2_of((slope < 0 ? slope : -slope) * splat(1.4426950408889634f));
  return x * (slope < 0 ? decay : splat(1.0f)) / (1.0f + decay);
}

constexpr int E = 3, H = 24, F = 40;
constexpr int MR = 6;                        // rows that are held in registers
constexpr int N = 4, PANEL = N * W;           // columns of a product
constexpr int ROWS = 126, DEPTH = 192;             // places of a task, and how much of a sum is taken at once
constexpr int FP = (F + PANEL - 1) / PANEL * PANEL, HP = (H + W - 1) / W * W;
constexpr bool IN_PLACE = true;  // sums are kept in the result itself

struct Scratch {
  alignas(64) float tokens[ROWS][HP];
  alignas(64) float columns[DEPTH][PANEL];
  alignas(64) float panel[ROWS][PANEL];
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vf part_of(const T *p, int64_t left) { return left >= W ? widen(p) : left > 0 ? widen_part(p, (int)left) : vf{}; }
INLINE vf part_of_floats(const float *p, int64_t left) {
  float copy[W] = {};
  if (left >= W) return load(p);
  if (left > 0) memcpy(copy, p, (size_t)left * 4);
  return load(copy);
}

// c[count x PANEL] = a[count x depth] * columns [first, first + PANEL) of b[depth x width], zeros beyond its width.
static __attribute__((noinline)) void multiply_panel(Scratch &s, int count, const float *a, int lda, const T *b, int width,
                                                     int depth, int first, float *c, int ldc) {
  for (int k = 0; k < depth; k += DEPTH) {
    const int part = (int)least(DEPTH, depth - k);
    for (int d = 0; d < part; ++d)
      for (int u = 0; u < PANEL; u += W)
        store(&s.columns[d][u], part_of(b + (int64_t)(k + d) * width + first + u, width - first - u));
    for (int r = 0; r < count; r += MR)
      product<N, 1>((int)least(MR, count - r), a + r * lda + k, lda, s.columns[0], PANEL, part, c + r * ldc, ldc, k > 0);
  }
}

// Places of one task that are taken, and how many.
INLINE int taken(const RoutedLaunch &launch, int64_t expert, int64_t first, int64_t *places) {
  int count = 0;
  for (int64_t m = first; m < least(first + ROWS, launch.places); ++m)
    if (launch.rows[expert * launch.places + m] >= 0) places[count++] = expert * launch.places + m;
  return count;
}

INLINE float *inner_of(const RoutedLaunch &launch, int64_t expert, int64_t first) {
  return (float *)(launch.workspace + launch.threads * (int64_t)sizeof(Scratch)) + (expert * launch.places + first) * FP;
}

INLINE float *sums_of(const RoutedLaunch &launch, int64_t token) {
  if (IN_PLACE) return (float *)launch.out + token * H;
  return inner_of(launch, E, 0) + token * HP;
}

static void first_products(const RoutedLaunch &launch, Scratch &s, int64_t expert, int64_t first) {
  int64_t places[ROWS];
  const int count = taken(launch, expert, first, places);
  if (!count) return;
  for (int i = 0; i < count; ++i) {
    const T *row = (const T *)launch.x + (int64_t)launch.rows[places[i]] * H;
    for (int u = 0; u < HP; u += W) store(&s.tokens[i][u], part_of(row + u, H - u));
  }
  float *inner = inner_of(launch, expert, first);
  for (int j = 0; j < FP; j += PANEL) {
    multiply_panel(s, count, s.tokens[0], HP, (const T *)launch.up + expert * H * F, F, H, j, inner + j, FP);
    for (int u = 0; u < PANEL; u += W) {
      const vf up_bias = part_of_floats(launch.up_bias + expert * F + j + u, F - j - u);
      for (int i = 0; i < count; ++i) {
        float *place = inner + (int64_t)i * FP + j + u;
        const vf up = load(place) + up_bias;
        store(place, activated(up));
      }
    }
  }
}

static void second_products(const RoutedLaunch &launch, Scratch &s, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < launch.tokens; ++token)
    for (int64_t u = begin; u < end; ++u)
      sums_of(launch, token)[u] = launch.base ? scalar(((const T *)launch.base)[token * H + u]) : 0.0f;
  for (int64_t expert = 0; expert < E; ++expert)
    for (int64_t first = 0; first < launch.places; first += ROWS) {
      int64_t places[ROWS];
      const int count = taken(launch, expert, first, places);
      for (int64_t j = begin; count && j < end; j += PANEL) {
        multiply_panel(s, count, inner_of(launch, expert, first), FP, (const T *)launch.down + expert * F * H, H, F, (int)j,
                       s.panel[0], PANEL);
        for (int64_t u = 0; u < PANEL && j + u < end; u += W) {
          const int64_t left = end - j - u;
          const vf bias = part_of_floats(launch.down_bias + expert * H + j + u, left);
          for (int i = 0; i < count; ++i) {
            const vf more = (load(&s.panel[i][u]) + bias) * splat(launch.weights[places[i]]);
            float *sum = sums_of(launch, launch.rows[places[i]]) + j + u;
            if (left >= W) {
              store(sum, load(sum) + more);
            } else {
              float added[W];
              store(added, more);
              for (int64_t l = 0; l < left; ++l) sum[l] += added[l];
            }
          }
        }
      }
    }
  for (int64_t token = 0; !IN_PLACE && token < launch.tokens; ++token)
    for (int64_t u = begin; u < end; u += W) {
      T *place = (T *)launch.out + token * H + u;
      const vf sum = part_of_floats(sums_of(launch, token) + u, end - u);
      if (end - u >= W) narrow(place, sum);
      else narrow_part(place, sum, (int)(end - u));
    }
}

// Features of a slice: as many slices as threads, whole panels each.
INLINE int64_t slice_of(const RoutedLaunch &launch) {
  return ((H + launch.threads - 1) / launch.threads + PANEL - 1) / PANEL * PANEL;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The bytes of workspace that `launch->threads` threads take.
EXPORT int64_t routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_plan(RoutedLaunch *launch) {
  if (launch->threads < 1) launch->threads = 1;
  const int64_t sums = IN_PLACE ? 0 : launch->tokens * HP;
  return launch->threads * (int64_t)sizeof(Scratch) + (E * launch->places * FP + sums) * 4;
}

// Before the first call of the work function for either product.
EXPORT void routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_start(RoutedLaunch *launch, int64_t second) {
  launch->next = launch->workers = 0;
  launch->second = second;
}

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_work(void *pointer) {
  RoutedLaunch &launch = *(RoutedLaunch *)pointer;
  const int64_t worker = __atomic_fetch_add(&launch.workers, 1, __ATOMIC_RELAXED);
  if (worker >= launch.threads) return;
  Scratch &s = ((Scratch *)launch.workspace)[worker];
  const int64_t blocks = (launch.places + ROWS - 1) / ROWS, slice = slice_of(launch);
  for (;;) {
    const int64_t number = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (launch.second) {
      if (number * slice >= H) return;
      second_products(launch, s, number * slice, least(H, (number + 1) * slice));
    } else {
      if (number >= E * blocks) return;
      first_products(launch, s, number / blocks, number % blocks * ROWS);
    }
  }
}

// start() and work() for both products, on `threads` threads of the caller's pool, which is entered as OpenMP's runtime
// is; on this thread alone if `pool` is null.
EXPORT void routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_run(RoutedLaunch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  for (int64_t second = 0; second < 2; ++second) {
    routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_start(launch, second);
    if (pool && launch->threads > 1) pool(routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_work, launch, (unsigned)launch->threads, 0);
    else routed_e3_d24_f40_gelu_tanh_f32_avx512_291c7fb4_work(launch);
  }
}
