// gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9: written by rewriter from a specification; edit the template, not this file.
//   heads = 6
//   kv_heads = 3
//   head_dim = 5
//   value_dim = 7
//   scale = 0.4
//   causal = True
//   bias = True
//   softcap = 3.0
//   masked_rows_are_zero = True
//   sinks = True
//   dtype = float16, instructions = avx2
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

// Cephes' tanhf: an odd polynomial near zero, 1 - 2 / (e^2x + 1) elsewhere.
INLINE vf tanh_of(vf x) {
  vf z = x * x;
  vf small = splat(-5.70498872745e-3f) * z + splat(2.06390887954e-2f);
  small = small * z - splat(5.37397155531e-2f);
  small = small * z + splat(1.33314422036e-1f);
  small = small * z - splat(3.33332819422e-1f);
  small = small * z * x + x;
  vf size = x < 0 ? -x : x;
  vf decay = exp2_of(size * splat(-2.8853900817779268f));  // e^-2|x|
  vf large = (1.0f - decay) / (1.0f + decay);
  return size < splat(0.625f) ? small : (x < 0 ? -large : large);
}

// One storage type and its way into and out of vectors of single precision.
typedef uint16_t T;
INLINE vf widen(const T *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void narrow(T *p, vf x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float scalar(T x) { return _cvtsh_ss(x); }

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

constexpr int KV_HEADS = 3, GROUP = 2, D = 5, E = 7;
constexpr int ROWS = 128;       // of a task, at most
constexpr int KT = 64;     // keys of a tile
constexpr int MR = 6;   // rows that are held in registers
constexpr int SCORE_VECTORS = 8, OUT_VECTORS = 1;
constexpr int FEW_ROWS = 4;  // up to here a dot product per key beats transposing keys
constexpr int TOGETHER = 2;  // of these, rows that share what is read once
constexpr int FEW_KEYS = 16;  // keys of a tile where rows are few: it and the next one fit into the nearest cache
constexpr int PAIR = 1;    // numbers per 32-bit unit of a product's operands
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

// c += a * b, where an operand's 32-bit unit is one float.
INLINE vf multiply(vf c, vf a, vf b) {
  return a * b + c;
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
    ahead.line();
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
  constexpr int N = V < 2 ? V : 2, REST = V % N;
  for (int n = 0; n + N <= V; n += N) product<N, STEP>(rows, a, lda, b + n * W, ldb, depth, c + n * W, ldc, add, ahead);
  if (REST) product<(REST ? REST : 1), STEP>(rows, a, lda, b + (V - REST) * W, ldb, depth, c + (V - REST) * W, ldc, add, ahead);
}

// One vector of units of a row of `size` numbers, from unit `unit` on; zeros behind its end.
INLINE vf units(const T *row, int unit, int size) {
  const int left = size - unit;
  return left >= W ? widen(row + unit) : widen_part(row + unit, left > 0 ? left : 0);
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
  const char *bias[ROWS];
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
  for (int j = 0; j < count; ++j)
#pragma GCC unroll 16
    for (int e = 0; e < E_PADDED; e += W) store(&tile.values[j][e], units(v + j * stride, e, E));
}

// The bias of columns [column, column + count) of one row; 0 behind them.
INLINE vf bias_of(const char *row, int64_t stride, bool boolean, int column, int count) {
  vf found = {};
  if (boolean) {
    const uint8_t *p = (const uint8_t *)row + column * stride;
    for (int l = 0; l < count; ++l) found[l] = p[l * stride] ? 0.0f : NONE;
    return found;
  }
  const T *p = (const T *)row + column * stride;
  if (stride == 1) return count == W ? widen(p) : widen_part(p, count);
  for (int l = 0; l < count; ++l) found[l] = scalar(p[l * stride]);
  return found;
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

// Up to FEW_ROWS rows over keys and values as they lie. Memory bounds that, so it must never wait: while keys are
// multiplied, the same tile's values are asked for, and while those are added up, the next tile's keys. A vector that
// was read, and widened, serves all rows of a group.
constexpr int LINE = 64 / (int)sizeof(T), K_LINES = (D + LINE - 1) / LINE, V_LINES = (E + LINE - 1) / LINE;
constexpr int DEPTH = 8;  // values whose columns are all added up before the next ones are read

INLINE void ask_for(const T *rows, int64_t stride, int line, int lines_of_row) {
  _mm_prefetch((const char *)(rows + line / lines_of_row * stride) + line % lines_of_row * 64, _MM_HINT_T0);
}

// Scores of R rows from `at` on go to lines of scores from `slot` on; values[0 ..] are asked for.
template <int R>
INLINE void few_scores(Tile &tile, int at, int slot, const T *k, int64_t stride, int count, const T *values,
                       int64_t v_stride) {
  constexpr int KEYS = R == 1 ? W : R == 2 ? W / 2 : W / 4;  // as many as there are lanes for their sums
  constexpr int STEPS = KEYS * D_UNITS / W, LINES = KEYS * V_LINES;
  const float *q = tile.q[at];
  float *scores = tile.scores[slot];
  for (int j = 0; j < count; j += KEYS) {
    const T *key[KEYS];
    vf sum[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sum[i] = vf{};
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) key[i] = k + (j + i < count ? j + i : j) * stride;
#pragma GCC unroll 16
    for (int u = 0; u < D_UNITS; u += W)
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; ++i) {
        const int step = u / W * KEYS + i;
#pragma GCC unroll 8
        for (int l = step * LINES / STEPS; l < (step + 1) * LINES / STEPS; ++l)
          ask_for(values + j * v_stride, v_stride, l, V_LINES);
        const vf unit = units(key[i], u, D);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r * KEYS + i] = load(q + r * D_UNITS + u) * unit + sum[r * KEYS + i];
      }
    const vf found = sums(sum);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) memcpy(scores + r * KT + j, (const char *)&found + r * KEYS * 4, KEYS * 4);
  }
}

// part[R x E] = or += weights * values[depth x E], N vectors of columns from vector `first` on; keys are asked for.
template <int R, int N>
INLINE void few_columns(const float *weights, const T *v, int64_t stride, int depth, int first, const T *keys,
                        int64_t k_stride, float (*part)[E_PADDED], bool add) {
  constexpr int STEPS = DEPTH * OUT_VECTORS, LINES = DEPTH * K_LINES;
  vf sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = add ? load(&part[r][(first + n) * W]) : vf{};
  for (int d = 0; d < depth; ++d) {
    const int step = first * DEPTH + d * N;
    for (int l = step * LINES / STEPS; l < (step + N) * LINES / STEPS; ++l) ask_for(keys, k_stride, l, K_LINES);
    vf right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = units(v + d * stride, (first + n) * W, E);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf weight = splat(weights[r * KT_UNITS + d]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = weight * right[n] + sum[r][n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(&part[r][(first + n) * W], sum[r][n]);
}

// The output of R rows from `at` on grows by the tile's values; keys[0 ..] are asked for.
template <int R>
INLINE void few_outputs(Tile &tile, int at, int slot, const T *v, int64_t stride, int count, const T *keys,
                        int64_t k_stride) {
  constexpr int MOST = 8 / R, N = OUT_VECTORS < MOST ? OUT_VECTORS : MOST, REST = OUT_VECTORS % N;
  alignas(64) float part[R][E_PADDED];
  for (int d = 0; d < count; d += DEPTH) {
    const float *weights = &tile.weights[slot][d];
    const int depth = count - d < DEPTH ? count - d : DEPTH;
    const T *rows = v + d * stride, *next = keys + d * k_stride;
    for (int first = 0; first + N <= OUT_VECTORS; first += N)
      few_columns<R, N>(weights, rows, stride, depth, first, next, k_stride, part, d > 0);
    if (REST)
      few_columns<R, (REST ? REST : 1)>(weights, rows, stride, depth, OUT_VECTORS - REST, next, k_stride, part, d > 0);
  }
  for (int r = 0; r < R; ++r)  // tile by tile: long sums keep their precision
    for (int e = 0; e < E_PADDED; e += W) store(&tile.out[at + r][e], load(&tile.out[at + r][e]) + load(&part[r][e]));
}

OUTLINE void few_keys(Tile &tile, Rows rows, const T *k, int64_t k_stride, const T *v, int64_t v_stride, int count) {
  int r = 0;
  for (; r + TOGETHER <= rows.count; r += TOGETHER)
    few_scores<TOGETHER>(tile, rows[r], r, k, k_stride, count, v, v_stride);
  for (; r < rows.count; ++r) few_scores<1>(tile, rows[r], r, k, k_stride, count, v, v_stride);
}

OUTLINE void few_values(Tile &tile, Rows rows, const T *v, int64_t v_stride, const T *next, int64_t k_stride, int count) {
  int r = 0;
  for (; r + TOGETHER <= rows.count; r += TOGETHER)
    few_outputs<TOGETHER>(tile, rows[r], r, v, v_stride, count, next, k_stride);
  for (; r < rows.count; ++r) few_outputs<1>(tile, rows[r], r, v, v_stride, count, next, k_stride);
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
      const vf bias = bias_of(tile.bias[at], launch.bias_stride[3], launch.bias_is_boolean,
                              (int)start + j, left < W ? left : W);
      score = (tanh_of(score * splat(0x1.1111111111111p-3f)) * splat(0x1.8000000000000p+1f) + bias);
      if (left < W) score = LANES < left ? score : splat(NONE);
      store(line + j, score);
      top = larger(score, top);
    }
    const float before = tile.largest[at], here = largest_of(top), after = here > before ? here : before;
    const vf base = splat(after == NONE ? 0.0f : after);
    float *sum = tile.total[at], *out = tile.out[at];
    if (after > before) {
      const vf left = splat(before), keep = exp2_of((left - base) * splat(LOG2_E));
      store(sum, load(sum) * keep);
      for (int e = 0; e < E_PADDED; e += W) store(out + e, load(out + e) * keep);
      tile.largest[at] = after;
    }
    vf total = load(sum);
    for (int j = from; j < to; j += PAIR * W) {
      const vf one = exp2_of((load(line + j) - base) * splat(LOG2_E));
      total += one;
      store(&tile.weights[r][j], one);
    }
    store(sum, total);
  }
}

// One key tile for some rows of the task.
INLINE void attend(const Launch &launch, Tile &tile, Rows rows, const T *k, const T *v, int64_t start, int count, bool last) {
  const int64_t k_stride = launch.k_stride[2], v_stride = launch.v_stride[2];
  const bool few = rows.count <= FEW_ROWS;
  const bool in_place = V_IN_PLACE;
  if (!few) transpose_keys(tile, k, k_stride, count);
  if (!in_place && !few) lay_out_values(tile, v, v_stride, count);
  const int blocks = (rows.count + MR - 1) / MR;
  for (int b = 0; b < blocks; ++b) {
    const int before = rows.count * b / blocks;
    const Rows block = {rows[before], rows.apart, rows.count * (b + 1) / blocks - before};
    constexpr int from = 0; const int to = few ? FEW_KEYS : KT;
    const int depth = count;
    const int lda = D_UNITS * rows.apart;
    if (few) few_keys(tile, block, k, k_stride, v, v_stride, count);
    else
      product_wide<SCORE_VECTORS>(block.count, tile.q[block.first], lda, tile.keys[0], KT, D_UNITS, tile.scores[0], KT, false, tile.ahead);
    weigh(launch, tile, block, start, from, to, count);
    if (few) {
      few_values(tile, block, v, v_stride, last ? k : k + FEW_KEYS * k_stride, k_stride, count);
      continue;
    }
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
    const int64_t place = batch * launch.bias_stride[0] + h * launch.bias_stride[1] + i * launch.bias_stride[2];
    tile.bias[r] = (const char *)launch.bias + place * (launch.bias_is_boolean ? 1 : (int64_t)sizeof(T));
    if (!with_sinks) continue;
    const T *sink = (const T *)launch.sinks + batch * launch.sink_stride[0] + h * launch.sink_stride[1] +
                    i * launch.sink_stride[2];
    for (int64_t n = 0; n < launch.sink_columns; ++n) {
      const float score = scalar(sink[n * launch.sink_stride[3]]);
      if (score > tile.largest[r]) tile.largest[r] = score;
    }
    const vf base = splat(tile.largest[r] == NONE ? 0.0f : tile.largest[r]);
    for (int64_t n = 0; n < launch.sink_columns; ++n) {
      const vf left = splat(scalar(sink[n * launch.sink_stride[3]]));
      tile.total[r][0] += exp2_of((left - base) * splat(LOG2_E))[0];
    }
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
      const vf left = splat(parts[s].largest[r]), keep = exp2_of((left - base) * splat(LOG2_E));
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
  const int64_t span = tile.rows <= FEW_ROWS ? FEW_KEYS : KT;
  const int64_t tiles = (end + span - 1) / span;
  const int64_t from = tiles * split / launch.splits, to = tiles * (split + 1) / launch.splits;
  for (int64_t t = from; t < to; ++t) {
    const int64_t start = t * span;
    const int64_t next = start + span, left = t + 1 < to ? (end - next < span ? end - next : span) : 0;
    tile.ahead.begin(k + next * launch.k_stride[2], launch.k_stride[2], v + next * launch.v_stride[2], launch.v_stride[2], left);
    attend(launch, tile, Rows{0, 1, tile.rows}, k + start * launch.k_stride[2], v + start * launch.v_stride[2], start,
           (int)(end - start < span ? end - start : span), t + 1 == to);
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
EXPORT int64_t gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_plan(Launch *launch) {
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
EXPORT void gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_start(Launch *launch) {
  launch->next = 0;
  if (launch->splits > 1) memset(launch->workspace, 0, (size_t)launch->groups * 8);
}

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_work(void *pointer) {
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
EXPORT void gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_run(Launch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_start(launch);
  if (pool && launch->threads > 1) pool(gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_work, launch, (unsigned)launch->threads, 0);
  else gqa_h6_kv3_d5_e7_causal_bias_softcap_sinks_zero_f16_avx2_575ba4e9_work(launch);
}
