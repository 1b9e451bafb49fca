// linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9: written by rewriter from a specification; edit the template, not this file.
//   attention = {'heads': 4, 'kv_heads': 2, 'head_dim': 6, 'value_dim': 5, 'scale': 1.0, 'causal': True, 'bias': False, 'softcap': None, 'masked_rows_are_zero': False, 'sinks': False}
//   chunk = 20
//   features = FeatureMap.LEARNED
//   dtype = float32, instructions = avx512
//
// Linear attention, chunk by chunk: near keys by their scores, far ones by one product of a query's features with the
// sum of k v over far chunks. A task is one key/value head of one sequence: it walks over the chunks once and keeps the
// sum of those before the near ones. Any
// number of threads may call the work function; they draw tasks from one counter. All sums are in single precision.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

// What a caller fills in. Strides count elements; the last axis of q, k, v and out is dense.
struct LinearLaunch {
  const void *q, *k, *v;
  const uint8_t *shown;                      // [batch, keys]; null if all are
  const float *query_map, *key_map, *gain;  // [heads or groups][D][MAP_WIDTH], transposed and padded; [heads]
  void *out;
  int64_t batch, queries, keys;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
  int64_t shown_stride;                                           // batch
  float scale, query_scale, key_scale;  // of scores, and of what features read of queries and of keys
  int64_t threads;  // how many will call the work function
  char *workspace;  // plan() bytes, by the caller, 64-byte aligned
  int64_t next;     // the task that nobody has taken yet
  int64_t workers;  // how many have begun
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

constexpr int KV_HEADS = 2, GROUP = 2, D = 6, E = 5;
constexpr int C = 20, F = 12;  // tokens of a chunk, features of a head
constexpr int MR = 6;             // rows that are held in registers
constexpr int NEAR = 2;   // chunks that queries see by scores
constexpr int padded(int n) { return (n + W - 1) / W * W; }
constexpr int DP = padded(D), EP = padded(E), CP = padded(C), FP = padded(F) + W;
constexpr int MAP_WIDTH = (D + 15) / 16 * 16;
constexpr bool V_IN_PLACE = false;
constexpr float NONE = -__builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f;

// What a worker works on.
struct Scratch {
  alignas(64) float keys[3][DP][CP];   // of the near chunks, transposed; chunk c has place c % 3
  alignas(64) float hides[3][CP];      // minus infinity for keys that nobody sees, 0 for others
  alignas(64) float values[V_IN_PLACE ? 1 : 3][C][EP];
  int64_t held[3];                     // which chunks these are
  alignas(64) float rows[C][DP], turned[C][DP];
  alignas(64) float features[C][FP];
  alignas(64) float scores[MR][NEAR * CP];
  alignas(64) float out[C][EP];
  float total[C];
  alignas(64) float state[F][EP], sums[FP];  // over far chunks, of k v and of k
};

struct Task {
  int64_t batch, kv_head, first, chunks;  // the first query's position; chunks of keys
  const T *k, *v;
  const uint8_t *shown;
  Scratch *scratch;
  float *kept;  // [GROUP][queries][EP + 1], what the first walk found
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void widen_row(float *to, const T *row, int size) {
  for (int u = 0; u < size; u += W) store(to + u, size - u >= W ? widen(row + u) : widen_part(row + u, size - u));
}

// Features of `count` rows of scratch.rows times `scale`; `map` is the head's own, transposed.
static __attribute__((noinline)) void make_features(Scratch &s, int count, [[maybe_unused]] const float *map, float scale) {
  const vf steep = splat(scale * LOG2_E);
  for (int r = 0; r < count; r += MR)
    product_wide<DP / W>((int)least(MR, count - r), s.rows[r], DP, map, MAP_WIDTH, D, s.turned[r], DP, false);
  for (int r = 0; r < count; ++r) {
    vf top = splat(NONE), low = splat(NONE);
    for (int j = 0; j < DP; j += W) {
      const vf x = load(&s.turned[r][j]);
      top = larger(LANES + j < D ? x : splat(NONE), top);
      low = larger(LANES + j < D ? -x : splat(NONE), low);
    }
    const vf highest = splat(largest_of(top)), lowest = splat(largest_of(low));
    vf sum = {}, other = {};
    for (int j = 0; j < DP; j += W) {
      const vf x = load(&s.turned[r][j]);
      const vf one = exp2_of((x - highest) * steep), two = exp2_of((-x - lowest) * steep);
      sum += LANES + j < D ? one : vf{};
      other += LANES + j < D ? two : vf{};
      store(&s.features[r][j], one);
      store(&s.turned[r][j], two);
    }
    const vf share = splat(1.0f / sum_of(sum)), rest = splat(1.0f / sum_of(other));
    for (int j = 0; j < DP; j += W) store(&s.features[r][j], load(&s.features[r][j]) * share);
    for (int j = 0; j < DP; j += W) store(&s.features[r][D + j], load(&s.turned[r][j]) * rest);  // what lies behind is not read
  }
}

INLINE bool is_shown(const Task &task, int64_t key) { return !task.shown || task.shown[key]; }

INLINE const float *values_of(const LinearLaunch &launch, const Task &task, int64_t chunk, int64_t &ld) {
  if (V_IN_PLACE) {
    ld = launch.v_stride[2];
    return (const float *)(const void *)(task.v + chunk * C * launch.v_stride[2]);
  }
  ld = EP;
  return task.scratch->values[V_IN_PLACE ? 0 : chunk % 3][0];
}

// Keys and values of a chunk into their place; `keys`: also transposed, for scores.
INLINE void hold(const LinearLaunch &launch, const Task &task, int64_t chunk, bool keys) {
  Scratch &s = *task.scratch;
  const int64_t place = chunk % 3, begin = chunk * C;
  const int count = (int)least(C, launch.keys - begin);
  if (!V_IN_PLACE)
    for (int j = 0; j < count; ++j) widen_row(s.values[V_IN_PLACE ? 0 : place][j], task.v + (begin + j) * launch.v_stride[2], E);
  if (!keys || s.held[place] == chunk) return;
  s.held[place] = chunk;
  for (int j = 0; j < CP; ++j) s.hides[place][j] = j < count && is_shown(task, begin + j) ? 0.0f : NONE;
  for (int j = 0; j < CP; j += W)
    for (int u = 0; u < DP; u += W) {
      vf block[W];
      for (int i = 0; i < W; ++i) {
        const T *row = task.k + (begin + j + i) * launch.k_stride[2] + u;
        block[i] = j + i >= count ? vf{} : D - u >= W ? widen(row) : widen_part(row, D - u);
      }
      transpose(block);
      for (int i = 0; i < W; ++i) store(&s.keys[place][u + i][j], block[i]);
    }
}

// A chunk joins the far ones.
static __attribute__((noinline)) void join(const LinearLaunch &launch, const Task &task, int64_t chunk) {
  Scratch &s = *task.scratch;
  const int64_t begin = chunk * C;
  const int count = (int)least(C, launch.keys - begin);
  for (int j = 0; j < count; ++j) widen_row(s.rows[j], task.k + (begin + j) * launch.k_stride[2], D);
  make_features(s, count, launch.key_map + task.kv_head * D * MAP_WIDTH, launch.key_scale);
  for (int j = 0; j < count; ++j) {
    if (!is_shown(task, begin + j)) memset(s.features[j], 0, sizeof s.features[j]);
    for (int f = 0; f < padded(F); f += W) store(s.sums + f, load(s.sums + f) + load(&s.features[j][f]));
  }
  hold(launch, task, chunk, false);
  int64_t ld;
  const float *values = values_of(launch, task, chunk, ld);
  for (int f = 0; f < F; f += MR)
    product_wide<EP / W, FP>((int)least(MR, F - f), &s.features[0][f], 1, values, ld, count, s.state[f], EP, true);
}

// Near keys of rows [first, first + count) of the chunk's queries; positions from `position` on.
INLINE void attend_near(const LinearLaunch &launch, const Task &task, int64_t chunk, int64_t position, int first, int count) {
  Scratch &s = *task.scratch;
  const int64_t begin = chunk > 0 ? chunk - 1 : 0, end = least(chunk + 1, task.chunks);
  const int width = (int)(end - begin) * CP;
  for (int64_t m = begin; m < end; ++m)
    product_wide<CP / W>(count, s.rows[first], DP, s.keys[m % 3][0], CP, D, s.scores[0] + (m - begin) * CP, NEAR * CP, false);
  for (int r = 0; r < count; ++r) {
    float *line = s.scores[r];
    vf top = splat(NONE);
    for (int j = 0; j < width; j += W) {
      const int64_t m = begin + j / CP;
      vf score = load(line + j) * splat(launch.scale * LOG2_E);
      const vf hides = load(&s.hides[m % 3][j % CP]);
      score = hides == 0 ? score : splat(NONE);
      const int64_t last = position + first + r - m * C - j % CP;  // of these lanes, the last that the order shows
      if (last < W - 1) score = LANES <= (int)last ? score : splat(NONE);
      store(line + j, score);
      top = larger(score, top);
    }
    const float largest = largest_of(top);
    const vf base = splat(largest == NONE ? 0.0f : largest);
    vf total = {};
    for (int j = 0; j < width; j += W) {
      const vf weight = exp2_of(load(line + j) - base);
      total += weight;
      store(line + j, weight);
    }
    s.total[first + r] = sum_of(total);
  }
  for (int64_t m = begin; m < end; ++m) {
    int64_t ld;
    const float *values = values_of(launch, task, m, ld);
    product_wide<EP / W>(count, s.scores[0] + (m - begin) * CP, NEAR * CP, values, ld, (int)least(C, launch.keys - m * C),
                         s.out[first], EP, m > begin);
  }
}

// What far keys add to rows [first, first + count).
INLINE void attend_far(const Task &task, int64_t head, float gain, int first, int count) {
  Scratch &s = *task.scratch;
  for (int r = first; r < first + count; ++r) {
    vf total = {};
    for (int f = 0; f < padded(F); f += W) {
      const vf x = load(&s.features[r][f]) * splat(gain);
      store(&s.features[r][f], x);
      total += LANES + f < F ? x * load(s.sums + f) : vf{};  // behind the last feature stands whatever was there
    }
    s.total[r] += sum_of(total);
  }
  product_wide<EP / W>(count, s.features[first], FP, s.state[0], EP, F, s.out[first], EP, true);
}

// The chunk's queries of one head. `near`: by scores too, else to what was kept the far part is added.
static __attribute__((noinline)) void attend(const LinearLaunch &launch, const Task &task, int64_t chunk, int g, bool near, bool last) {
  Scratch &s = *task.scratch;
  const int64_t head = task.kv_head * GROUP + g;
  const int64_t position = chunk * C > task.first ? chunk * C : task.first, query = position - task.first;
  const int count = (int)(least((chunk + 1) * C, launch.keys) - position);
  const T *q = (const T *)launch.q + task.batch * launch.q_stride[0] + head * launch.q_stride[1] + query * launch.q_stride[2];
  T *out = (T *)launch.out + task.batch * launch.out_stride[0] + head * launch.out_stride[1] + query * launch.out_stride[2];
  float *kept = task.kept + (g * launch.queries + query) * (EP + 1);
  for (int r = 0; r < count; ++r) widen_row(s.rows[r], q + r * launch.q_stride[2], D);
  make_features(s, count, launch.query_map + head * D * MAP_WIDTH, launch.query_scale);
  for (int r = 0; r < count && !near; ++r) {
    memcpy(s.out[r], kept + r * (EP + 1), sizeof s.out[r]);
    s.total[r] = kept[r * (EP + 1) + EP];
  }
  for (int first = 0; first < count; first += MR) {
    const int rows = (int)least(MR, count - first);
    if (near) attend_near(launch, task, chunk, position, first, rows);
    attend_far(task, head, launch.gain[head], first, rows);
  }
  for (int r = 0; r < count; ++r) {
    if (!last) {
      memcpy(kept + r * (EP + 1), s.out[r], sizeof s.out[r]);
      kept[r * (EP + 1) + EP] = s.total[r];
      continue;
    }
    const vf share = splat(s.total[r] > 0.0f ? 1.0f / s.total[r] : 1.0f);
    for (int e = 0; e < EP; e += W) {
      const vf x = load(&s.out[r][e]) * share;
      if (E - e >= W) narrow(out + r * launch.out_stride[2] + e, x);
      else narrow_part(out + r * launch.out_stride[2] + e, x, E - e);
    }
  }
}

INLINE void run_task(const LinearLaunch &launch, Task &task) {
  Scratch &s = *task.scratch;
  for (int64_t &chunk : s.held) chunk = -1;
  memset(s.state, 0, sizeof s.state);
  memset(s.sums, 0, sizeof s.sums);
  const int64_t start = task.first / C;
  for (int64_t c = 0; c < task.chunks; ++c) {
    if (c >= 2) join(launch, task, c - 2);
    if (c < start) continue;
    for (int64_t m = c > 0 ? c - 1 : 0; m < least(c + 1, task.chunks); ++m) hold(launch, task, m, true);
    for (int g = 0; g < GROUP; ++g) attend(launch, task, c, g, true, true);
  }
}

INLINE int64_t kept_bytes(const LinearLaunch &launch) {
  return 0 * launch.queries;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The bytes of workspace that `launch->threads` threads take.
EXPORT int64_t linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_plan(LinearLaunch *launch) {
  const int64_t tasks = launch->batch * KV_HEADS;
  if (launch->threads > tasks) launch->threads = tasks;
  if (launch->threads < 1) launch->threads = 1;
  launch->next = launch->workers = 0;
  return launch->threads * ((int64_t)sizeof(Scratch) + kept_bytes(*launch));
}

// Before the first call of the work function, once the workspace is there.
EXPORT void linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_start(LinearLaunch *launch) { launch->next = launch->workers = 0; }

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_work(void *pointer) {
  LinearLaunch &launch = *(LinearLaunch *)pointer;
  const int64_t worker = __atomic_fetch_add(&launch.workers, 1, __ATOMIC_RELAXED);
  if (worker >= launch.threads) return;
  char *own = launch.workspace + worker * ((int64_t)sizeof(Scratch) + kept_bytes(launch));
  for (;;) {
    const int64_t number = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (number >= launch.batch * KV_HEADS) return;
    const int64_t batch = number / KV_HEADS, kv_head = number % KV_HEADS;
    Task task = {batch, kv_head, launch.keys - launch.queries, (launch.keys + C - 1) / C,
                 (const T *)launch.k + batch * launch.k_stride[0] + kv_head * launch.k_stride[1],
                 (const T *)launch.v + batch * launch.v_stride[0] + kv_head * launch.v_stride[1],
                 launch.shown ? launch.shown + batch * launch.shown_stride : nullptr,
                 (Scratch *)own, (float *)(own + sizeof(Scratch))};
    run_task(launch, task);
  }
}

// start() and work() on `threads` threads of the caller's pool, which is entered as OpenMP's runtime is; on this
// thread alone if `pool` is null.
EXPORT void linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_run(LinearLaunch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_start(launch);
  if (pool && launch->threads > 1) pool(linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_work, launch, (unsigned)launch->threads, 0);
  else linear_h4_kv2_d6_c20_learned_causal_f32_avx512_7743d3c9_work(launch);
}
