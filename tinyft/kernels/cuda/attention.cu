// The middle of attention, between its two products: scores in, probabilities out.        scores (lead, heads, t, n);  a warp to a row
//
//   P = softmax(α S) over the keys a query may see;   dS = α P (dP − Σ dP P),  dP = (G Vᵀ) ⊙ keep
//
// Which keys those are is worked out here, from two numbers, and no mask is ever made: query i sees key j ≤ i + n − t (causal), and
// only where `seen`, read with strides of its own (zero along axes it does not have), is true.  A query that sees nothing gives zeros.
// Scores and dP come in float, as their products add them up; P and dS go in T.  Where T is float they may take each other's place.
#include "rows.cuh"

extern "C" __global__ void masked_softmax(const float* scores, const bool* seen, const T* keep, T* p, T* kept, long long rows, int n, int t, int heads,
                                          int causal, float alpha, long long by_lead, long long by_head, long long by_query, long long by_key) {
  long long row = blockIdx.x * (long long)(blockDim.x >> 5) + (threadIdx.x >> 5);
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  int i = row % t, ends = causal ? i + n - t + 1 : n;    // the first `ends` keys
  const float* s = scores + row * n;
  const bool* may = seen ? seen + row / t / heads * by_lead + row / t % heads * by_head + i * by_query : 0;

  float top = NEVER, sum = 0;
  for (int j = lane; j < ends; j += 32) if (!may || may[j * by_key]) top = fmaxf(top, alpha * s[j]);
  top = warp_max(top);
  if (top == NEVER) top = 0;                             // nothing to see: minus infinity less itself is no number
  for (int j = lane; j < ends; j += 32) if (!may || may[j * by_key]) sum += expf(alpha * s[j] - top);
  sum = warp_sum(sum);
  float share = sum == 0 ? 0 : 1 / sum;
  for (int j = lane; j < n; j += 32) {
    float value = j < ends && (!may || may[j * by_key]) ? expf(alpha * s[j] - top) * share : 0;
    if (keep) kept[row * n + j] = (T)(value * (float)keep[row * n + j]);
    p[row * n + j] = (T)value;                           // p may be where scores were: this lane has read what it now writes over
  }
}

extern "C" __global__ void masked_softmax_back(const T* p, const T* keep, const float* dp, T* ds, long long rows, int n, float alpha) {
  long long row = blockIdx.x * (long long)(blockDim.x >> 5) + (threadIdx.x >> 5);
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  float along = 0;
  for (long long j = row * n + lane; j < (row + 1) * n; j += 32) along += (float)p[j] * dp[j] * (keep ? (float)keep[j] : 1);
  along = warp_sum(along);
  for (long long j = row * n + lane; j < (row + 1) * n; j += 32)
    ds[j] = (T)(alpha * (float)p[j] * (dp[j] * (keep ? (float)keep[j] : 1) - along));
}
