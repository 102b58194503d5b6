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

// (ends, classes, coefficient, and memory: class ends, rows, coefficient of the transpose)
PyObject* py_transpose(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 6)) return nullptr;
    Arguments a{args};
    const Tensor given = a.tensor("ends"), entries = a.tensor("classes"), coefficient = a.tensor("coefficient");
    const Tensor found = a.tensor("class ends");
    const int64_t N = given.count(), C = found.count(), E = entries.count();
    const int64_t* ends = results<int64_t>(given, N, INT64);
    const int32_t* classes = results<int32_t>(entries, E, INT32);
    int64_t* class_ends = results<int64_t>(found, C, INT64);
    int32_t* rows = results<int32_t>(a.tensor("rows"), E, INT32);
    const auto as = [&](auto F, Type type) {
        using Number = decltype(F);
        const Number* from = results<Number>(coefficient, E, type);
        Number* to = results<Number>(a.tensor("moved"), E, type);
        if (PyErr_Occurred()) return;
        PyThreadState* state = PyEval_SaveThread();
        transpose(N, C, ends, classes, from, class_ends, rows, to);
        PyEval_RestoreThread(state);
    };
    coefficient.type == FLOAT64 ? as(double(), FLOAT64) : as(float(), FLOAT32);
    return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
}

// (ends, index, coefficient, rows, out, threads)
PyObject* py_gather_sums(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 6)) return nullptr;
    Arguments a{args};
    const Tensor ends = a.tensor("ends"), index = a.tensor("index"), coefficient = a.tensor("coefficient");
    const Tensor rows = a.tensor("rows"), out = a.tensor("out");
    const int64_t threads = a.integer();
    if (!PyErr_Occurred() && (rows.dl.ndim != 2 || rows.type < FLOAT32 || rows.dl.strides[1] != 1)) unexpected(rows, "floating rows, each side by side");
    if (PyErr_Occurred()) return nullptr;
    SumsCall c{};
    c.N = ends.count(), c.E = index.count(), c.D = rows.dl.shape[1], c.stride = rows.dl.strides[0];
    c.ends = results<int64_t>(ends, c.N, INT64), c.index = results<int32_t>(index, c.E, INT32);
    c.coefficient = results<void>(coefficient, c.E, rows.type == FLOAT64 ? FLOAT64 : FLOAT32);
    c.rows = rows.data(), c.sums = results<void>(out, c.N * c.D, out.type), c.out_kind = out.type - FLOAT32;
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    c.rows_per_task = c.N / 1024 + 1, c.parts = 1, c.classes_per_task = 0;
    run(sparse_kernels().gather_sums[rows.type - FLOAT32], c, unsigned(threads));
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}
