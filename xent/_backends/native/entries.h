// The Python functions of a sparse gradient: a part of native.cpp.

const SparseKernels& sparse_kernels() {
#if defined(__GNUC__) && defined(__x86_64__)
    if (kernels == &avx512::KERNELS) return avx512::SPARSE;
    if (kernels == &avx2::KERNELS) return avx2::SPARSE;
#endif
    return baseline::SPARSE;
}

// (..., top, lse, uniform, resolution, slots, and memory: classes, p, counts)
PyObject* py_samples(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 13)) return nullptr;
    Arguments a{args};
    Read read{};
    if (!read_call(a, read)) return nullptr;
    SampleCall c{};
    static_cast<Call&>(c) = read;
    c.top_in = per_row(read, a.tensor("top")), c.lse_in = per_row(read, a.tensor("lse"));
    c.uniform = results<double>(a.tensor("uniform"), c.N, FLOAT64);
    c.resolution = a.real(), c.slots = a.integer();
    c.classes = results<int32_t>(a.tensor("classes"), c.N * c.slots, INT32);
    c.kept = results<void>(a.tensor("p"), c.N * c.slots, read.doubles() ? FLOAT64 : FLOAT32);
    c.counts = results<int64_t>(a.tensor("counts"), c.N, INT64);
    if (!read.fits || c.logits.class_stride != 1) unexpected(read.x, "rows whose classes lie side by side");
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    c.rows_per_task = 1, c.parts = 1, c.classes_per_task = c.C;
    run(sparse_kernels().samples[read.dtype()], c, read.threads);
    pack(c, read.doubles() ? 8 : 4);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

// (N, C, float64?, addresses: ends, classes, coefficient, and of the results: ends, rows, coefficient)
PyObject* py_transpose(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 9)) return nullptr;
    Arguments a{args};
    const int64_t N = a.integer(), C = a.integer(), doubles = a.integer();
    const int64_t* ends = a.address<int64_t>();
    const int32_t* classes = a.address<int32_t>();
    const void* coefficient = a.address<void>();
    int64_t* class_ends = a.address<int64_t>();
    int32_t* rows = a.address<int32_t>();
    void* moved = a.address<void>();
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    const auto as = [&](auto F) {
        using Number = decltype(F);
        transpose(N, C, ends, classes, static_cast<const Number*>(coefficient), class_ends, rows, static_cast<Number*>(moved));
    };
    doubles ? as(double()) : as(float());
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

PyObject* py_gather_sums(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 12)) return nullptr;
    Arguments a{args};
    SumsCall c{};
    c.N = a.integer(), c.E = a.integer(), c.D = a.integer();
    c.ends = a.address<int64_t>(), c.index = a.address<int32_t>(), c.coefficient = a.address<void>();
    c.rows = a.address<void>(), c.stride = a.integer(), c.sums = a.address<void>(), c.out_kind = a.integer();
    const int64_t dtype = a.integer(), threads = a.integer();
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    c.rows_per_task = c.N / 1024 + 1, c.parts = 1, c.classes_per_task = 0;
    run(sparse_kernels().gather_sums[dtype], c, unsigned(threads));
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}
