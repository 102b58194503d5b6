// The Python functions that compute nothing for users, a part of native.cpp: the threads, and what tests ask for.

// Take the type of tensors, torch.Tensor, and from it the table of functions to read them.
PyObject* py_use_tensors(PyObject*, PyObject* type) {
    PyObject* const capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (!capsule) return nullptr;
    exchange = static_cast<const ExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (!exchange) return nullptr;
    if (exchange->header.major != 1 || !exchange->borrow)
        return PyErr_Format(PyExc_ImportError, "expected version 1 of DLPack, got %u", exchange->header.major);
    tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));
    Py_RETURN_NONE;
}

// (address of the entry point, whether it is kmpc's, address of omp_get_thread_num)
PyObject* py_use_openmp(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 3)) return nullptr;
    Arguments a{args};
    void* const address = a.address<void>();
    const bool kmpc = PyObject_IsTrue(a.object()) == 1;
    void* const number = a.address<void>();
    if (PyErr_Occurred()) return nullptr;
    gomp_parallel = kmpc ? nullptr : bits<decltype(gomp_parallel)>(address);
    kmpc_fork_call = kmpc ? bits<decltype(kmpc_fork_call)>(address) : nullptr;
    thread_number = bits<decltype(thread_number)>(number);
    Py_RETURN_NONE;
}

PyObject* py_instruction_sets(PyObject*, PyObject*) {
    const Kernels* sets[3];
    const int n = available(sets);
    PyObject* names = PyTuple_New(n);
    for (int i = 0; names && i < n; ++i) PyTuple_SetItem(names, i, PyUnicode_FromString(sets[i]->name));
    return names;
}

// Take the instruction set of this name; returns the name of the one in use before. For tests.
PyObject* py_use(PyObject*, PyObject* name) {
    const Kernels* sets[3];
    const Kernels* before = kernels;
    for (int i = available(sets) - 1; i >= 0; --i)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, sets[i]->name) == 0) {
            kernels = sets[i];
            return PyUnicode_FromString(before->name);
        }
    return PyErr_Format(PyExc_ValueError, "expected an instruction set of this machine, got %R", name);
}

// Whether memory has its pages already, for tests: (address, bytes)
PyObject* py_resident(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_count(count, 2)) return nullptr;
    Arguments a{args};
    void* data = a.address<void>();
    const int64_t bytes = a.integer();
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(resident(Pages(data, bytes)));
}
