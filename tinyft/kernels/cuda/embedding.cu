// dW[ids] += g, where ids repeat.        ids (N), g (N, width) -> d (rows of W, width), zero before
//
// A warp to a position and to 128 columns.  The warp at the first position of an id sums the rows of all later positions of
// that id, in order; the other warps return.  Comparing N² ids is the price of a fixed order of the sum: there are no atomic
// additions, and the bits are the same every time.
#define ALL_LANES 0xffffffffu
#define COLUMNS 4                                        // per lane, 32 apart

extern "C" __global__ void embedding_back(const int* ids, const T* g, float* d, int N, int width) {
  int i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31, first = blockIdx.y * 32 * COLUMNS + lane;
  if (i >= N) return;
  int id = ids[i];
  for (int start = 0; start < i; start += 32)            // did the id come before?
    if (__any_sync(ALL_LANES, start + lane < i && ids[start + lane] == id)) return;

  float sum[COLUMNS] = {0};
  for (int start = i; start < N; start += 32) {
    unsigned same = __ballot_sync(ALL_LANES, start + lane < N && ids[start + lane] == id);
    for (; same; same &= same - 1) {                     // its lowest bit is the next position
      const T* row = g + (size_t)(start + __ffs(same) - 1) * width;
      for (int k = 0; k < COLUMNS; k++) if (first + 32 * k < width) sum[k] += (float)row[first + 32 * k];
    }
  }
  for (int k = 0; k < COLUMNS; k++) if (first + 32 * k < width) d[(size_t)id * width + first + 32 * k] = sum[k];
}
