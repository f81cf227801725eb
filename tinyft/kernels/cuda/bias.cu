// y += b on every row; and its gradient db = Σ g over rows, in two steps, so that many blocks share the work and the order of
// the sum is fixed.

// Adds a bias to every row of a matrix: y[i] += b[i % n], for i = 0, 1, ... below size.
// y holds `size` numbers: rows of n numbers, one row after the other, so y[i] is in column i % n.
// b holds n numbers.  Any number of blocks, and of threads in a block, gives this result: there may
// be more threads than numbers, or fewer.
extern "C" __global__ void add_bias(T* y, const T* b, long long size, int n) {
  // With N threads in all, thread t takes the elements t, t + N, t + 2N, ..., so that the threads of
  // a warp read adjacent elements.  An integer division costs more than the rest, so a thread divides
  // once, and then moves by the same number of columns at each step.
  unsigned first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x, column = first % n, on = threads % n;
  for (long long i = first; i < size; i += threads) {
    y[i] = (T)((float)y[i] + (float)b[column]);
    column += on;
    if (column >= n) column -= n;
  }
}

// Sums the rows of g (rows, n) by stretches: g -> parts (stretches, n).
// Stretch s has `each` rows of g: s·each, s·each + 1, ...; the last stretch may have fewer.
// parts[s·n + column] is the sum of its numbers in this column; what parts held before does not count.
// The sum is a float, also where T is half.
// The grid is (⌈n/32⌉, stretches), the block (32, 8).  Thread (c, k) of block (i, s) works on column
// 32 i + c in stretch s, so eight threads, k = 0, ..., 7, share a column.  n need not be a multiple of
// 32, nor `each` of 8.
extern "C" __global__ void sum_rows(const T* g, float* parts, int rows, int n, int each) {
  // Thread (c, k) sums the rows k, k + 8, k + 16, ... of its stretch, so that a warp reads 32 adjacent
  // elements.  Then the eight sums of a column are added in shared memory, and one thread of the eight
  // writes the result.
  __shared__ float sums[8][32];
  int c = threadIdx.x, k = threadIdx.y, column = blockIdx.x * 32 + c, last = min(rows, (int)(blockIdx.y + 1) * each);
  float sum = 0;
  if (column < n)
    for (int row = blockIdx.y * each + k; row < last; row += 8) sum += (float)g[(size_t)row * n + column];
  sums[k][c] = sum;
  __syncthreads();
  if (k > 0 || column >= n) return;
  for (int j = 1; j < 8; j++) sum += sums[j][c];
  parts[(size_t)blockIdx.y * n + column] = sum;
}

// parts (sums, stretches, n) -> y (sums, n): a thread to a column, blockIdx.y to a sum.
extern "C" __global__ void sum_parts(const float* parts, float* y, int stretches, int n) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= n) return;
  const float* p = parts + (size_t)blockIdx.y * stretches * n;
  float sum = 0;
  for (int s = 0; s < stretches; s++) sum += p[(size_t)s * n + column];
  y[(size_t)blockIdx.y * n + column] = sum;
}
