// What Python hands over: tensors, the records of xent/_records.py, and numbers, taken from left to right.
//
// A tensor is read by DLPack's exchange API, a table of C functions that torch.Tensor carries: its structs lie in memory
// as they do in every release of torch, and in every one of its builds.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "call.h"

struct DLTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeAPI {
    struct {
        uint32_t major, minor;
        const void* previous;
    } header;
    const void *allocate, *from_python, *to_python;
    int (*borrow)(void* tensor, DLTensor* out);  // 0, or -1 with an exception set
    const void* stream;
};

inline const ExchangeAPI* exchange;
inline PyTypeObject* tensor_type;  // torch.Tensor

struct Layout {  // see xent/_records.py
    int64_t axis, A, B;
};

struct Tensor {
    DLTensor dl{};
    Type type = NO_TYPE;
    const char* name = "";
    explicit operator bool() const { return dl.data != nullptr; }
    char* data() const { return static_cast<char*>(dl.data) + dl.byte_offset; }
    bool soft() const { return type >= FLOAT32; }
    int64_t count() const {
        int64_t n = 1;
        for (int d = 0; d < dl.ndim; ++d) n *= dl.shape[d];
        return n;
    }
    bool side_by_side() const {
        int64_t step = 1;
        for (int d = dl.ndim - 1; d >= 0; step *= dl.shape[d--])
            if (dl.shape[d] != 1 && dl.strides[d] != step) return false;
        return true;
    }
    // Without the dimension `axis`, if that is one.
    std::vector<int64_t> shape(int64_t axis = -1) const {
        std::vector<int64_t> sizes;
        for (int d = 0; d < dl.ndim; ++d)
            if (d != axis) sizes.push_back(dl.shape[d]);
        return sizes;
    }
};

// Whether two strides lead to all rows of a tensor: `axis` is the dimension of its classes, or -1.
inline bool find_rows(const Tensor& x, int64_t axis, int64_t A, int64_t B, Matrix& found) {
    int64_t inner = 1, outer = 1;
    found = {x.data(), B, 0, 0, axis < 0 ? 0 : x.dl.strides[axis]};
    for (int d = x.dl.ndim - 1; d >= 0; --d) {
        const int64_t n = x.dl.shape[d], stride = x.dl.strides[d];
        if (d == axis || n == 1) continue;
        int64_t& count = inner < B ? inner : outer;
        int64_t& step = inner < B ? found.row_stride : found.outer_stride;
        if (count == 1) step = stride;
        if (stride != step * count) return false;
        count *= n;
    }
    return inner == B && outer == A;
}

struct Arguments {  // a failed conversion is seen at the end
    PyObject* const* next;
    int64_t integer() { return PyLong_AsLongLong(*next++); }
    double real() { return number(*next++, 0); }
    template <class T>
    T* address() {
        return static_cast<T*>(PyLong_AsVoidPtr(*next++));
    }
    PyObject* object() { return *next++; }
    Tensor optional(const char* name) { return *next == Py_None ? ++next, Tensor() : tensor(name); }
    Tensor tensor(const char* name) {
        Tensor x;
        x.name = name;
        PyObject* const given = *next++;
        if (PyErr_Occurred()) return x;
        if (Py_TYPE(given) != tensor_type && !PyType_IsSubtype(Py_TYPE(given), tensor_type)) {
            PyErr_Format(PyExc_TypeError, "%s: expected a Tensor, got %R", name, Py_TYPE(given));
        } else if (exchange->borrow(given, &x.dl)) {
            PyErr_Clear();  // torch's has a stack of C++
            PyObject* const device = PyObject_GetAttrString(given, "device");
            PyErr_Format(PyExc_ValueError, "%s: expected a strided CPU tensor, got one on %S", name, device);
            Py_XDECREF(device);
        }
        if (PyErr_Occurred()) return x;
        const int code = x.dl.dtype.code, bits = x.dl.dtype.bits;
        if (code == 0) x.type = bits == 64 ? INT64 : bits == 32 ? INT32 : NO_TYPE;
        if (code == 2) x.type = bits == 64 ? FLOAT64 : bits == 32 ? FLOAT32 : bits == 16 ? FLOAT16 : NO_TYPE;
        if (code == 4) x.type = BFLOAT16;
        constexpr int CPU = 1, PINNED = 3;
        if (x.dl.device.type != CPU && x.dl.device.type != PINNED) {
            PyErr_Format(PyExc_ValueError, "%s: expected a CPU tensor", name);
        } else if (!x.dl.data && x.count() > 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected a tensor with storage, got none", name);
        }
        return x;
    }
    static double number(PyObject* x, double none) { return x == Py_None ? none : PyFloat_AsDouble(x); }
    static int64_t integer(PyObject* x, int64_t none) { return x == Py_None ? none : PyLong_AsLongLong(x); }
};

inline std::string text(const std::vector<int64_t>& shape) {
    std::string found;
    for (int64_t size : shape) found += (found.empty() ? "" : ", ") + std::to_string(size);
    return "(" + found + (shape.size() == 1 ? ",)" : ")");
}

inline void unexpected(const Tensor& x, const std::string& expected) {
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s: expected %s, got %s", x.name, expected.c_str(), text(x.shape()).c_str());
}

inline void expect(const Tensor& x, const std::vector<int64_t>& shape) {
    if (x.shape() != shape) unexpected(x, "a CPU tensor of shape " + text(shape));
}

inline bool wrong_count(Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return false;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, given);
    return true;
}

// One number per class, side by side in the type of the arithmetic: where it lies, or a copy.
struct ClassNumbers {
    void *copy = nullptr, *data = nullptr;
    ClassNumbers() = default;
    ClassNumbers(const ClassNumbers&) = delete;
    ~ClassNumbers() { std::free(copy); }

    // Returns their sum, in double.
    void read(const Tensor& x, int64_t C, bool doubles, double* sum = nullptr) {
        if (!x || PyErr_Occurred()) return;
        if (x.dl.ndim != 1 || x.dl.shape[0] != C || !x.soft()) return unexpected(x, "floating numbers of shape " + text({C}));
        const int64_t stride = x.dl.strides[0];
        if (sum) {
            *sum = 0;
            for (int64_t c = 0; c < C; ++c) *sum += number(x.data(), x.type, c * stride);
        }
        data = x.data();
        if (x.type == (doubles ? FLOAT64 : FLOAT32) && (stride == 1 || C == 1)) return;
        data = copy = std::malloc(size_t(C + 1) * (doubles ? 8 : 4));
        if (!copy) return void(PyErr_NoMemory());
        for (int64_t c = 0; c < C; ++c) {
            const double value = number(x.data(), x.type, c * stride);
            doubles ? void(static_cast<double*>(copy)[c] = value) : void(static_cast<float*>(copy)[c] = float(value));
        }
    }
};
