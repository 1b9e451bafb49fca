// gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270: written by rewriter from a specification; edit the template, not this file.
//   heads = 32
//   kv_heads = 1
//   head_dim = 16
//   value_dim = 16
//   scale = 0.25
//   causal = True
//   bias = False
//   softcap = None
//   masked_rows_are_zero = True
//   sinks = False
//   dtype = bfloat16, instructions = avx512_bf16
//
// Flash attention over key tiles: a task takes a few query rows of one key/value head, walks over that head's keys
// once for all of them, and keeps a running maximum, sum and output per row. With few tasks the keys are split too,
// and the last task of a split merges. Rows are query heads of one group times queries, so that K and V are read once
// for the whole group. Any number of threads may call the work function; they draw tasks from one counter.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

// What a caller fills in. Strides count elements; the last axis of q, k, v and out is dense.
struct Launch {
  const void *q, *k, *v, *bias, *sinks;
  void *out;
  int64_t batch, queries, keys, sink_columns;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
  int64_t bias_stride[4], sink_stride[4];                         // batch, head, query, key; 0 where broadcast
  int64_t bias_is_boolean;
  int64_t threads;  // how many will call the work function
  // What plan() decides.
  int64_t splits, groups, head_blocks, query_blocks, query_rows;
  char *workspace;  // plan() bytes, by the caller, 64-byte aligned
  int64_t next;     // the task that nobody has taken yet
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

// 2^x for x <= 0: a polynomial of degree 3 on [-1/2, 1/2]; 0 below 2^-126, NaN for NaN.
INLINE vf exp2_of(vf x) {
  // max() keeps a NaN in its second operand
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-126.0f), (__m512)x);
  const __m512 whole = _mm512_roundscale_ps(y, 8);
  const vf part = (vf)_mm512_sub_ps(y, whole);
  vf power = splat(0.05517166493f);
  power = power * part + splat(0.2426111219f);
  power = power * part + splat(0.6932609862f);
  power = power * part + splat(0.9999280736f);
  const __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(there, (__m512)power, whole);
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

constexpr int KV_HEADS = 1, GROUP = 32, D = 16, E = 16;
constexpr int ROWS = 128;       // of a task, at most
constexpr int KT = 64;     // keys of a tile
constexpr int MR = 6;   // rows that are held in registers
constexpr int SCORE_VECTORS = 4, OUT_VECTORS = 1;
constexpr int FEW_ROWS = 0;  // up to here a dot product per key beats transposing keys
constexpr int PAIR = 2;    // numbers per 32-bit unit of a product's operands
constexpr int D_UNITS = (D + PAIR * W - 1) / (PAIR * W) * W, E_PADDED = (E + W - 1) / W * W;
constexpr int KT_UNITS = KT / PAIR;
constexpr bool V_IN_PLACE = false;  // values need no conversion, only their rows
constexpr bool V_LAID_OUT = true;  // some tiles of values are copied
constexpr float NONE = -__builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f;

constexpr int APART = 1;

// Lines of memory that will be read next, asked for one by one while sums go on: of too many at once the rest waits, and
// what nobody asks for is waited for.
struct Ahead {
  const char *row[2];  // of keys, then of values
  int64_t stride[2];
  int rows[2], at, now;
  // `count` keys and their values.
  INLINE_MEMBER void begin(const T *k, int64_t k_stride, const T *v, int64_t v_stride, int64_t count) {
    row[0] = (const char *)k, row[1] = (const char *)v;
    stride[0] = k_stride * (int64_t)sizeof(T), stride[1] = v_stride * (int64_t)sizeof(T);
    rows[0] = rows[1] = (int)count;
    at = 0, now = count > 0 ? 0 : 2;
  }
  INLINE_MEMBER void line() {
    if (now == 2) return;
    _mm_prefetch(row[now] + at, _MM_HINT_T1);
    at += 64;
    if (at < (now ? E : D) * (int)sizeof(T)) return;
    at = 0, row[now] += stride[now];
    if (--rows[now] == 0) ++now;
  }
  INLINE_MEMBER void lines(int count) {
    for (int n = 0; n < count; ++n) line();
  }
};

// c += a * b, where an operand's 32-bit unit is one float, here two bfloat16.
INLINE vf multiply(vf c, vf a, vf b) {
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

// c[R x 16N] = or += a[R x depth] * b[depth x 16N], in units; accumulators never leave registers. From one depth of a to
// the next are STEP units: more than one where a is transposed.
template <int R, int N, int STEP>
INLINE void product_block(const float *a, int lda, const float *b, int64_t ldb, int depth, float *c, int ldc,
                          bool add, Ahead &ahead) {
  vf sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = vf{};
  for (int d = 0; d < depth; ++d) {
    vf right[N];
    if (R > 0) ahead.line();
    else if (R >= 1) ahead.lines(N);
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
                                              int depth, float *c, int ldc, bool add, Ahead &ahead) {
  switch (rows) {
    case 1: product_block<1, N, STEP>(a, lda, b, ldb, depth, c, ldc, add, ahead); break;
    case 2: product_block<2, N, STEP>(a, lda, b, ldb, depth, c, ldc, add, ahead); break;
    case 3: product_block<3, N, STEP>(a, lda, b, ldb, depth, c, ldc, add, ahead); break;
    case 4: product_block<4, N, STEP>(a, lda, b, ldb, depth, c, ldc, add, ahead); break;
    case 5: product_block<5, N, STEP>(a, lda, b, ldb, depth, c, ldc, add, ahead); break;
    case 6: product_block<6, N, STEP>(a, lda, b, ldb, depth, c, ldc, add, ahead); break;
  }
}

// c[rows x 16V] = or += a * b, rows <= MR, V vectors wide.
template <int V, int STEP = 1>
INLINE void product_wide(int rows, const float *a, int lda, const float *b, int64_t ldb, int depth, float *c, int ldc,
                         bool add, Ahead &ahead) {
  constexpr int N = V < 4 ? V : 4, REST = V % N;
  for (int n = 0; n + N <= V; n += N) product<N, STEP>(rows, a, lda, b + n * W, ldb, depth, c + n * W, ldc, add, ahead);
  if (REST) product<(REST ? REST : 1), STEP>(rows, a, lda, b + (V - REST) * W, ldb, depth, c + (V - REST) * W, ldc, add, ahead);
}

// One vector of units of a row of `size` numbers, from unit `unit` on; zeros behind its end.
INLINE vf units(const T *row, int unit, int size) {
  const int first = 2 * unit, left = size - first;
  if (left >= 2 * W) return *(const vf_anywhere *)(row + first);
  T copy[2 * W] = {};
  if (left > 0) memcpy(copy, row + first, (size_t)left * sizeof(T));
  return *(const vf_anywhere *)copy;
}

// Rows first, first + apart, ... of a task.
struct Rows {
  int first, apart, count;
  INLINE_MEMBER int operator[](int r) const { return first + r * apart; }
};

// What a task works on; it lives on its thread's stack.
struct Tile {
  alignas(64) float q[ROWS][D_UNITS];
  alignas(64) float out[ROWS][E_PADDED];
  alignas(64) float keys[D_UNITS][KT];
  alignas(64) float values[V_LAID_OUT ? KT_UNITS : 1][E_PADDED];
  alignas(64) float scores[MR][KT];
  alignas(64) float weights[MR][KT_UNITS];
  alignas(64) float largest[ROWS];
  alignas(64) float total[ROWS][W];  // lane by lane
  int64_t row[ROWS];                 // the query's number
  int rows;
  Ahead ahead;
};

// Rows are queries of heads, head by head.
struct Task {
  int64_t batch, kv_head, head, query;
  int heads, queries;
  INLINE_MEMBER int64_t head_of(int r) const { return head + r / queries * APART; }
  INLINE_MEMBER int64_t query_of(int r) const { return query + r % queries; }
};

INLINE const T *query_at(const Launch &launch, const Task &task, int r) {
  return (const T *)launch.q + task.batch * launch.q_stride[0] + task.head_of(r) * launch.q_stride[1] +
         task.query_of(r) * launch.q_stride[2];
}

OUTLINE void lay_out_values(Tile &tile, const T *v, int64_t stride, int count) {
  static const uint16_t LOW[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_loadu_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int j = 0; j < count; j += 2)
    for (int e = 0; e < E_PADDED; e += 2 * W) {
      const __m512i first = (__m512i)units(v + j * stride, e / 2, E);
      const __m512i second = j + 1 < count ? (__m512i)units(v + (j + 1) * stride, e / 2, E) : __m512i{};
      store(&tile.values[j / 2][e], (vf)_mm512_permutex2var_epi16(first, low, second));
      if (e + W < E_PADDED) store(&tile.values[j / 2][e + W], (vf)_mm512_permutex2var_epi16(first, high, second));
    }
}


INLINE void transpose_keys(Tile &tile, const T *k, int64_t stride, int count) {
  for (int j = 0; j < KT; j += W) {
    const int there = count - j;
    if (there <= 0) break;
    for (int u = 0; u < D_UNITS; u += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = i < there ? units(k + (j + i) * stride, u, D) : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(&tile.keys[u + i][j], block[i]);
    }
  }
}


// Scores of keys [from, to) become weights; the running maximum, sum and output follow. The tile has `count` keys,
// the first of which is `start`.
INLINE void weigh(const Launch &launch, Tile &tile, Rows rows, int64_t start, int from, int to, int count) {
  const int64_t queries = launch.queries, keys = launch.keys;
  for (int r = 0; r < rows.count; ++r) {
    const int at = rows[r];
    float *line = tile.scores[r];
    const int64_t row = tile.row[at], last = row + (keys - queries);
    const int64_t seen = last + 1 - start;
    const int visible = seen < 0 ? 0 : seen < count ? (int)seen : count;
    vf top = splat(NONE);
    for (int j = from; j < to; j += W) {
      const int left = visible - j;
      if (left <= 0) {
        store(line + j, splat(NONE));
        continue;
      }
      vf score = load(line + j);
      score = score * splat(0x1.71547652b82fep-2f);
      if (left < W) score = LANES < left ? score : splat(NONE);
      store(line + j, score);
      top = larger(score, top);
    }
    const float before = tile.largest[at], here = largest_of(top), after = here > before ? here : before;
    const vf base = splat(after == NONE ? 0.0f : after);
    float *sum = tile.total[at], *out = tile.out[at];
    if (after > before) {
      const vf left = splat(before), keep = exp2_of(left - base);
      store(sum, load(sum) * keep);
      for (int e = 0; e < E_PADDED; e += W) store(out + e, load(out + e) * keep);
      tile.largest[at] = after;
    }
    vf total = load(sum);
    for (int j = from; j < to; j += PAIR * W) {
      const vf one = exp2_of(load(line + j) - base);
      const vf two = exp2_of(load(line + j + W) - base);
      total += one + two;
      store(&tile.weights[r][j / 2], (vf)_mm512_cvtne2ps_pbh((__m512)two, (__m512)one));
    }
    store(sum, total);
  }
}

// One key tile for some rows of the task.
INLINE void attend(const Launch &launch, Tile &tile, Rows rows, const T *k, const T *v, int64_t start, int count) {
  const int64_t k_stride = launch.k_stride[2], v_stride = launch.v_stride[2];
  const bool few = false;
  const bool in_place = V_IN_PLACE;
  if (!few) transpose_keys(tile, k, k_stride, count);
  if (!in_place) lay_out_values(tile, v, v_stride, count);
  const int blocks = (rows.count + MR - 1) / MR;
  for (int b = 0; b < blocks; ++b) {
    const int before = rows.count * b / blocks;
    const Rows block = {rows[before], rows.apart, rows.count * (b + 1) / blocks - before};
    constexpr int from = 0, to = KT;
    const int depth = count;
    const int lda = D_UNITS * rows.apart;
      product_wide<SCORE_VECTORS>(block.count, tile.q[block.first], lda, tile.keys[0], KT, D_UNITS, tile.scores[0], KT, false, tile.ahead);
    weigh(launch, tile, block, start, from, to, count);
    const float *values = in_place ? (const float *)(const void *)(v + 0) : tile.values[0];
    const int64_t ldv = in_place ? v_stride : E_PADDED;
    product_wide<OUT_VECTORS>(block.count, tile.weights[0] + from / PAIR, KT_UNITS, values + from / PAIR * ldv, ldv,
                              (depth + PAIR - 1) / PAIR, tile.out[block.first], E_PADDED * rows.apart, true, tile.ahead);
  }
}

INLINE float total_of(const Tile &tile, int r) {
  return sum_of(load(tile.total[r]));
}

INLINE void begin(const Launch &launch, Tile &tile, const Task &task, [[maybe_unused]] bool with_sinks) {
  const int64_t batch = task.batch;
  tile.rows = task.heads * task.queries;
  for (int r = 0; r < tile.rows; ++r) {
    [[maybe_unused]] const int64_t h = task.head_of(r), i = task.query_of(r);
    
    for (int u = 0; u < D_UNITS; u += W) store(&tile.q[r][u], units(query_at(launch, task, r), u, D));
    tile.row[r] = i;
    tile.largest[r] = NONE;
    store(tile.total[r], vf{});
    memset(tile.out[r], 0, sizeof tile.out[r]);
  }
}

INLINE void write_row(T *out, const float *sum, float total, int64_t keys) {
  // a row that sees none of the keys has no weights; where there are no keys, the sum over them is zero
  (void)keys;
  const vf share = splat(total == 0.0f ? 0.0f : 1.0f / total);
  for (int e = 0; e < E_PADDED; e += W) {
    const vf x = load(sum + e) * share;
    if (E - e >= W) narrow(out + e, x);
    else narrow_part(out + e, x, E - e);
  }
}

struct Partial {
  float largest[ROWS], total[ROWS];
  float out[ROWS][E_PADDED];
};

INLINE T *out_row(const Launch &launch, const Tile &tile, const Task &task, int r) {
  return (T *)launch.out + task.batch * launch.out_stride[0] + task.head_of(r) * launch.out_stride[1] +
         tile.row[r] * launch.out_stride[2];
}

// Brings the splits of one group of rows together, in their order.
INLINE void merge(const Launch &launch, const Tile &tile, const Partial *parts, const Task &task) {
  for (int r = 0; r < tile.rows; ++r) {
    float after = NONE, total = 0.0f;
    for (int64_t s = 0; s < launch.splits; ++s)
      if (parts[s].largest[r] > after) after = parts[s].largest[r];
    const vf base = splat(after == NONE ? 0.0f : after);
    alignas(64) float sum[E_PADDED] = {};
    for (int64_t s = 0; s < launch.splits; ++s) {
      const vf left = splat(parts[s].largest[r]), keep = exp2_of(left - base);
      total += parts[s].total[r] * keep[0];
      for (int e = 0; e < E_PADDED; e += W) store(sum + e, load(sum + e) + load(&parts[s].out[r][e]) * keep);
    }
    write_row(out_row(launch, tile, task, r), sum, total, launch.keys);
  }
}

// The part of a task's number that says which of its rows; false if there are none.
INLINE bool cut(const Launch &launch, int64_t head_block, int64_t query_block, Task &task) {
  const int64_t shared = GROUP, queries = launch.queries, before = query_block * launch.query_rows;
  const int64_t per_block = (GROUP + launch.head_blocks - 1) / launch.head_blocks, earlier = head_block * per_block;
  task.query = before;
  task.head = task.kv_head * GROUP + earlier;
  task.queries = (int)(queries - before < launch.query_rows ? queries - before : launch.query_rows);
  task.heads = (int)(shared - earlier < per_block ? shared - earlier : per_block);
  return task.heads > 0 && task.queries > 0;
}

INLINE void run_task(Launch &launch, Tile &tile, int64_t number) {
  const int64_t split = number % launch.splits, group = number / launch.splits;
  int64_t rest = group;
  // long rows first: the last queries of a causal order see the most keys
  const int64_t query_block = launch.query_blocks - 1 - rest % launch.query_blocks;
  rest /= launch.query_blocks;
  const int64_t head_block = rest % launch.head_blocks;
  rest /= launch.head_blocks;
  Task task;
  task.kv_head = rest % KV_HEADS, task.batch = rest / KV_HEADS;
  if (!cut(launch, head_block, query_block, task)) return;
  begin(launch, tile, task, split == 0);
  const T *k = (const T *)launch.k + task.batch * launch.k_stride[0] + task.kv_head * launch.k_stride[1];
  const T *v = (const T *)launch.v + task.batch * launch.v_stride[0] + task.kv_head * launch.v_stride[1];
  int64_t end = launch.keys;
  const int64_t row = task.query + task.queries - 1, keys = launch.keys, queries = launch.queries;
  const int64_t last = row + (keys - queries);
  if (last + 1 < end) end = last + 1 < 0 ? 0 : last + 1;
  const int64_t tiles = (end + KT - 1) / KT;
  const int64_t from = tiles * split / launch.splits, to = tiles * (split + 1) / launch.splits;
  for (int64_t t = from; t < to; ++t) {
    const int64_t start = t * KT;
    const int64_t next = start + KT, left = t + 1 < to ? (end - next < KT ? end - next : KT) : 0;
    tile.ahead.begin(k + next * launch.k_stride[2], launch.k_stride[2], v + next * launch.v_stride[2], launch.v_stride[2], left);
    attend(launch, tile, Rows{0, 1, tile.rows}, k + start * launch.k_stride[2], v + start * launch.v_stride[2], start,
           (int)(end - start < KT ? end - start : KT));
  }
  if (launch.splits == 1) {
    for (int r = 0; r < tile.rows; ++r)
      write_row(out_row(launch, tile, task, r), tile.out[r], total_of(tile, r), launch.keys);
    return;
  }
  int64_t *arrived = (int64_t *)launch.workspace + group;
  Partial *parts = (Partial *)(launch.workspace + (launch.groups * 8 + 63) / 64 * 64) + group * launch.splits;
  Partial &mine = parts[split];
  memcpy(mine.largest, tile.largest, sizeof mine.largest);
  for (int r = 0; r < tile.rows; ++r) mine.total[r] = total_of(tile, r);
  memcpy(mine.out, tile.out, (size_t)tile.rows * sizeof tile.out[0]);
  if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) == launch.splits)
    merge(launch, tile, parts, task);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Decides how the work is cut for `launch->threads`; returns the bytes of workspace it takes, 0 if none.
EXPORT int64_t gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_plan(Launch *launch) {
  constexpr int SHARED = GROUP;
  const int64_t longest_run = launch->queries, most_seen = launch->keys;
  launch->query_rows = longest_run < ROWS ? longest_run : ROWS;
  if (launch->query_rows < 1) launch->query_rows = 1;
  const int64_t most = ROWS / launch->query_rows, heads = most < SHARED ? most : SHARED;
  launch->head_blocks = (SHARED + heads - 1) / heads;
  launch->query_blocks = (launch->queries + launch->query_rows - 1) / launch->query_rows;
  launch->groups = launch->batch * KV_HEADS * launch->head_blocks * launch->query_blocks;
  const int64_t wanted = launch->threads > 1 ? 4 * launch->threads : 1;
  const int64_t longest = most_seen / 256;
  int64_t splits = launch->groups > 0 ? (wanted + launch->groups - 1) / launch->groups : 1;
  if (splits > longest) splits = longest;
  launch->splits = splits < 1 ? 1 : splits;
  launch->next = 0;
  if (launch->splits == 1) return 0;
  return (launch->groups * 8 + 63) / 64 * 64 + launch->groups * launch->splits * (int64_t)sizeof(Partial);
}

// Before the first call of the work function, once the workspace is there.
EXPORT void gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_start(Launch *launch) {
  launch->next = 0;
  if (launch->splits > 1) memset(launch->workspace, 0, (size_t)launch->groups * 8);
}

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_work(void *pointer) {
  Launch &launch = *(Launch *)pointer;
  Tile tile;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (task >= launch.groups * launch.splits) return;
    run_task(launch, tile, task);
  }
}

// start() and work() on `threads` threads of the caller's pool, which is entered as OpenMP's runtime is; on this
// thread alone if `pool` is null.
EXPORT void gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_run(Launch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_start(launch);
  if (pool && launch->threads > 1) pool(gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_work, launch, (unsigned)launch->threads, 0);
  else gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_181c9270_work(launch);
}
