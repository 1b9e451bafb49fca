// gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270: written by rewriter from a specification; edit the template, not this file.
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
//   dtype = bfloat16, instructions = avx512_bf16_amx
//
// Flash attention over key tiles: a task takes a few query rows of one key/value head, walks over that head's keys
// once for all of them, and keeps a running maximum, sum and output per row. With few tasks the keys are split too,
// and the last task of a split merges. Rows are query heads of one group times queries, so that K and V are read once
// for the whole group. Any number of threads may call the work function; they draw tasks from one counter.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

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
constexpr int KT = 128;     // keys of a tile
constexpr int MR = 16;   // rows that are held in registers
constexpr int SCORE_VECTORS = 8, OUT_VECTORS = 1;
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


// Matrix units (AMX): a tile is 16 rows of 64 bytes, a product takes 16 x 32 bfloat16 times 32 x 16, the latter in pairs
// of rows, and adds to 16 x 16 floats. Tiles 0 to 3 hold sums, 4 what they share, 5 what is theirs.
struct TileShapes {
  uint8_t palette, first_row, unused[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The compiler does not know that tile instructions read and write memory.
#define TILES_MEET_MEMORY __asm__ volatile("" ::: "memory")

// While it lives, this thread's tiles have our shapes; behind it, those that they had.
struct Tiles {
  alignas(64) TileShapes before;
  Tiles() {
    alignas(64) TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    TILES_MEET_MEMORY;
    _tile_storeconfig(&before);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    TILES_MEET_MEMORY;
    _tile_loadconfig(&before);
    TILES_MEET_MEMORY;
  }
};

// Linux lets a process use tiles once it has asked; a refusal shows as an illegal instruction at the first of them.
INLINE void ask_for_tiles() {
  static bool asked = false;
  if (!__atomic_exchange_n(&asked, true, __ATOMIC_RELAXED)) syscall(SYS_arch_prctl, 0x1023, 18);
}

// scores[j][r] = keys[j] . queries[r] for 64 keys that lie `stride` numbers apart and 16 queries, whose pairs are rows.
INLINE void tile_scores(const T *keys, int64_t stride, const float *queries, float *scores) {
  TILES_MEET_MEMORY;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int u = 0; u < D_UNITS; u += W) {
    _tile_loadd(4, queries + u * W, 64);
    _tile_loadd(5, keys + 0 * stride + 2 * u, stride * 2);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(5, keys + 16 * stride + 2 * u, stride * 2);
    _tile_dpbf16ps(1, 5, 4);
    _tile_loadd(5, keys + 32 * stride + 2 * u, stride * 2);
    _tile_dpbf16ps(2, 5, 4);
    _tile_loadd(5, keys + 48 * stride + 2 * u, stride * 2);
    _tile_dpbf16ps(3, 5, 4);
  }
  _tile_stored(0, scores + 0, 64);
  _tile_stored(1, scores + 256, 64);
  _tile_stored(2, scores + 512, 64);
  _tile_stored(3, scores + 768, 64);
  TILES_MEET_MEMORY;
}

// out[16 x 16N] += weights[16 x depth] * values[depth x 16N], in pairs; `depth` is a multiple of 16 of them.
INLINE void tile_sums_1(const float *weights, const float *values, int depth, float *out) {
  TILES_MEET_MEMORY;
  _tile_loadd(0, out + 0, E_PADDED * 4);
  for (int u = 0; u < depth; u += W) {
    _tile_loadd(4, weights + u, KT_UNITS * 4);
    _tile_loadd(5, values + u * E_PADDED + 0, E_PADDED * 4);
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, out + 0, E_PADDED * 4);
  TILES_MEET_MEMORY;
}
INLINE void tile_sums_2(const float *weights, const float *values, int depth, float *out) {
  TILES_MEET_MEMORY;
  _tile_loadd(0, out + 0, E_PADDED * 4);
  _tile_loadd(1, out + 16, E_PADDED * 4);
  for (int u = 0; u < depth; u += W) {
    _tile_loadd(4, weights + u, KT_UNITS * 4);
    _tile_loadd(5, values + u * E_PADDED + 0, E_PADDED * 4);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, values + u * E_PADDED + 16, E_PADDED * 4);
    _tile_dpbf16ps(1, 4, 5);
  }
  _tile_stored(0, out + 0, E_PADDED * 4);
  _tile_stored(1, out + 16, E_PADDED * 4);
  TILES_MEET_MEMORY;
}
INLINE void tile_sums_3(const float *weights, const float *values, int depth, float *out) {
  TILES_MEET_MEMORY;
  _tile_loadd(0, out + 0, E_PADDED * 4);
  _tile_loadd(1, out + 16, E_PADDED * 4);
  _tile_loadd(2, out + 32, E_PADDED * 4);
  for (int u = 0; u < depth; u += W) {
    _tile_loadd(4, weights + u, KT_UNITS * 4);
    _tile_loadd(5, values + u * E_PADDED + 0, E_PADDED * 4);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, values + u * E_PADDED + 16, E_PADDED * 4);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, values + u * E_PADDED + 32, E_PADDED * 4);
    _tile_dpbf16ps(2, 4, 5);
  }
  _tile_stored(0, out + 0, E_PADDED * 4);
  _tile_stored(1, out + 16, E_PADDED * 4);
  _tile_stored(2, out + 32, E_PADDED * 4);
  TILES_MEET_MEMORY;
}
INLINE void tile_sums_4(const float *weights, const float *values, int depth, float *out) {
  TILES_MEET_MEMORY;
  _tile_loadd(0, out + 0, E_PADDED * 4);
  _tile_loadd(1, out + 16, E_PADDED * 4);
  _tile_loadd(2, out + 32, E_PADDED * 4);
  _tile_loadd(3, out + 48, E_PADDED * 4);
  for (int u = 0; u < depth; u += W) {
    _tile_loadd(4, weights + u, KT_UNITS * 4);
    _tile_loadd(5, values + u * E_PADDED + 0, E_PADDED * 4);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, values + u * E_PADDED + 16, E_PADDED * 4);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, values + u * E_PADDED + 32, E_PADDED * 4);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, values + u * E_PADDED + 48, E_PADDED * 4);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, out + 0, E_PADDED * 4);
  _tile_stored(1, out + 16, E_PADDED * 4);
  _tile_stored(2, out + 32, E_PADDED * 4);
  _tile_stored(3, out + 48, E_PADDED * 4);
  TILES_MEET_MEMORY;
}

INLINE void tile_sums(const float *weights, const float *values, int depth, float *out) {
  int e = 0;
  for (; e + 64 <= E_PADDED; e += 64) tile_sums_4(weights, values + e, depth, out + e);
  constexpr int REST = E_PADDED % 64;
  if (REST == 16) tile_sums_1(weights, values + e, depth, out + e);
  if (REST == 32) tile_sums_2(weights, values + e, depth, out + e);
  if (REST == 48) tile_sums_3(weights, values + e, depth, out + e);
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
  alignas(64) float q[ROWS][D_UNITS];  // of each 16 rows, units by rows, where they are many
  alignas(64) float out[ROWS][E_PADDED];
  alignas(64) float keys[KT][D_UNITS];  // where they cannot be used as they lie
  alignas(64) float values[V_LAID_OUT ? KT_UNITS : 1][E_PADDED];
  alignas(64) float scores[MR][KT];  // keys by rows, where rows are many
  alignas(64) float weights[2 * MR][KT_UNITS];
  alignas(64) float largest[ROWS];
  alignas(64) float total[ROWS][W];  // lane by lane; a row in each lane where they are many
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
      tile.ahead.lines(2);
      const __m512i first = (__m512i)units(v + j * stride, e / 2, E);
      const __m512i second = j + 1 < count ? (__m512i)units(v + (j + 1) * stride, e / 2, E) : __m512i{};
      store(&tile.values[j / 2][e], (vf)_mm512_permutex2var_epi16(first, low, second));
      if (e + W < E_PADDED) store(&tile.values[j / 2][e + W], (vf)_mm512_permutex2var_epi16(first, high, second));
    }
  for (int u = (count + 1) / 2; u < (count + 31) / 32 * W; ++u) memset(tile.values[u], 0, sizeof tile.values[u]);
}


constexpr int LINES = (D * (int)sizeof(T) + 63) / 64;  // of memory that a key takes

// Pairs of a query's numbers become rows, queries columns; zeros behind the last query.
OUTLINE void lay_out_queries(const Launch &launch, Tile &tile, const Task &task) {
  for (int first = 0; first < tile.rows; first += W) {
    for (int u = 0; u < D_UNITS; u += W) {
      vf *block = (vf *)(void *)(tile.q[first] + u * W);
      for (int i = 0; i < W; ++i) block[i] = first + i < tile.rows ? units(query_at(launch, task, first + i), u, D) : vf{};
      transpose(block);
    }
    store(tile.largest + first, splat(NONE));
    store(tile.total[first / W], vf{});
  }
}

// Zeros behind the last key and behind each one's end, up to where products read.
OUTLINE void lay_out_keys(Tile &tile, const T *k, int64_t stride, int count) {
  for (int j = 0; j < (count + 63) / 64 * 64; ++j)
    for (int u = 0; u < D_UNITS; u += W) store(&tile.keys[j][u], j < count ? units(k + j * stride, u, D) : vf{});
}

// The tile's scores of the rows from `first` on become weights, in pairs of keys; the running maximum, sum and output
// follow. The tile has `count` keys, the first of which is `start`.
INLINE void weigh_in_tiles(const Launch &launch, Tile &tile, int first, int rows, int64_t start, int count,
                           float (*weights)[KT_UNITS]) {
  float (*scores)[W] = (float (*)[W])(void *)tile.scores;
  const int end = (count + 31) / 32 * 32;
  const int64_t queries = launch.queries, keys = launch.keys;
  vi shown;
  for (int r = 0; r < W; ++r) {
    const int64_t row = tile.row[first + (r < rows ? r : 0)], last = row + (keys - queries);
    const int64_t seen = last + 1 - start;
    shown[r] = seen < 0 ? 0 : seen < count ? (int)seen : count;
  }
  vf top = splat(NONE);
  for (int j = 0; j < end; j += W) {
    for (int i = 0; i < W; ++i) {
      tile.ahead.lines(LINES / 2);
      vf score = load(scores[j + i]);
      score = score * splat(0x1.71547652b82fep-2f);
      score = vi{} + (j + i) < shown ? score : splat(NONE);
      store(scores[j + i], score);
      top = larger(score, top);
    }
  }
  const vf before = load(tile.largest + first), after = larger(top, before);
  const vf base = after == splat(NONE) ? vf{} : after, left = before, keep = exp2_of(left - base);
  vf total = load(tile.total[first / W]) * keep;
  store(tile.largest + first, after);
  for (int r = 0; r < rows; ++r) {
    if (keep[r] == 1.0f) continue;
    float *out = tile.out[first + r];
    for (int e = 0; e < E_PADDED; e += W) store(out + e, load(out + e) * splat(keep[r]));
  }
  static const uint16_t TURNS[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turns = _mm512_loadu_si512(TURNS);
  for (int j = 0; j < end; j += 2 * W) {
    vf block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const vf one = exp2_of(load(scores[j + 2 * i]) - base);
      const vf two = exp2_of(load(scores[j + 2 * i + 1]) - base);
      tile.ahead.lines(LINES);
      total += one + two;
      block[i] = (vf)_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)two, (__m512)one));
    }
    transpose(block);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) store(&weights[r][j / 2], block[r]);
  }
  store(tile.total[first / W], total);
}

// One key tile for all rows of the task, 16 of them at a time. Tiles cannot be loaded from what is still on its way to
// memory, so the sums of one block come after the scores of the next.
OUTLINE void attend_in_tiles(const Launch &launch, Tile &tile, const T *k, const T *v, int64_t start, int count) {
  const int64_t stride = launch.k_stride[2];
  const bool in_place = D_UNITS * 2 == D && count == KT;
  const int depth = (count + 31) / 32 * W;
  if (!in_place) lay_out_keys(tile, k, stride, count);
  lay_out_values(tile, v, launch.v_stride[2], count);
  for (int first = 0; first < tile.rows; first += MR) {
    for (int j = 0; j < count; j += 64) {
      const T *keys = in_place ? k + j * stride : (const T *)(const void *)tile.keys[j];
      tile_scores(keys, in_place ? stride : 2 * D_UNITS, tile.q[first], tile.scores[0] + j * W);
    }
    if (first) tile_sums(tile.weights[(first / MR % 2 ^ 1) * MR], tile.values[0], depth, tile.out[first - MR]);
    weigh_in_tiles(launch, tile, first, tile.rows - first < MR ? tile.rows - first : MR, start, count,
                   tile.weights + first / MR % 2 * MR);
  }
  const int last = (tile.rows - 1) / MR;
  tile_sums(tile.weights[last % 2 * MR], tile.values[0], depth, tile.out[last * MR]);
}


INLINE float total_of(const Tile &tile, int r) {
  if (tile.rows > FEW_ROWS) return tile.total[r / W][r % W];
  return sum_of(load(tile.total[r]));
}

INLINE void begin(const Launch &launch, Tile &tile, const Task &task, [[maybe_unused]] bool with_sinks) {
  const int64_t batch = task.batch;
  tile.rows = task.heads * task.queries;
  const bool few = tile.rows <= FEW_ROWS;
  if (!few) lay_out_queries(launch, tile, task);
  for (int r = 0; r < tile.rows; ++r) {
    [[maybe_unused]] const int64_t h = task.head_of(r), i = task.query_of(r);
    if (few)
    for (int u = 0; u < D_UNITS; u += W) store(&tile.q[r][u], units(query_at(launch, task, r), u, D));
    tile.row[r] = i;
    tile.largest[r] = NONE;
    if (few) store(tile.total[r], vf{});
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
    if (tile.rows > FEW_ROWS) {
      attend_in_tiles(launch, tile, k + start * launch.k_stride[2], v + start * launch.v_stride[2], start,
                      (int)(end - start < KT ? end - start : KT));
      continue;
    }
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
EXPORT int64_t gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_plan(Launch *launch) {
  ask_for_tiles();
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
EXPORT void gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_start(Launch *launch) {
  launch->next = 0;
  if (launch->splits > 1) memset(launch->workspace, 0, (size_t)launch->groups * 8);
}

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_work(void *pointer) {
  Launch &launch = *(Launch *)pointer;
  const Tiles shaped;
  Tile tile;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (task >= launch.groups * launch.splits) return;
    run_task(launch, tile, task);
  }
}

// start() and work() on `threads` threads of the caller's pool, which is entered as OpenMP's runtime is; on this
// thread alone if `pool` is null.
EXPORT void gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_run(Launch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_start(launch);
  if (pool && launch->threads > 1) pool(gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_work, launch, (unsigned)launch->threads, 0);
  else gqa_h32_kv1_d16_causal_zero_bf16_avx512_bf16_amx_181c9270_work(launch);
}
