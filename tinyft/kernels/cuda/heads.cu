// Queries, keys and values from rows of a product to heads, with their biases; and their gradients back to rows.
//
//   cut_heads    y -> qkv (3, B, H, time, D):  part p of row r of y starts at p by_part + r by_row
//   join_heads   three (B, H, time, D) -> g (B time, 3 H D);  a null pointer stands for zeros

// Both kernels only copy, and an integer division costs as much as copying ten elements: so indices are computed per row, not per
// element.  Grid (3 B H, ⌈time/8⌉), block (32, 8): a block takes eight positions of one head of one part of one text, a warp one
// position.
#define PLACE int h = blockIdx.x % H, b = blockIdx.x / H % B, part = blockIdx.x / H / B, t = blockIdx.y * 8 + threadIdx.y

extern "C" __global__ void cut_heads(const T* y, const T* bq, const T* bk, const T* bv, T* qkv, int B, int time, int H, int D, long long by_part,
                                     long long by_row) {
  PLACE;
  if (t >= time) return;
  const T* bias = (part == 0 ? bq : part == 1 ? bk : bv) + h * D;
  const T* row = y + part * by_part + ((long long)b * time + t) * by_row + h * D;
  T* head = qkv + ((long long)blockIdx.x * time + t) * D;
  for (int d = threadIdx.x; d < D; d += 32) head[d] = (T)((float)row[d] + (float)bias[d]);
}

extern "C" __global__ void join_heads(const T* q, const T* k, const T* v, T* g, int B, int time, int H, int D) {
  PLACE;
  if (t >= time) return;
  const T* from = part == 0 ? q : part == 1 ? k : v;
  long long head = (((long long)b * H + h) * time + t) * D;
  T* row = g + ((((long long)b * time + t) * 3 + part) * H + h) * D;
  for (int d = threadIdx.x; d < D; d += 32) row[d] = from ? from[head + d] : (T)0.0f;
}
