// The Python functions of a sparse gradient: a part of native.cpp.

const SparseKernels& sparse_kernels() {
#if defined(__GNUC__) && defined(__x86_64__)
    if (kernels == &avx512::KERNELS) return avx512::SPARSE;
    if (kernels == &avx2::KERNELS) return avx2::SPARSE;
#endif
    return baseline::SPARSE;
}

PyObject* py_samples(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 29)) return nullptr;
    Arguments a{args};
    SampleCall c{};
    static_cast<Call&>(c) = read_call(a);
    const int64_t dtype = a.integer(), threads = a.integer();
    c.top_in = a.per_row(), c.lse_in = a.per_row();
    c.uniform = a.address<double>(), c.resolution = a.real(), c.slots = a.integer();
    c.classes = a.address<int32_t>(), c.kept = a.address<void>(), c.counts = a.address<int64_t>();
    if (unreadable(c, {c.top_in.data, c.lse_in.data, c.uniform, c.classes, c.kept, c.counts})) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    c.rows_per_task = 1, c.parts = 1, c.classes_per_task = c.C;
    run(sparse_kernels().samples[dtype], c, unsigned(threads));
    pack(c, dtype == 3 ? 8 : 4);
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
