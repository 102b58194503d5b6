// The Python functions of a linear head: a part of native.cpp.

const HeadKernels& head_kernels() {
#if defined(__GNUC__) && defined(__x86_64__)
    if (kernels == &avx512::KERNELS) return avx512::HEAD;
    if (kernels == &avx2::KERNELS) return avx2::HEAD;
#endif
    return baseline::HEAD;
}

// (hidden, head, out, threads): NotImplemented where others do it.
PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 4)) return nullptr;
    Arguments a{args};
    const Tensor hidden = a.tensor("hidden"), head = a.tensor("head"), out = a.tensor("out");
    const int64_t threads = a.integer();
    const Type type = head.type == FLOAT64 ? FLOAT64 : FLOAT32;
    if (PyErr_Occurred()) return nullptr;
    if (hidden.dl.ndim != 2 || head.dl.ndim != 2 || hidden.dl.shape[1] != head.dl.shape[1]) unexpected(hidden, "rows as wide as those of the head");
    LinearCall c{};
    c.N = head.dl.shape[0], c.n = hidden.dl.shape[0], c.D = head.dl.shape[1], c.stride = head.dl.strides[0];
    expect(out, {c.n, c.N});
    if (PyErr_Occurred()) return nullptr;
    const HeadKernels& of = head_kernels();
    if (!of.panel_bytes || !head.soft() || hidden.type != head.type || out.type != type || head.dl.strides[1] != 1) return Py_NewRef(Py_NotImplemented);
    const auto matrix = [](const Tensor& x) { return Matrix{x.data(), x.dl.shape[0], 0, x.dl.strides[0], x.dl.strides[1]}; };
    const int64_t panel = of.panel_bytes / (type == FLOAT64 ? 8 : 4), panels = (c.n + panel - 1) / panel;
    void* memory = std::malloc(size_t((panels * c.D + 1) * of.panel_bytes));
    if (!memory) return PyErr_NoMemory();
    c.logits = matrix(hidden), c.out = matrix(out), c.head = head.data();
    c.panels = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) / 64 + 1) * 64);  // whole cache lines
    PyThreadState* state = PyEval_SaveThread();
    LinearCall pack = c;
    pack.N = panels, pack.rows_per_task = pack.parts = 1;
    run(of.pack_panel[head.type - FLOAT32], pack, unsigned(threads));
    c.rows_per_task = HEAD_CLASSES, c.parts = 1;
    run(of.linear[head.type - FLOAT32], c, unsigned(threads));
    PyEval_RestoreThread(state);
    std::free(memory);
    Py_RETURN_NONE;
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
    run(head_kernels().samples[read.dtype()], c, read.threads);
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
    run(head_kernels().gather_sums[rows.type - FLOAT32], c, unsigned(threads));
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}
