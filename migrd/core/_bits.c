/* SPDX-License-Identifier: Apache-2.0
 *
 * Operations on bits of any buffer, for Python: checks, and the loops of _bits_words.h without the
 * GIL. _bits.pyi says what each function does, bits_numpy.py does the same without a compiler.
 *
 * Rules: the limited API of Python 3.11 only (one binary for all later ones), no API of numpy; a
 * buffer is held from its first check to its last use; every number is from 0 to 2**63 - 1 and every
 * bit is checked to be in its buffer before the first is changed.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "_bits_words.h"

static const struct level *level = &portable;

enum access { READ = PyBUF_SIMPLE, WRITE = PyBUF_WRITABLE };
enum unit { BYTES, WORDS };

/* --- what is given ------------------------------------------------------------------------- */

/* A converter of PyArg_ParseTuple. */
static int number(PyObject *given, void *result)
{
    int overflow = 0;
    PyObject *index = PyNumber_Index(given);
    if (!index)
        return 0;
    long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (value == -1 && PyErr_Occurred())
        return 0;
    if (overflow || value < 0) {
        PyErr_Format(PyExc_ValueError, "%S is not between 0 and 2**63 - 1", given);
        return 0;
    }
    *(uint64_t *)result = (uint64_t)value;
    return 1;
}

static int hold(PyObject *given, Py_buffer *held, enum access access, enum unit unit)
{
    if (PyObject_GetBuffer(given, held, (int)access))
        return 0;
    if (unit == WORDS && held->len % 8) {
        PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes is not one of 64-bit words",
                     held->len);
        PyBuffer_Release(held);
        return 0;
    }
    return 1;
}

static int fits(const char *name, const Py_buffer *held, uint64_t first, uint64_t pages)
{
    const uint64_t bits = (uint64_t)held->len * 8;
    if (first <= bits && pages <= bits - first)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s has %llu bits: too short for %llu from bit %llu", name,
                 (unsigned long long)bits, (unsigned long long)pages, (unsigned long long)first);
    return 0;
}

static int apart(const Py_buffer *first, const Py_buffer *second)
{
    const uintptr_t a = (uintptr_t)first->buf, b = (uintptr_t)second->buf;
    if (!first->len || !second->len || a + (size_t)first->len <= b || b + (size_t)second->len <= a)
        return 1;
    PyErr_SetString(PyExc_ValueError, "the buffers overlap");
    return 0;
}

static int positive(const char *name, uint64_t value)
{
    if (value)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s must be at least 1", name);
    return 0;
}

/* Two buffers at once, that are not the same memory. */
static int hold_both(PyObject *to, Py_buffer *dst, PyObject *from, Py_buffer *src,
                     enum access src_access, enum unit src_unit)
{
    if (!hold(to, dst, WRITE, WORDS))
        return 0;
    if (!hold(from, src, src_access, src_unit)) {
        PyBuffer_Release(dst);
        return 0;
    }
    if (!apart(dst, src)) {
        PyBuffer_Release(dst);
        PyBuffer_Release(src);
        return 0;
    }
    return 1;
}

/* --- functions ----------------------------------------------------------------------------- */

static PyObject *py_or_bits(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *to, *from, *result = NULL;
    Py_buffer dst, src;
    uint64_t dst_bit, pages, newly, src_bit = 0, bit_pages = 1;
    if (!PyArg_ParseTuple(args, "OO&O&O|O&O&:or_bits", &to, number, &dst_bit, number, &pages, &from,
                          number, &src_bit, number, &bit_pages) ||
        !positive("bit_pages", bit_pages) || !hold_both(to, &dst, from, &src, READ, BYTES))
        return NULL;
    const uint64_t src_bits = pages ? (pages - 1) / bit_pages + 1 : 0;
    if (fits("dst", &dst, dst_bit, pages) && fits("src", &src, src_bit, src_bits)) {
        const struct level *at = level;
        Py_BEGIN_ALLOW_THREADS
        if (bit_pages == 1)
            newly = or_fine(at, dst.buf, dst_bit, pages, src.buf, src_bit);
        else
            newly = or_coarse(at, dst.buf, dst_bit, pages, src.buf, src_bit, bit_pages);
        Py_END_ALLOW_THREADS
        result = PyLong_FromUnsignedLongLong(newly);
    }
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return result;
}

/* Hold every source; how many are held then. All of them: no error. */
static Py_ssize_t hold_sources(PyObject *given, Py_ssize_t count, Py_buffer *held,
                               const word **sources, const Py_buffer *dst, uint64_t pages)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!hold(PyTuple_GetItem(given, i), &held[i], READ, WORDS))
            return i;
        if (!apart(dst, &held[i]) || !fits("a source", &held[i], 0, pages))
            return i + 1;
        sources[i] = held[i].buf;
    }
    return count;
}

static PyObject *or_all_held(const Py_buffer *dst, uint64_t pages, PyObject *given)
{
    const Py_ssize_t count = PyTuple_Size(given);
    PyObject *result = NULL;
    Py_ssize_t held_count = 0;
    Py_buffer *held = PyMem_Calloc((size_t)count + 1, sizeof *held);
    const word **sources = PyMem_Calloc((size_t)count + 1, sizeof *sources);
    if (!held || !sources)
        PyErr_NoMemory();
    else
        held_count = hold_sources(given, count, held, sources, dst, pages);
    if (!PyErr_Occurred()) {
        const struct level *at = level;
        uint64_t total;
        Py_BEGIN_ALLOW_THREADS
        total = or_all(at, dst->buf, pages, sources, (size_t)count);
        Py_END_ALLOW_THREADS
        result = PyLong_FromUnsignedLongLong(total);
    }
    while (held_count)
        PyBuffer_Release(&held[--held_count]);
    PyMem_Free(held);
    PyMem_Free(sources);
    return result;
}

static PyObject *py_or_all(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *to, *given, *result = NULL;
    Py_buffer dst;
    uint64_t pages;
    if (!PyArg_ParseTuple(args, "OO&O:or_all", &to, number, &pages, &given))
        return NULL;
    PyObject *sources = PySequence_Tuple(given);
    if (!sources)
        return NULL;
    if (hold(to, &dst, WRITE, WORDS)) {
        if (fits("dst", &dst, 0, pages))
            result = or_all_held(&dst, pages, sources);
        PyBuffer_Release(&dst);
    }
    Py_DECREF(sources);
    return result;
}

static PyObject *py_and_not(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *to, *from;
    Py_buffer dst, src;
    uint64_t pages;
    if (!PyArg_ParseTuple(args, "OO&O:and_not", &to, number, &pages, &from) ||
        !hold_both(to, &dst, from, &src, READ, WORDS))
        return NULL;
    const int fit = fits("dst", &dst, 0, pages) && fits("src", &src, 0, pages);
    if (fit) {
        Py_BEGIN_ALLOW_THREADS
        and_not(dst.buf, pages, src.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return fit ? Py_NewRef(Py_None) : NULL;
}

static PyObject *py_move(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *to, *from;
    Py_buffer dst, src;
    uint64_t pages;
    if (!PyArg_ParseTuple(args, "OO&O:move", &to, number, &pages, &from) ||
        !hold_both(to, &dst, from, &src, WRITE, WORDS))
        return NULL;
    const int fit = fits("dst", &dst, 0, pages) && fits("src", &src, 0, pages);
    if (fit) {
        Py_BEGIN_ALLOW_THREADS
        move_bits(dst.buf, pages, src.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return fit ? Py_NewRef(Py_None) : NULL;
}

static PyObject *py_count(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *from, *result = NULL;
    Py_buffer src;
    uint64_t first, pages, total;
    if (!PyArg_ParseTuple(args, "OO&O&:count", &from, number, &first, number, &pages) ||
        !hold(from, &src, READ, WORDS))
        return NULL;
    if (fits("src", &src, first, pages)) {
        const struct level *at = level;
        Py_BEGIN_ALLOW_THREADS
        total = count_range(at, src.buf, first, pages);
        Py_END_ALLOW_THREADS
        result = PyLong_FromUnsignedLongLong(total);
    }
    PyBuffer_Release(&src);
    return result;
}

static PyObject *py_region_counts(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *from, *to;
    Py_buffer src, out;
    uint64_t pages, per;
    if (!PyArg_ParseTuple(args, "OO&O&O:region_counts", &from, number, &pages, number, &per, &to) ||
        !positive("pages_per_region", per) || !hold_both(to, &out, from, &src, READ, WORDS))
        return NULL;
    const uint64_t regions = pages ? (pages - 1) / per + 1 : 0;
    int fit = fits("src", &src, 0, pages);
    if (fit && regions > (uint64_t)out.len / 8) {
        PyErr_Format(PyExc_ValueError, "out has room for %zd regions, not for %llu", out.len / 8,
                     (unsigned long long)regions);
        fit = 0;
    }
    if (fit) {
        const struct level *at = level;
        word *counts = out.buf;
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t r = 0, left = pages; r < regions; r++, left -= per)
            counts[r] = count_range(at, src.buf, r * per, left < per ? left : per);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&out);
    return fit ? Py_NewRef(Py_None) : NULL;
}

static PyObject *py_extents(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *from, *to, *result = NULL;
    Py_buffer src, out;
    uint64_t first, end, gap = 0;
    if (!PyArg_ParseTuple(args, "OO&O&O|O&:extents", &from, number, &first, number, &end, &to,
                          number, &gap) ||
        !hold_both(to, &out, from, &src, READ, WORDS))
        return NULL;
    if (out.len < 16)
        PyErr_SetString(PyExc_ValueError, "out must have room for at least one extent (16 bytes)");
    else if (end < first)
        PyErr_SetString(PyExc_ValueError, "the end is before the beginning");
    else if (fits("src", &src, first, end - first)) {
        const struct level *chosen = level;
        struct search at = {
            .out = out.buf, .room = (size_t)out.len / 16, .gap = gap, .next = -1};
        Py_BEGIN_ALLOW_THREADS
        find_extents(chosen, &at, src.buf, first, end);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("nL", (Py_ssize_t)at.found, (long long)at.next);
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&out);
    return result;
}

/* Rows of `width` words each, the first two of which are where a run begins and ends. */
struct runs {
    const word *rows;
    uint64_t count, width, base, shift, first;
};

static int runs_fit(const struct runs *of, uint64_t pages)
{
    for (uint64_t i = 0; i < of->count; i++) {
        const word begin = of->rows[i * of->width], end = of->rows[i * of->width + 1];
        if (begin < of->base || end < begin || (end - of->base) >> of->shift > pages - of->first)
            return 0;
    }
    return 1;
}

static uint64_t mark_rows(word *dst, const struct runs *of)
{
    uint64_t marked = 0;
    for (uint64_t i = 0; i < of->count; i++) {
        const word *row = of->rows + i * of->width;
        const uint64_t first = ((row[0] - of->base) >> of->shift) + of->first;
        const uint64_t end = ((row[1] - of->base) >> of->shift) + of->first;
        if (first == end)
            continue;
        const uint64_t at = first / 64, last = (end - 1) / 64;
        const word head = ~(word)0 << first % 64, tail = ~(word)0 >> (63 - (end - 1) % 64);
        marked += end - first;
        if (at == last) {
            dst[at] |= head & tail;
            continue;
        }
        dst[at] |= head;
        memset(dst + at + 1, 0xff, (last - at - 1) * 8);
        dst[last] |= tail;
    }
    return marked;
}

static PyObject *py_mark_runs(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *to, *from, *result = NULL;
    Py_buffer dst, src;
    uint64_t pages;
    struct runs of;
    if (!PyArg_ParseTuple(args, "OO&OO&O&O&O&:mark_runs", &to, number, &pages, &from, number,
                          &of.width, number, &of.base, number, &of.shift, number, &of.first) ||
        !hold_both(to, &dst, from, &src, READ, WORDS))
        return NULL;
    if (of.width < 2 || of.width > 64 || src.len / 8 % (Py_ssize_t)of.width || of.shift > 62)
        PyErr_SetString(PyExc_ValueError, "not rows of words, or not a shift");
    else if (fits("dst", &dst, 0, pages) && fits("dst", &dst, of.first, 0)) {
        int fit = of.first <= pages;
        uint64_t marked = 0;
        of.rows = src.buf;
        of.count = (uint64_t)src.len / 8 / of.width;
        Py_BEGIN_ALLOW_THREADS
        fit = fit && runs_fit(&of, pages);
        if (fit)
            marked = mark_rows(dst.buf, &of);
        Py_END_ALLOW_THREADS
        if (fit)
            result = PyLong_FromUnsignedLongLong(marked);
        else
            PyErr_Format(PyExc_ValueError, "runs that are not in a bitmap of %llu pages",
                         (unsigned long long)pages);
    }
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return result;
}

/* --- which loops --------------------------------------------------------------------------- */

static const struct level *fastest(void)
{
#ifdef HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") &&
        __builtin_cpu_supports("bmi"))
        return &avx2;
#endif
    return &portable;
}

static PyObject *py_use(PyObject *Py_UNUSED(module), PyObject *args)
{
    const struct level *before = level, *const all[] = {&portable, fastest()};
    const char *name;
    if (!PyArg_ParseTuple(args, "s:use", &name))
        return NULL;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i]->name, name)) {
            level = all[i];
            return PyUnicode_FromString(before->name);
        }
    return PyErr_Format(PyExc_ValueError, "not possible here: %s", name);
}

static PyMethodDef methods[] = {
    {"or_bits", py_or_bits, METH_VARARGS, NULL},
    {"or_all", py_or_all, METH_VARARGS, NULL},
    {"and_not", py_and_not, METH_VARARGS, NULL},
    {"move", py_move, METH_VARARGS, NULL},
    {"count", py_count, METH_VARARGS, NULL},
    {"region_counts", py_region_counts, METH_VARARGS, NULL},
    {"extents", py_extents, METH_VARARGS, NULL},
    {"mark_runs", py_mark_runs, METH_VARARGS, NULL},
    {"use", py_use, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int choose(PyObject *Py_UNUSED(module))
{
    level = fastest();
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, choose}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_bits", "Operations on bits of a buffer.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__bits(void)
{
    return PyModuleDef_Init(&definition);
}
