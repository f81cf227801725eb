// A weight of four bits a number:  Ŵ[row][k] = scale[row][k / group] (code − zero[row][k / group]).        y = x Ŵᵀ
//
// codes (N, ⌈K/8⌉): eight to a 32-bit word, the first in the lowest four bits.  scale, zero (N, ⌈K/group⌉).  group: a multiple of 8
// T is the type of x and y, S that of scale and zero.
#include "rows.cuh"
#define TILE 4096                                        // elements of x in shared memory at a time: 16 kB
#define ROWS 4                                           // of Ŵ, to a warp
#define THREADS 256

struct alignas(16) Codes { unsigned word[4]; };          // 32 codes, which a lane reads at once

// Σ x code / 16 + Σ x over eight elements.  1 + code / 16 is the float whose fraction begins with the four bits of the code, so no
// integer is converted: every second code is shifted to the bits where the fraction begins in its byte, and a float is made of that
// byte and the first byte of 1.0.
__device__ float dot(unsigned eight, const float x[8]) {
  unsigned even = eight << 3 & 0x78787878u | 0x80808080u, odd = eight >> 1 & 0x78787878u | 0x80808080u;
  float sum = 0;
  for (int i = 0; i < 4; i++) {                          // bytes 0, 0, i of the one and 3 of the other
    sum += x[2 * i] * __uint_as_float(__byte_perm(even, 0x3f000000u, 0x7044 | i << 8));
    sum += x[2 * i + 1] * __uint_as_float(__byte_perm(odd, 0x3f000000u, 0x7044 | i << 8));
  }
  return sum;
}

// A warp to four rows of Ŵ, blockIdx.y to a row of x (M, K).  K and group: multiples of 32.
// Reads 4.5 bits where a dense weight has 16 or 32.  For one row of x, the time is that of reading the weight, so a packed model is
// fast as well as small if the arithmetic keeps up (34 instructions a word; a loop over single codes needs 90).  Therefore:
//   four rows   are read together, and the elements of x that a lane has read serve all four.  128 registers, two blocks to a
//               multiprocessor
//   xs          has x[k] of a tile at [k % 32][k / 32]: the lanes, each at 32 elements of its own, read from 32 banks
extern "C" __global__ void __launch_bounds__(THREADS, 2) int4_matvec(const Codes* codes, const S* scale, const S* zero, const T* x, T* y,
                                                                     int N, int K, int group) {
  __shared__ float xs[32][TILE / 32 + 1];                // one more: 32 neighbours are written to 32 banks too
  int lane = threadIdx.x & 31, first = (blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5)) * ROWS, across = K / 32, groups = (K + group - 1) / group;
  unsigned row[ROWS];
  float sum[ROWS] = {};
  for (int r = 0; r < ROWS; r++) row[r] = min(first + r, N - 1);                 // past the end the last row once more, for nobody
  for (int start = 0; start < across; start += TILE / 32) {
    __syncthreads();                                     // no warp still reads the tile before
#pragma unroll 8
    for (int k = threadIdx.x; k < min(TILE, K - 32 * start); k += THREADS) xs[k % 32][k / 32] = x[(size_t)blockIdx.y * K + 32 * start + k];
    __syncthreads();
    for (int at = start + lane; at < min(across, start + TILE / 32); at += 32) {
      Codes some[ROWS];
      float dots[ROWS] = {}, plain = 0, xi[8];
      for (int r = 0; r < ROWS; r++) some[r] = codes[row[r] * across + at];
      for (int w = 0; w < 4; w++) {
        for (int i = 0; i < 8; i++) plain += xi[i] = xs[8 * w + i][at - start];
        for (int r = 0; r < ROWS; r++) dots[r] += dot(some[r].word[w], xi);
      }
      for (int r = 0; r < ROWS; r++) {                   // Σ x (code − zero) = 16 (Σ x (1 + code / 16) − Σ x) − zero Σ x
        unsigned of = row[r] * groups + 32 * at / group;
        sum[r] += (float)scale[of] * (16 * dots[r] - (16 + (float)zero[of]) * plain);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    float total = warp_sum(sum[r]);
    if (lane == 0 && first + r < N) y[(size_t)blockIdx.y * N + first + r] = (T)total;
  }
}

// The dense weight, for an x so wide that a product of dense matrices is faster.  A thread to a word.
extern "C" __global__ void int4_dequantize(const unsigned* codes, const S* scale, const S* zero, T* W, int N, int K, int group) {
  int words = (K + 7) / 8, groups = (K + group - 1) / group;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (long long)N * words; i += gridDim.x * (long long)blockDim.x) {
    long long row = i / words, k = i % words * 8;
    float s = (float)scale[row * groups + k / group], z = (float)zero[row * groups + k / group];
    Eight eight;
    for (int j = 0; j < 8; j++) eight.x[j] = (T)(s * ((float)(codes[i] >> 4 * j & 15) - z));
    write(W + row * K + k, eight, K - k, K % 8 == 0);
  }
}
