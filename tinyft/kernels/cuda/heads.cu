// Queries, keys and values from rows of a product to heads, with their biases; and their gradients back to rows.
//
//   cut_heads    y -> qkv (3, B, H, time, D):  part p of row r of y starts at p by_part + r by_row
//   join_heads   three (B, H, time, D) -> g (B time, 3 H D);  what is null is zero

#define EACH(i, n) (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)

extern "C" __global__ void cut_heads(const T* y, const T* bq, const T* bk, const T* bv, T* qkv, int time, int H, int D, long long by_part,
                                     long long by_row, long long size) {
  for EACH(i, size) {
    long long d = i % D, t = i / D % time, h = i / D / time % H, row = i / D / time / H;         // row: part and batch together
    long long part = row / (size / 3 / D / time / H), b = row % (size / 3 / D / time / H), column = h * D + d;
    const T* bias = part == 0 ? bq : part == 1 ? bk : bv;
    qkv[i] = (T)((float)y[part * by_part + (b * time + t) * by_row + column] + (float)bias[column]);
  }
}

extern "C" __global__ void join_heads(const T* q, const T* k, const T* v, T* g, int time, int H, int D, long long size) {
  for EACH(i, size) {
    long long n = (long long)H * D, column = i % n, part = i / n % 3, row = i / n / 3, b = row / time, t = row % time;
    const T* from = part == 0 ? q : part == 1 ? k : v;
    g[i] = from ? from[((b * H + column / D) * time + t) * D + column % D] : (T)0.0f;
  }
}
