/* The CUDA runtime and driver, as CuPy's compiled modules call them, on host memory.

   f_NAME stands in for NAME of cupy_backends.cuda.api.{runtime,driver}; fake_gpu.py puts it there and compares the types written here
   with the ones CuPy exports.  The last int of an argument list is Cython's own.  Streams and events are numbers: everything happens at once.
   What waits for the device, or copies to or from it, is counted in `fake`. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct _object PyObject;
extern PyObject _Py_NoneStruct, *PyExc_RuntimeError;
void Py_IncRef(PyObject *);
PyObject *PyLong_FromLong(long);
void PyErr_SetString(PyObject *, const char *);
void PyErr_SetObject(PyObject *, PyObject *);

struct { long launches, mallocs, memsets, waits, h2d, d2h, d2d, h2d_bytes, d2h_bytes, graphs, bytes, peak; } fake;
int (*fake_run)(intptr_t function, unsigned *grid_and_block, unsigned shared, intptr_t params);      /* set by fake_gpu.py; non-zero: it failed */
char fake_error[2000];                                                                               /* and this says why */
static intptr_t next_id = 0x100000;

static PyObject *none(void) { Py_IncRef(&_Py_NoneStruct); return &_Py_NoneStruct; }

/* ── capture: what is asked of the capturing stream is noted, not done.  What cannot be noted is refused, and spoils the capture ────────────── */
enum { LAUNCH, COPY, FILL, PRODUCT, BEGIN, END, REPLAY };
enum { UNSUPPORTED = 900, INVALIDATED = 901, CAPTURING_ALREADY = 900 };                              /* cudaErrorStreamCapture... */
intptr_t fake_capturing;                                                                             /* the stream; 0: none */
intptr_t (*fake_note)(int kind, intptr_t a, intptr_t b, intptr_t c, intptr_t d);                     /* set by fake_gpu.py */
PyObject *fake_error_class;                                                                          /* CUDARuntimeError */
static int spoilt;
static PyObject *refuse(int status) {
    spoilt = 1;
    PyErr_SetObject(fake_error_class, PyLong_FromLong(status));
    return 0;
}
static PyObject *waits(void) { if (fake_capturing) return refuse(UNSUPPORTED); fake.waits++; return none(); }

/* ── memory: a header of 512 bytes keeps the size; fresh memory is poisoned ─────────────────────────────────────────────────────────────── */
static intptr_t get(size_t size) {
    size_t room = (size + 511 + (size == 0)) / 512 * 512;
    char *p = aligned_alloc(512, room + 512);
    *(size_t *)p = size;
    fake.mallocs++;
    if ((fake.bytes += size) > fake.peak) fake.peak = fake.bytes;
    memset(p + 512, 0xEE, room);
    return (intptr_t)(p + 512);
}
static PyObject *put_back(intptr_t p) {
    if (p) { char *start = (char *)p - 512; fake.bytes -= *(size_t *)start; free(start); }
    return none();
}
static PyObject *copy(intptr_t to, intptr_t from, size_t size, int kind) {                           /* 1 host to device, 2 back, 3 within */
    memmove((void *)to, (void *)from, size);
    if (kind == 1) { fake.h2d++; fake.h2d_bytes += size; }
    else if (kind == 2) { fake.d2h++; fake.d2h_bytes += size; }
    else fake.d2d++;
    return none();
}
static PyObject *fill(intptr_t p, int value, size_t size) { fake.memsets++; memset((void *)p, value, size); return none(); }

intptr_t f_malloc(size_t size, int s) { return get(size); }
intptr_t f_mallocAsync(size_t size, intptr_t stream, int s) { return get(size); }
intptr_t f_hostAlloc(size_t size, unsigned int flags, int s) { return get(size); }
PyObject *f_free(intptr_t p, int s) { return put_back(p); }
PyObject *f_freeAsync(intptr_t p, intptr_t stream, int s) { return put_back(p); }
PyObject *f_freeHost(intptr_t p, int s) { return put_back(p); }
PyObject *f_memcpy(intptr_t to, intptr_t from, size_t size, int kind, int s) { if (kind != 3) fake.waits++; return copy(to, from, size, kind); }
PyObject *f_memcpyAsync(intptr_t to, intptr_t from, size_t size, int kind, intptr_t stream, int s) {
    if (!fake_capturing || stream != fake_capturing) return copy(to, from, size, kind);
    if (kind != 3) return refuse(UNSUPPORTED);
    fake_note(COPY, to, from, size, 0);
    return none();
}
PyObject *f_memset(intptr_t p, int value, size_t size, int s) { return fill(p, value, size); }
PyObject *f_memsetAsync(intptr_t p, int value, size_t size, intptr_t stream, int s) {
    if (!fake_capturing || stream != fake_capturing) return fill(p, value, size);
    fake_note(FILL, p, value, size, 0);
    return none();
}
int f_pointerGetMemoryType(intptr_t p, int s) { return 0; }

/* ── the device: a Hopper ───────────────────────────────────────────────────────────────────────────────────────────────────────────────── */
int f_getDevice(int s) { return 0; }
int f_getDeviceCount(int s) { return 1; }
int f_driverGetVersion(int s) { return 13000; }
int f_deviceCanAccessPeer(int a, int b, int s) { return 0; }
int f_deviceGetAttribute(int attribute, int device, int s) {
    switch (attribute) {
        case 1: case 2: case 3: return 1024;                     /* threads in a block, and along x and y */
        case 4: return 64;                                       /* along z */
        case 5: return 0x7fffffff;                               /* blocks in a grid along x */
        case 6: case 7: return 65535;                            /* along y and z */
        case 8: return 49152;                                    /* bytes of shared memory in a block; 97: if asked for; 81: in a multiprocessor */
        case 97: return 232448;
        case 81: return 233472;
        case 10: return 32;                                      /* threads in a warp */
        case 12: case 82: return 65536;                          /* registers in a block, in a multiprocessor */
        case 16: return 132;                                     /* multiprocessors */
        case 39: return 2048;                                    /* threads in one */
        case 75: return 9;                                       /* compute capability 9.0 */
        case 76: return 0;
        case 115: return 1;                                      /* memory pools */
    }
    return 0;
}
PyObject *f_setDevice(int device, int s) { return none(); }
PyObject *f_deviceSynchronize(int s) { return waits(); }
PyObject *f__ensure_context(void) { return none(); }
intptr_t f_ctxGetCurrent(int s) { return 1; }
int f_ctxGetDevice(int s) { return 0; }
intptr_t f_streamGetCtx(intptr_t stream, int s) { return 1; }

/* ── streams and events ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────── */
intptr_t f_streamCreate(int s) { return next_id++; }
intptr_t f_streamCreateWithFlags(unsigned int flags, int s) { return next_id++; }
intptr_t f_streamCreateWithPriority(unsigned int flags, int priority, int s) { return next_id++; }
PyObject *f_streamDestroy(intptr_t stream, int s) { return none(); }
PyObject *f_streamSynchronize(intptr_t stream, int s) { return waits(); }
PyObject *f_streamQuery(intptr_t stream, int s) { return PyLong_FromLong(0); }
int f_streamIsCapturing(intptr_t stream, int s) { return fake_capturing && stream == fake_capturing; }
PyObject *f_streamBeginCapture(intptr_t stream, int s, void *mode) {
    if (fake_capturing) return refuse(CAPTURING_ALREADY);
    fake_capturing = stream;
    spoilt = 0;
    fake_note(BEGIN, 0, 0, 0, 0);
    return none();
}
intptr_t f_streamEndCapture(intptr_t stream, int s) {
    intptr_t graph = fake_note(END, 0, 0, 0, 0);
    fake_capturing = 0;
    if (spoilt) { refuse(INVALIDATED); return 0; }
    return graph;
}
intptr_t f_graphInstantiate(intptr_t graph, int s) { return graph; }
PyObject *f_graphLaunch(intptr_t graph, intptr_t stream, int s) {
    fake.graphs++;
    if (!fake_note(REPLAY, graph, 0, 0, 0)) return none();
    PyErr_SetString(PyExc_RuntimeError, fake_error);
    return 0;
}
PyObject *f_graphUpload(intptr_t graph, intptr_t stream, int s) { return none(); }
PyObject *f_graphDestroy(intptr_t graph, int s) { return none(); }
PyObject *f_graphExecDestroy(intptr_t graph, int s) { return none(); }
PyObject *f_streamWaitEvent(intptr_t stream, intptr_t event, int s, void *more) { return none(); }
unsigned int f_streamGetFlags(intptr_t stream, int s) { return 1; }
intptr_t f_eventCreate(int s) { return next_id++; }
intptr_t f_eventCreateWithFlags(unsigned int flags, int s) { return next_id++; }
PyObject *f_eventDestroy(intptr_t event, int s) { return none(); }
PyObject *f_eventRecord(intptr_t event, intptr_t stream, int s) { return none(); }
PyObject *f_eventQuery(intptr_t event, int s) { return PyLong_FromLong(0); }                           /* a status: it is over */
PyObject *f_eventSynchronize(intptr_t event, int s) { return waits(); }
float f_eventElapsedTime(intptr_t from, intptr_t to, int s) { return 0.001f; }

/* ── kernels ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────── */
static PyObject *launch(intptr_t f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, intptr_t params,
                        intptr_t stream) {
    unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
    if (fake_capturing && stream == fake_capturing) { fake_note(LAUNCH, f, (intptr_t)sizes, shared, params); return none(); }
    fake.launches++;
    if (!fake_run(f, sizes, shared, params)) return none();
    PyErr_SetString(PyExc_RuntimeError, fake_error);
    return 0;
}
PyObject *f_launchKernel(intptr_t f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by, unsigned int bz,
                         unsigned int shared, intptr_t stream, intptr_t params, intptr_t extra, int s) {
    return launch(f, gx, gy, gz, bx, by, bz, shared, params, stream);
}
PyObject *f_moduleUnload(intptr_t module, int s) { return none(); }
int f_funcGetAttribute(int attribute, intptr_t f, int s) { return attribute == 0 ? 1024 : 0; }
PyObject *f_funcSetAttribute(intptr_t f, int attribute, int value, int s) { return none(); }
int f_occupancyMaxActiveBlocksPerMultiprocessor(intptr_t f, int threads, size_t shared, int s) { return 2; }
