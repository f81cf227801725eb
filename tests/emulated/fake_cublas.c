/* cuBLAS on the CPU: the matrix products CuPy asks for, and no more.  "Device" memory is host memory, so they really compute.

   Sums are formed in double and rounded once, so that a result is off by the last rounding alone.  Column major, as in cuBLAS.
   Whatever CuPy could call besides answers NOT_SUPPORTED: fake_gpu.py writes those functions. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };                   /* cudaDataType */
enum { OK = 0, ALLOC_FAILED = 3, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
long fake_products;                                              /* calls that multiply; a batch is one */
intptr_t *fake_captured;                                        /* the stream that is being captured, and whom to tell: fake_gpu.c */
intptr_t (*fake_tell)(int kind, intptr_t a, intptr_t b, intptr_t c, intptr_t d);
typedef struct { intptr_t stream; int workspace; } Handle;      /* CuPy has one of its own */

static float half_in(uint16_t h) { _Float16 f; memcpy(&f, &h, 2); return f; }
static uint16_t half_out(float f) { _Float16 h = (_Float16)f; uint16_t u; memcpy(&u, &h, 2); return u; }
static float bf_in(uint16_t b) { uint32_t u = (uint32_t)b << 16; float f; memcpy(&f, &u, 4); return f; }
static uint16_t bf_out(float f) {                                /* to the nearest, ties to even; a NaN stays one */
    uint32_t u;
    memcpy(&u, &f, 4);
    return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static int size_of(int type) { return type == F32 ? 4 : type == F64 ? 8 : type == F16 || type == BF16 ? 2 : 0; }
static double load(const void *p, int type, long i) {
    switch (type) {
        case F32: return ((const float *)p)[i];
        case F64: return ((const double *)p)[i];
        case F16: return half_in(((const uint16_t *)p)[i]);
        default: return bf_in(((const uint16_t *)p)[i]);
    }
}
static void store(void *p, int type, long i, double v) {
    switch (type) {
        case F32: ((float *)p)[i] = v; break;
        case F64: ((double *)p)[i] = v; break;
        case F16: ((uint16_t *)p)[i] = half_out(v); break;
        default: ((uint16_t *)p)[i] = bf_out(v);
    }
}

/* C = alpha op(A) op(B) + beta C.   op(A) is m by k, op(B) is k by n; where beta is 0, C is not read. */
static int product(int ta, int tb, long m, long n, long k, double alpha, const void *A, int at, long lda,
                   const void *B, int bt, long ldb, double beta, void *C, int ct, long ldc) {
    if (!size_of(at) || !size_of(bt) || !size_of(ct)) return NOT_SUPPORTED;
    if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return INVALID_VALUE;
    double *a = malloc(sizeof(double) * (m * k + 1)), *column = malloc(sizeof(double) * (m + 1));
    for (long p = 0; p < k; p++)
        for (long i = 0; i < m; i++) a[i + p * m] = load(A, at, ta ? p + i * lda : i + p * lda);
    for (long j = 0; j < n; j++) {
        memset(column, 0, sizeof(double) * m);
        for (long p = 0; p < k; p++) {
            double b = load(B, bt, tb ? j + p * ldb : p + j * ldb);
            for (long i = 0; i < m; i++) column[i] += a[i + p * m] * b;
        }
        for (long i = 0; i < m; i++) store(C, ct, i + j * ldc, alpha * column[i] + (beta ? beta * load(C, ct, i + j * ldc) : 0));
    }
    free(a);
    free(column);
    return OK;
}
static double factor(const void *p, int compute) {               /* alpha and beta are of the type the call computes in */
    if (compute == 70 || compute == 71 || compute == F64) return *(const double *)p;
    if (compute == 64 || compute == 65 || compute == F16) return half_in(*(const uint16_t *)p);
    return *(const float *)p;
}

int cublasCreate_v2(void **h) { *h = calloc(1, sizeof(Handle)); return OK; }
int cublasDestroy_v2(void *h) { free(h); return OK; }
int cublasSetStream_v2(void *h, void *s) { *(Handle *)h = (Handle){(intptr_t)s, 0}; return OK; }
int cublasGetStream_v2(void *h, void **s) { *s = (void *)((Handle *)h)->stream; return OK; }
int cublasSetMathMode(void *h, int mode) { return OK; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return OK; }
int cublasSetPointerMode_v2(void *h, int mode) { return OK; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return OK; }
int cublasSetWorkspace_v2(void *h, void *p, size_t size) { ((Handle *)h)->workspace = 1; return OK; }
int cublasGetVersion_v2(void *h, int *version) { *version = 130000; return OK; }

int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *A, int at, int lda, const void *B, int bt, int ldb,
                 const void *beta, void *C, int ct, int ldc, int compute, int algorithm) {
    fake_products++;
    return product(ta, tb, m, n, k, factor(alpha, compute), A, at, lda, B, bt, ldb, factor(beta, compute), C, ct, ldc);
}
/* While its stream is captured, a product is noted and done at each replay.  Without a workspace cuBLAS would have to ask for memory then. */
typedef struct { int ta, tb, m, n, k; double alpha; const char *A; int at, lda; long long sa; const char *B; int bt, ldb; long long sb; double beta;
                 char *C; int ct, ldc; long long sc; int batch; } Call;
static Call noted[1 << 16];
static long notes;
static int run(const Call *c) {
    int bad = OK;
    for (int i = 0; i < c->batch && !bad; i++)
        bad = product(c->ta, c->tb, c->m, c->n, c->k, c->alpha, c->A + i * c->sa * size_of(c->at), c->at, c->lda, c->B + i * c->sb * size_of(c->bt),
                      c->bt, c->ldb, c->beta, c->C + i * c->sc * size_of(c->ct), c->ct, c->ldc);
    return bad;
}
int fake_again(long i) { return run(&noted[i]); }
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *A, int at, int lda, long long sa,
                               const void *B, int bt, int ldb, long long sb, const void *beta, void *C, int ct, int ldc, long long sc,
                               int batch, int compute, int algorithm) {
    Call c = {ta, tb, m, n, k, factor(alpha, compute), A, at, lda, sa, B, bt, ldb, sb, factor(beta, compute), C, ct, ldc, sc, batch};
    if (!fake_captured || !*fake_captured || *fake_captured != ((Handle *)h)->stream) { fake_products++; return run(&c); }
    if (!((Handle *)h)->workspace || notes == 1 << 16) return ALLOC_FAILED;
    noted[notes] = c;
    fake_tell(3, notes++, 0, 0, 0);
    return OK;
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *A, int lda, const float *B, int ldb,
                   const float *beta, float *C, int ldc) {
    fake_products++;
    return product(ta, tb, m, n, k, *alpha, A, F32, lda, B, F32, ldb, *beta, C, F32, ldc);
}
int cublasSgemmBatched(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *const *A, int lda,
                       const float *const *B, int ldb, const float *beta, float *const *C, int ldc, int batch) {
    int bad = OK;
    fake_products++;
    for (int i = 0; i < batch && !bad; i++) bad = product(ta, tb, m, n, k, *alpha, A[i], F32, lda, B[i], F32, ldb, *beta, C[i], F32, ldc);
    return bad;
}
int cublasDgemmBatched(void *h, int ta, int tb, int m, int n, int k, const double *alpha, const double *const *A, int lda,
                       const double *const *B, int ldb, const double *beta, double *const *C, int ldc, int batch) {
    int bad = OK;
    fake_products++;
    for (int i = 0; i < batch && !bad; i++) bad = product(ta, tb, m, n, k, *alpha, A[i], F64, lda, B[i], F64, ldb, *beta, C[i], F64, ldc);
    return bad;
}
