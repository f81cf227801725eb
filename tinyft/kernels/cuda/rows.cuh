// Reductions over a row that belongs to one warp or to one block.  Each thread has reduced every 32nd (every blockDim.x-th) element;
// these functions combine the threads' results, and every thread gets the total.  T is the type of the arrays; sums are in float.

#define ALL_LANES 0xffffffffu
#define NEVER __int_as_float(0xff800000)                // minus infinity, the maximum of no numbers

__device__ float warp_sum(float v) {                     // halves of the warp exchange, then quarters, ...: five steps
  for (int apart = 16; apart; apart >>= 1) v += __shfl_xor_sync(ALL_LANES, v, apart);
  return v;
}

__device__ float warp_max(float v) {
  for (int apart = 16; apart; apart >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, apart));
  return v;
}

__device__ float block_sum(float v, float* part) {       // part: shared, one number per warp
  v = warp_sum(v);
  __syncthreads();                                       // other threads may still read the result of an earlier call
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < blockDim.x >> 5; warp++) sum += part[warp];
  return sum;
}

__device__ float block_max(float v, float* part) {
  v = warp_max(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  float most = part[0];
  for (int warp = 1; warp < blockDim.x >> 5; warp++) most = fmaxf(most, part[warp]);
  return most;
}

// Eight numbers of one thread go to memory at once: one by one, each would take a transaction that has room for all.
struct alignas(16) Eight { T x[8]; };

__device__ void write(T* to, const Eight& eight, long long there, bool aligned = true) {         // as many as there are, of eight
  if (aligned && there >= 8) *(Eight*)to = eight;
  else for (int j = 0; j < 8 && j < there; j++) to[j] = eight.x[j];
}
