// Uniform numbers in [0, 1) from a key and an index alone: Philox4x64-10, bit for bit as numpy.random.Philox(key) gives them.
//
// A generator without a state: ten rounds of multiplying and mixing turn the counter into four numbers of 64 bits.  So thread i
// computes the numbers 8i ... 8i + 7 without the others, and dropout's gradient computes them anew instead of keeping a mask.
// Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
#include "rows.cuh"

__device__ void philox(unsigned long long counter, unsigned long long key, unsigned long long key_high, unsigned long long c[4]) {
  c[0] = counter; c[1] = c[2] = c[3] = 0;
  for (int round = 0; round < 10; round++) {
    unsigned long long low0 = 0xD2E7470EE14C6C93ull * c[0], high0 = __umul64hi(0xD2E7470EE14C6C93ull, c[0]);
    unsigned long long low1 = 0xCA5A826395121157ull * c[2], high1 = __umul64hi(0xCA5A826395121157ull, c[2]);
    c[0] = high1 ^ c[1] ^ key; c[1] = low1; c[2] = high0 ^ c[3] ^ key_high; c[3] = low0;
    key += 0x9E3779B97F4A7C15ull; key_high += 0xBB67AE8584CAA73Bull;
  }
}

// Number j of the eight, from 24 of the bits of one half of a word.
__device__ float uniform_of(const unsigned long long c[4], int j) { return (float)((unsigned)(c[j / 2] >> j % 2 * 32) >> 8) * 0x1p-24f; }

#define EIGHTS(i, n) (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; 8 * i < n; i += gridDim.x * (long long)blockDim.x)

extern "C" __global__ void uniform(T* u, const unsigned long long* from, unsigned long long key, unsigned long long key_high, long long n) {
  unsigned long long c[4];
  if (from) key = *from;                                 // a captured step reads its key from the device: each replay has another
  for EIGHTS(i, n) {
    philox(i + 1, key, key_high, c);                     // NumPy counts before it draws
    Eight eight;
    for (int j = 0; j < 8; j++) eight.x[j] = uniform_of(c, j);
    write(u + 8 * i, eight, n - 8 * i);
  }
}

// y = x keep / (1 − p), keep = u ≥ p; and back, with g for x.
extern "C" __global__ void dropout(const T* x, T* y, float p, float scale, const unsigned long long* from, unsigned long long key,
                                   unsigned long long key_high, long long n) {
  unsigned long long c[4];
  if (from) key = *from;
  for EIGHTS(i, n) {
    philox(i + 1, key, key_high, c);
    Eight eight;
    for (int j = 0; j < 8; j++) eight.x[j] = (T)(uniform_of(c, j) >= p && 8 * i + j < n ? (float)x[8 * i + j] * scale : 0);
    write(y + 8 * i, eight, n - 8 * i);     // y begins an allocation
  }
}
