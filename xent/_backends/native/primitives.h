// The Python functions of the two primitives, a part of native.cpp.

// A call as it was read, and what it needs until it ends.
struct Read : Call {
    Tensor x, y;
    Layout layout;
    ClassNumbers class_weight;
    unsigned threads;
    std::atomic<bool> bad_target{false}, out_of_memory{false};
    bool fits = true;  // two strides lead to all rows of each tensor
    int dtype() const { return type - FLOAT32; }
    bool doubles() const { return type == FLOAT64; }
    int64_t bytes() const { return N * C * int64_t(doubles() ? 8 : type == FLOAT32 ? 4 : 2); }
};

// (logits, target, Layout, RowSpec, threads): what each call begins with. False with an exception set.
bool read_call(Arguments& a, Read& c) {
    c.x = a.tensor("logits"), c.y = a.tensor("target");
    PyObject *const layout = a.object(), *const spec = a.object();
    if (PyErr_Occurred()) return false;
    c.threads = unsigned(a.integer());
    if (!PyTuple_Check(layout) || PyTuple_Size(layout) != 3 || !PyTuple_Check(spec) || PyTuple_Size(spec) != 5) {
        PyErr_SetString(PyExc_TypeError, "expected a Layout and a RowSpec");
        return false;
    }
    const auto integer = [](PyObject* record, int at) { return PyLong_AsLongLong(PyTuple_GetItem(record, at)); };
    c.layout = {integer(layout, 0), integer(layout, 1), integer(layout, 2)};
    c.ignore_index = integer(spec, 0), c.start = integer(spec, 3);
    c.scale = PyFloat_AsDouble(PyTuple_GetItem(spec, 1)), c.softcap = Arguments::number(PyTuple_GetItem(spec, 2), 0);
    const auto [axis, A, B] = c.layout;
    const int ndim = c.x.dl.ndim;
    c.N = A * B, c.type = c.x.type, c.target_kind = c.y.type;
    if (!PyErr_Occurred() && (axis < 0 || axis >= ndim || c.type < FLOAT32)) unexpected(c.x, "floating logits with the classes in dimension " + std::to_string(axis));
    if (PyErr_Occurred()) return false;
    c.C = c.x.dl.shape[axis];
    c.classes = Arguments::integer(PyTuple_GetItem(spec, 4), c.start + c.C);
    if (c.C * c.N != c.x.count()) unexpected(c.x, text({A, B}) + " rows");
    const bool several = c.y.dl.ndim == ndim;
    const int64_t K = several ? c.y.dl.shape[axis] : 1;
    if (c.y.type == NO_TYPE) unexpected(c.y, "int64 or int32 indices, or probabilities");
    if (c.y.soft()) expect(c.y, c.x.shape());
    if (c.y.shape(several ? axis : -1) != c.x.shape(axis) || K < 1) expect(c.y, c.x.shape(axis));
    if (several && !c.soft()) c.candidates.K = K;
    c.fits = find_rows(c.x, axis, A, B, c.logits) && find_rows(c.y, several ? axis : -1, A, B, c.target);
    if (c.threads > 1 && c.N * c.C < THREADED) c.threads = 1;
    return !PyErr_Occurred();
}

bool read_class_weight(Arguments& a, Read& c) {
    c.class_weight.read(a.optional("class_weight"), c.C, c.doubles());
    c.weight = c.class_weight.data;
    return !PyErr_Occurred();
}

// One number per row of a tensor that has the shape of the positions, or is one number for all.
PerRow per_row(Read& c, const Tensor& x) {
    PerRow found{};
    if (!x || PyErr_Occurred()) return found;
    if (!x.soft()) unexpected(x, "floating numbers");
    if (x.dl.ndim > 0) expect(x, c.x.shape(c.layout.axis));
    if (PyErr_Occurred()) return found;
    found.data = x.data(), found.type = x.type;
    if (x.dl.ndim > 0) c.fits &= find_rows(x, -1, c.layout.A, c.layout.B, found.at);
    found.at.B = c.layout.B;
    return found;
}

// Memory for numbers of rows, side by side; or what was written there.
template <class T>
T* results(const Tensor& x, int64_t count, Type type) {
    if (x && !PyErr_Occurred() && (x.type != type || x.count() != count || !x.side_by_side()))
        unexpected(x, std::to_string(count) + " numbers side by side");
    const int64_t bytes = x ? count * x.dl.dtype.bits / 8 : 0;
    if (bytes >= HUGE_PAGES) advise_huge_pages(Pages(x.data(), bytes));
    return reinterpret_cast<T*>(x.data());
}

// Other Python threads run during a call that takes its time.
template <class F>
void compute(const Call& c, F run) {
    PyThreadState* state = c.N * c.C > TINY ? PyEval_SaveThread() : nullptr;
    run();
    if (state) PyEval_RestoreThread(state);
}

// (..., class_weight, and memory for: top, lse, picked, mass, wsum, entropy, argmax). Returns whether any target is no class.
PyObject* py_statistics(PyObject*, PyObject* const* args, Py_ssize_t count) {
    Arguments a{args};
    Read c{};
    if (wrong_count(count, 13) || !read_call(a, c) || !read_class_weight(a, c)) return nullptr;
    const int64_t N = c.N, K = c.candidates.K;
    c.top = results<double>(a.tensor("top"), N, FLOAT64), c.lse = results<double>(a.tensor("lse"), N, FLOAT64);
    double* picked = results<double>(a.tensor("picked"), K ? N * K : N, FLOAT64);
    K ? c.candidates.scores = picked : c.picked = picked;
    c.top_in = side_by_side(c.top, FLOAT64, N);
    c.mass = results<double>(a.optional("mass"), N, FLOAT64), c.wsum = results<double>(a.optional("wsum"), N, FLOAT64);
    c.entropy = results<double>(a.optional("entropy"), N, FLOAT64), c.argmax = results<int64_t>(a.optional("argmax"), N, INT64);
    if (PyErr_Occurred()) return nullptr;
    if (!c.fits) return Py_NewRef(Py_NotImplemented);
    c.bad = &c.bad_target;
    compute(c, [&] {
        cut(c);
        statistics(c, c.dtype(), c.threads);
    });
    return PyBool_FromLong(c.bad_target);
}

// The rest of a gradient: (..., out, whether it is fresh).
PyObject* gradient(Read& c, Arguments& a) {
    const Tensor out = a.tensor("out");
    const bool fresh = a.integer() != 0;
    if (out.type != c.type) unexpected(out, "the dtype of the logits");
    expect(out, c.x.shape());
    if (PyErr_Occurred()) return nullptr;
    if (!find_rows(out, c.layout.axis, c.layout.A, c.layout.B, c.out) || !c.fits) return Py_NewRef(Py_NotImplemented);
    c.no_memory = &c.out_of_memory;
    double* const scores = static_cast<double*>(std::malloc(size_t(c.N * c.candidates.K + 1) * sizeof *scores));
    c.candidates.scores = scores;
    if (scores) compute(c, [&] {
        cut(c);
        prepare_out(c, c.bytes(), fresh);
        pass_of_candidates(kernels->pick[c.dtype()], c, c.threads);
        run(kernels->gradient[c.dtype()], c, c.threads, true);
        pass_of_candidates(kernels->put[c.dtype()], c, c.threads);
    });
    std::free(scores);
    if (c.out_of_memory || !scores) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

// (..., class_weight, top, lse, g_lse, g_picked, g_wsum, g_entropy, out, fresh)
PyObject* py_gradient(PyObject*, PyObject* const* args, Py_ssize_t count) {
    Arguments a{args};
    Read c{};
    if (wrong_count(count, 14) || !read_call(a, c) || !read_class_weight(a, c)) return nullptr;
    c.top_in = per_row(c, a.tensor("top")), c.lse_in = per_row(c, a.tensor("lse")), c.g_lse = per_row(c, a.tensor("g_lse"));
    const Tensor g_picked = a.tensor("g_picked");
    const double none = 0;
    if (c.candidates.K) {
        expect(g_picked, c.y.shape());
        c.candidates.g = results<double>(g_picked, c.N * c.candidates.K, FLOAT64);
        c.g_picked = the_same(&none, c.N);
    } else {
        c.g_picked = per_row(c, g_picked);
    }
    c.g_wsum = per_row(c, a.optional("g_wsum")), c.g_entropy = per_row(c, a.optional("g_entropy"));
    return gradient(c, a);
}
