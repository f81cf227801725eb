// A weight of four bits a number:  Ŵ[row][k] = scale[row][k / group] (code − zero[row][k / group]).        y = x Ŵᵀ
//
// codes (N, ⌈K/8⌉): eight to a 32-bit word, the first in the lowest four bits.  scale, zero (N, ⌈K/group⌉).  group: a multiple of 8
// T is the type of x and y, S that of scale and zero.
#define ALL_LANES 0xffffffffu
#define TILE 4096                                        // numbers of x that lie in shared memory at a time: 16 kB

// A warp to a row of Ŵ, blockIdx.y to a row of x (M, K).  Reads 4.5 bits where a dense weight has 16 or 32: at one row of x the time is
// that of reading the weight, so this is what makes a packed model fast as well as small.
extern "C" __global__ void int4_matvec(const unsigned* codes, const S* scale, const S* zero, const T* x, T* y, int N, int K, int group) {
  __shared__ float xs[TILE];
  int lane = threadIdx.x & 31, row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  int words = (K + 7) / 8, groups = (K + group - 1) / group;
  float sum = 0;
  for (int start = 0; start < K; start += TILE) {
    __syncthreads();                                     // no warp still reads the tile before
    for (int k = threadIdx.x; k < TILE; k += blockDim.x) xs[k] = start + k < K ? (float)x[(size_t)blockIdx.y * K + start + k] : 0;
    __syncthreads();
    if (row >= N) continue;                              // not return: the others wait for this warp at the barriers
    for (int word = start / 8 + lane; word < min(words, (start + TILE) / 8); word += 32) {
      unsigned eight = codes[(size_t)row * words + word];
      size_t at = (size_t)row * groups + word * 8 / group;
      float dot = 0, plain = 0;
      for (int i = 0; i < 8; i++) {                      // Σ x (code − zero) = Σ x code − zero Σ x; past the end x is 0
        float xi = xs[word * 8 - start + i];
        dot += xi * (float)(eight >> 4 * i & 15);
        plain += xi;
      }
      sum += (float)scale[at] * (dot - (float)zero[at] * plain);
    }
  }
  if (row >= N) return;
  for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
  if (lane == 0) y[(size_t)blockIdx.y * N + row] = (T)sum;
}

// The dense weight, for an x so wide that a product of dense matrices is faster.  A thread to a word.
extern "C" __global__ void int4_dequantize(const unsigned* codes, const S* scale, const S* zero, T* W, int N, int K, int group) {
  int words = (K + 7) / 8, groups = (K + group - 1) / group;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (long long)N * words; i += gridDim.x * (long long)blockDim.x) {
    long long row = i / words, k = i % words * 8;
    float s = (float)scale[row * groups + k / group], z = (float)zero[row * groups + k / group];
    unsigned eight = codes[i];
    for (int j = 0; j < 8 && k + j < K; j++) W[row * K + k + j] = (T)(s * ((float)(eight >> 4 * j & 15) - z));
  }
}
