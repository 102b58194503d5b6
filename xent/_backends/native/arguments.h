// What Python hands over: addresses and numbers, from left to right.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <initializer_list>

#include "call.h"

// Arguments are taken from left to right, as native.py passes them; a failed conversion is seen at the end.
struct Arguments {
    PyObject* const* next;
    int64_t integer() { return PyLong_AsLongLong(*next++); }
    double real() { return PyFloat_AsDouble(*next++); }
    template <class T>
    T* address() {
        return static_cast<T*>(PyLong_AsVoidPtr(*next++));
    }
    Matrix matrix(int64_t B) {
        void* data = address<void>();
        const int64_t outer_stride = integer(), row_stride = integer();
        return {data, B, outer_stride, row_stride, integer()};
    }
    PerRow per_row() {
        double* data = address<double>();
        return {data, integer() != 0};
    }
};

// What both primitives take first.
inline Call read_call(Arguments& a) {
    Call c{};
    const int64_t A = a.integer(), B = a.integer();
    c.N = A * B, c.C = a.integer();
    c.logits = a.matrix(B), c.target = a.matrix(B);
    c.target_kind = a.integer(), c.start = a.integer(), c.ignore_index = a.integer();
    c.scale = a.real(), c.softcap = a.real();
    c.weight = a.address<void>();
    return c;
}

inline Formula read_formula(Arguments& a) {
    Formula f{};
    f.wanted = true;
    f.eps = a.real(), f.z_loss = a.real(), f.weight_sum = a.real();
    f.row_weight = a.address<double>();
    return f;
}

inline bool wrong_count(Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return false;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, given);
    return true;
}

// A tensor without storage (fake, or freed) has the address 0.
inline bool unreadable(const Call& c, std::initializer_list<const void*> others) {
    bool missing = c.N > 0 && (!c.target.data || (c.C > 0 && !c.logits.data));
    for (const void* address : others) missing |= c.N > 0 && !address;
    if (missing && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "expected tensors with storage, got none");
    return PyErr_Occurred();
}
