// The Python functions of a whole loss, a part of native.cpp.

// (..., Objective, class weights): what both calls go on with. Returns how the losses are reduced: 'n', 'm' or 's'.
char read_formula(Arguments& a, Read& c, ClassNumbers& row_weight) {
    PyObject* const objective = a.object();
    const Tensor weight = a.optional("weight");
    if (PyErr_Occurred()) return 0;
    if (!PyTuple_Check(objective) || PyTuple_Size(objective) != 6) {
        PyErr_SetString(PyExc_TypeError, "expected an Objective");
        return 0;
    }
    const auto is = [&](int at, const char* word) { return PyUnicode_CompareWithASCIIString(PyTuple_GetItem(objective, at), word) == 0; };
    Formula& f = c.formula;
    f.wanted = true;
    f.eps = PyFloat_AsDouble(PyTuple_GetItem(objective, 1)), f.z_loss = PyFloat_AsDouble(PyTuple_GetItem(objective, 2));
    f.empty = is(3, "zero");
    f.weight_sum = double(c.C);
    if (!c.soft()) row_weight.read(weight, c.C, true);
    if (c.soft() || f.eps > 0) c.class_weight.read(weight, c.C, c.doubles(), &f.weight_sum);
    f.row_weight = static_cast<double*>(row_weight.data);
    c.weight = c.class_weight.data;
    return is(0, "none") ? 'n' : is(0, "mean") ? 'm' : 's';
}

// What the gradient needs of the statistics, as doubles: lse, of probabilities mass, and in the type of the arithmetic top
// and, of indices, the targets' scores.
struct Numbers {
    int64_t top, picked, count;
    explicit Numbers(const Read& c) {
        const int64_t each = c.doubles() ? c.N : (c.N + 1) / 2;
        top = c.N * (1 + c.soft()), picked = top + each, count = picked + (c.soft() ? 0 : each);
    }
};

// (..., normalizer, and memory: numbers, value). What the gradient needs of the statistics goes to `numbers`, and the losses
// of the rows to `value`, or their sum over a divisor: the normalizer or, of a mean, the number of rows or the sum of their
// weights. Returns the divisor; or None if any target is no class.
PyObject* py_losses(PyObject*, PyObject* const* args, Py_ssize_t count) {
    Arguments a{args};
    Read c{};
    ClassNumbers row_weight;
    if (wrong_count(count, 10) || !read_call(a, c)) return nullptr;
    const char reduction = read_formula(a, c, row_weight);
    PyObject* const normalizer = a.object();
    double divisor = Arguments::number(normalizer, 1);
    const bool mean = reduction == 'm' && normalizer == Py_None, each = reduction == 'n';
    const Numbers at(c);
    c.lse = results<double>(a.tensor("numbers"), at.count, FLOAT64);
    const Tensor value = a.tensor("value");
    results<char>(value, each ? c.N : 1, value.type);
    if (PyErr_Occurred()) return nullptr;
    if (!c.fits) return Py_NewRef(Py_NotImplemented);
    c.saved = {c.lse + at.top, c.soft() ? nullptr : c.lse + at.picked, c.doubles() ? FLOAT64 : FLOAT32};
    c.mass = c.soft() ? c.lse + c.N : nullptr;
    if (each) c.formula.losses = value.data(), c.formula.losses_type = value.type;
    c.bad = &c.bad_target;
    Formula::Sums few[64] = {}, all = {};
    compute(c, [&] {
        cut(c);
        const int64_t tasks = (c.N / c.rows_per_task + 1) * c.parts;
        c.formula.sums = tasks <= 64 ? few : static_cast<Formula::Sums*>(std::calloc(size_t(tasks), sizeof *few));
        if (!c.formula.sums) return;
        statistics(c, c.dtype(), c.threads);
        for (int64_t i = 0; i < tasks; ++i) {
            const Formula::Sums& some = c.formula.sums[i];
            all.loss += some.loss, all.weight += some.weight, all.rows += some.rows;
        }
        if (c.formula.sums != few) std::free(c.formula.sums);
    });
    if (!c.formula.sums) return PyErr_NoMemory();
    if (mean) divisor = (row_weight.data ? all.weight : double(all.rows)) + (all.rows == 0 && c.formula.empty);
    if (mean && divisor == 0 && all.rows && c.formula.eps > 0) divisor = NAN;  // `sum_of_weights` of `_rows/objective.py`
    if (!each) write_number(all.loss / divisor, value.type, value.data());
    return c.bad_target ? Py_NewRef(Py_None) : PyFloat_FromDouble(divisor);
}

// (..., numbers, g, divisor, out, fresh)
PyObject* py_losses_gradient(PyObject*, PyObject* const* args, Py_ssize_t count) {
    Arguments a{args};
    Read c{};
    ClassNumbers row_weight;
    if (wrong_count(count, 12) || !read_call(a, c)) return nullptr;
    read_formula(a, c, row_weight);
    const Numbers at(c);
    const Type type = c.doubles() ? FLOAT64 : FLOAT32;
    const double* numbers = results<double>(a.tensor("numbers"), at.count, FLOAT64);
    c.lse_in = side_by_side(numbers, FLOAT64, c.N), c.formula.mass = side_by_side(numbers + c.N, FLOAT64, c.N);
    c.top_in = side_by_side(numbers + at.top, type, c.N);
    if (!c.soft()) c.picked_in = side_by_side(numbers + at.picked, type, c.N);
    const Tensor g = a.tensor("g");
    c.formula.g = per_row(c, g);
    c.formula.divisor = a.real();
    double share = 0;  // of all rows, where it is the same
    if (!PyErr_Occurred() && g.dl.ndim == 0) {
        share = c.formula.g[0] / c.formula.divisor;
        c.formula.g = the_same(&share, c.N), c.formula.divisor = 1;
    }
    return gradient(c, a);
}
