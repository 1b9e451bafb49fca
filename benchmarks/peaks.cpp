// What the machine can do at most: bytes read from memory, and multiply-adds, by all threads at once.
#include <immintrin.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Reading {
  const float *data;
  int64_t size, chunk, next;
  float sum;
};

// Adds up chunks of an array until none is left.
EXPORT void read_memory(void *pointer) {
  Reading &reading = *(Reading *)pointer;
  float total = 0.0f;
  for (;;) {
    const int64_t start = __atomic_fetch_add(&reading.next, reading.chunk, __ATOMIC_RELAXED);
    if (start >= reading.size) break;
    const float *p = reading.data + start;
#if defined(__AVX512F__)
    __m512 sum[8] = {};
    for (int64_t i = 0; i < reading.chunk; i += 128)
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) sum[n] = _mm512_add_ps(sum[n], _mm512_loadu_ps(p + i + 16 * n));
    for (int n = 0; n < 8; ++n) total += _mm512_reduce_add_ps(sum[n]);
#else
    __m256 sum[8] = {};
    for (int64_t i = 0; i < reading.chunk; i += 64)
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) sum[n] = _mm256_add_ps(sum[n], _mm256_loadu_ps(p + i + 8 * n));
    for (int n = 0; n < 8; ++n) total += ((float *)&sum[n])[0];
#endif
  }
  reading.sum += total;
}

struct Arithmetic {
  int64_t rounds;
  float sum;
};

// rounds x 12 independent multiply-adds on full vectors per thread.
EXPORT void multiply_add(void *pointer) {
  Arithmetic &work = *(Arithmetic *)pointer;
#if defined(__AVX512F__)
  __m512 sum[12], a = _mm512_set1_ps(1.0f + work.sum), b = _mm512_set1_ps(0.5f);
  for (int n = 0; n < 12; ++n) sum[n] = _mm512_set1_ps(work.sum + n);  // different, or the compiler keeps one of them
  for (int64_t i = 0; i < work.rounds; ++i)
#pragma GCC unroll 12
    for (int n = 0; n < 12; ++n) sum[n] = _mm512_fmadd_ps(a, b, sum[n]);
  for (int n = 0; n < 12; ++n) work.sum += _mm512_reduce_add_ps(sum[n]) * 0.0f;
#else
  __m256 sum[12], a = _mm256_set1_ps(1.0f + work.sum), b = _mm256_set1_ps(0.5f);
  for (int n = 0; n < 12; ++n) sum[n] = _mm256_set1_ps(work.sum + n);  // different, or the compiler keeps one of them
  for (int64_t i = 0; i < work.rounds; ++i)
#pragma GCC unroll 12
    for (int n = 0; n < 12; ++n) sum[n] = _mm256_fmadd_ps(a, b, sum[n]);
  for (int n = 0; n < 12; ++n) work.sum += ((float *)&sum[n])[0] * 0.0f;
#endif
}

EXPORT int64_t multiply_add_flops() {
#if defined(__AVX512F__)
  return 12 * 16 * 2;
#else
  return 12 * 8 * 2;
#endif
}

// The same with bfloat16 pairs; 0 flops where the processor has no such instruction.
EXPORT void multiply_add_pairs(void *pointer) {
  Arithmetic &work = *(Arithmetic *)pointer;
#if defined(__AVX512BF16__)
  __m512 sum[12];
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f + work.sum), _mm512_set1_ps(0.5f)), b = a;
  for (int n = 0; n < 12; ++n) sum[n] = _mm512_set1_ps(work.sum + n);  // different, or the compiler keeps one of them
  for (int64_t i = 0; i < work.rounds; ++i)
#pragma GCC unroll 12
    for (int n = 0; n < 12; ++n) sum[n] = _mm512_dpbf16_ps(sum[n], a, b);
  for (int n = 0; n < 12; ++n) work.sum += _mm512_reduce_add_ps(sum[n]) * 0.0f;
#else
  work.sum += 0.0f;
#endif
}

EXPORT int64_t multiply_add_pairs_flops() {
#if defined(__AVX512BF16__)
  return 12 * 32 * 2;
#else
  return 0;
#endif
}
