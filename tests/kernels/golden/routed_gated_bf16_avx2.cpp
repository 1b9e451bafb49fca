// routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b: written by rewriter from a specification; edit the template, not this file.
//   hidden = 19
//   inner = 35
//   experts = 2
//   activation = Activation.SILU
//   gated = True
//   up_bias = True
//   down_bias = False
//   once = False
//   dtype = bfloat16, instructions = avx2
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

// Vectors of 8 floats in the compiler's own notation; intrinsics only where it has no word for it.
constexpr int W = 8;
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));
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
INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x}; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7};

// Lane l of FIRST_s is a[l] where l has bit s clear, else b[l - s]; of SECOND_s a[l + s], else b[l].
#define FIRST_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define SECOND_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define FIRST_2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND_2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define FIRST_1(a, b) SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define SECOND_1(a, b) SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15)

// Rows of a W x W block become its columns.
INLINE void transpose(vf *rows) {
  { vf a = rows[0], b = rows[4]; rows[0] = FIRST_4(a, b); rows[4] = SECOND_4(a, b); }
  { vf a = rows[1], b = rows[5]; rows[1] = FIRST_4(a, b); rows[5] = SECOND_4(a, b); }
  { vf a = rows[2], b = rows[6]; rows[2] = FIRST_4(a, b); rows[6] = SECOND_4(a, b); }
  { vf a = rows[3], b = rows[7]; rows[3] = FIRST_4(a, b); rows[7] = SECOND_4(a, b); }
  { vf a = rows[0], b = rows[2]; rows[0] = FIRST_2(a, b); rows[2] = SECOND_2(a, b); }
  { vf a = rows[1], b = rows[3]; rows[1] = FIRST_2(a, b); rows[3] = SECOND_2(a, b); }
  { vf a = rows[4], b = rows[6]; rows[4] = FIRST_2(a, b); rows[6] = SECOND_2(a, b); }
  { vf a = rows[5], b = rows[7]; rows[5] = FIRST_2(a, b); rows[7] = SECOND_2(a, b); }
  { vf a = rows[0], b = rows[1]; rows[0] = FIRST_1(a, b); rows[1] = SECOND_1(a, b); }
  { vf a = rows[2], b = rows[3]; rows[2] = FIRST_1(a, b); rows[3] = SECOND_1(a, b); }
  { vf a = rows[4], b = rows[5]; rows[4] = FIRST_1(a, b); rows[5] = SECOND_1(a, b); }
  { vf a = rows[6], b = rows[7]; rows[6] = FIRST_1(a, b); rows[7] = SECOND_1(a, b); }
}

// Lane l of the result is the sum over the lanes of rows[l].
INLINE vf sums(vf *rows) {
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
  x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += SHUFFLE(x, x, 2, 3, 0, 1, 2, 3, 0, 1);
  x += SHUFFLE(x, x, 1, 0, 1, 0, 1, 0, 1, 0);
  return x[0];
}

INLINE float largest_of(vf x) {
  x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = larger(x, SHUFFLE(x, x, 2, 3, 0, 1, 2, 3, 0, 1));
  x = larger(x, SHUFFLE(x, x, 1, 0, 1, 0, 1, 0, 1, 0));
  return x[0];
}

// 2^x for x <= 0: a polynomial of degree 5 on [-1/2, 1/2]; 0 below 2^-126, NaN for NaN.
INLINE vf exp2_of(vf x) {
  const vf lowest = splat(-126.0f), magic = splat(12582912.0f);
  vf y = x < lowest ? lowest : x;
  vf whole = (y + magic) - magic;
  vf part = y - whole;
  vf power = splat(0.001327647152f);
  power = power * part + splat(0.009675541331f);
  power = power * part + splat(0.05550713275f);
  power = power * part + splat(0.2402211972f);
  power = power * part + splat(0.6931469671f);
  power = power * part + splat(1.000000072f);
  vi shift = __builtin_convertvector(whole, vi) << 23;
  vf found = (vf)((vi)power + shift);
  return x < lowest ? vf{} : found;
}

// One storage type and its way into and out of vectors of single precision.
typedef uint16_t T;
INLINE vf widen(const T *p) { return (vf)(__builtin_convertvector(*(const vh_anywhere *)p, vu) << 16); }
INLINE void narrow(T *p, vf x) {
  vu bits = (vu)x;
  vu even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vu kept = (vu)((x != x) ? (vi)(vu{} + 0x7fc0u) : (vi)even);
  *(vh_anywhere *)p = __builtin_convertvector(kept, vh);
}
INLINE float scalar(T x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

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
  constexpr int N = V < 2 ? V : 2, REST = V % N;
  for (int n = 0; n + N <= V; n += N) product<N, STEP>(rows, a, lda, b + n * W, ldb, depth, c + n * W, ldc, add);
  if (REST) product<(REST ? REST : 1), STEP>(rows, a, lda, b + (V - REST) * W, ldb, depth, c + (V - REST) * W, ldc, add);
}

// What a feed-forward block applies between its products.
INLINE vf activated(vf x) {
  const vf slope = x;
  const vf decay = exp2_of((slope < 0 ? slope : -slope) * splat(1.4426950408889634f));
  return x * (slope < 0 ? decay : splat(1.0f)) / (1.0f + decay);
}

constexpr int E = 2, H = 19, F = 35;
constexpr int MR = 6;                        // rows that are held in registers
constexpr int N = 2, PANEL = N * W;           // columns of a product
constexpr int ROWS = 126, DEPTH = 192;             // places of a task, and how much of a sum is taken at once
constexpr int FP = (F + PANEL - 1) / PANEL * PANEL, HP = (H + W - 1) / W * W;
constexpr bool IN_PLACE = false;  // sums are kept in the result itself

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
    multiply_panel(s, count, s.tokens[0], HP, (const T *)launch.gate + expert * H * F, F, H, j, s.panel[0], PANEL);
    for (int u = 0; u < PANEL; u += W) {
      const vf up_bias = part_of_floats(launch.up_bias + expert * F + j + u, F - j - u);
      const vf gate_bias = part_of_floats(launch.gate_bias + expert * F + j + u, F - j - u);
      for (int i = 0; i < count; ++i) {
        float *place = inner + (int64_t)i * FP + j + u;
        const vf up = load(place) + up_bias;
        store(place, activated(load(&s.panel[i][u]) + gate_bias) * up);
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
          for (int i = 0; i < count; ++i) {
            const vf more = (load(&s.panel[i][u])) * splat(launch.weights[places[i]]);
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
EXPORT int64_t routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_plan(RoutedLaunch *launch) {
  if (launch->threads < 1) launch->threads = 1;
  const int64_t sums = IN_PLACE ? 0 : launch->tokens * HP;
  return launch->threads * (int64_t)sizeof(Scratch) + (E * launch->places * FP + sums) * 4;
}

// Before the first call of the work function for either product.
EXPORT void routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_start(RoutedLaunch *launch, int64_t second) {
  launch->next = launch->workers = 0;
  launch->second = second;
}

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_work(void *pointer) {
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
EXPORT void routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_run(RoutedLaunch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  for (int64_t second = 0; second < 2; ++second) {
    routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_start(launch, second);
    if (pool && launch->threads > 1) pool(routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_work, launch, (unsigned)launch->threads, 0);
    else routed_e2_d19_f35_silu_gated_bf16_avx2_7824690b_work(launch);
  }
}
