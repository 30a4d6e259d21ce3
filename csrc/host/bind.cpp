// HostArena and DiskFile as Python sees them. Everything that may wait does so without the GIL.
#include "bind.h"

#include <memory>
#include <string>

#include "arena.h"
#include "disk.h"

namespace py = pybind11;

namespace cgpt {
namespace {

// A path as the system's bytes: str, bytes or os.PathLike, without a zero in it.
std::string path_of(const py::object& path) {
    PyObject* bytes = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), &bytes)) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(bytes);
}

py::str text_of(const std::string& path) {
    PyObject* text = PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<py::ssize_t>(path.size()));
    if (text == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(text);
}

// The memory of any object that has the buffer protocol, kept where it is for as long as this lives.
class Memory {
  public:
    Memory(const char* call, const py::object& from, bool writable) {
        if (PyObject_GetBuffer(from.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) == 0) return;
        PyErr_Clear();
        const std::string kind = writable ? "writable contiguous memory" : "contiguous memory";
        const bool has_memory = PyObject_CheckBuffer(from.ptr());
        const std::string message = std::string(call) + ": buffer must be " + kind + ", got " +
                                    (has_memory ? "other memory of a " : "") + Py_TYPE(from.ptr())->tp_name;
        if (has_memory) throw py::value_error(message);
        throw py::type_error(message);
    }
    ~Memory() { PyBuffer_Release(&view_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return view_.buf; }
    int64_t nbytes() const { return view_.len; }

  private:
    Py_buffer view_{};
};

void read(const DiskFile& file, int64_t offset, const py::object& buffer) {
    const Memory memory("DiskFile.read", buffer, true);
    const py::gil_scoped_release nogil;
    file.read(offset, memory.data(), memory.nbytes());
}

void write(DiskFile& file, int64_t offset, const py::object& buffer) {
    const Memory memory("DiskFile.write", buffer, false);
    const py::gil_scoped_release nogil;
    file.write(offset, memory.data(), memory.nbytes());
}

std::unique_ptr<DiskFile> open(const py::object& path, int64_t nbytes, const std::string& identity, bool direct) {
    const std::string name = path_of(path);
    const py::gil_scoped_release nogil;
    return std::make_unique<DiskFile>(name, nbytes, identity, direct);
}

py::object or_none(const std::string& text) { return text.empty() ? py::none() : py::object(text_of(text)); }

}  // namespace

void bind_host(py::module_& m) {
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const FileError& e) {
            const py::object arguments = py::make_tuple(e.code, e.what(), text_of(e.path));
            PyErr_SetObject(PyExc_OSError, arguments.ptr());
        }
    });
    const auto nogil = py::call_guard<py::gil_scoped_release>();

    // module_local: the emulator's build of this module lives in the same process.
    // The memory lives as long as the last object that exports it, so there is no close(): a tensor of
    // torch.frombuffer holds on to the arena, not to its buffer.
    py::class_<HostArena>(m, "HostArena", py::buffer_protocol(), py::module_local(),
                          "nbytes of host memory, zero, between two guard pages; see csrc/host/arena.h. "
                          "torch.frombuffer(arena, dtype=torch.uint8) is all of it.")
        .def(py::init<int64_t>(), py::arg("nbytes"), nogil)
        .def_buffer([](HostArena& a) {
            return py::buffer_info(a.data(), 1, py::format_descriptor<uint8_t>::format(), a.nbytes());
        })
        .def("register_cuda", &HostArena::register_cuda, py::arg("device") = 0, nogil,
             "Pins the memory from its start; returns how many bytes are. why_not_pinned says why not all.")
        .def_property_readonly("address", [](const HostArena& a) { return reinterpret_cast<uintptr_t>(a.data()); })
        .def_property_readonly("nbytes", &HostArena::nbytes)
        .def_property_readonly("mapped_bytes", &HostArena::mapped_bytes)
        .def_property_readonly("huge_pages", &HostArena::huge_pages)
        .def_property_readonly("pinned_bytes", py::cpp_function(&HostArena::pinned_bytes, nogil))
        .def_property_readonly("why_not_pinned", [](const HostArena& a) {
            std::string why;
            {
                const py::gil_scoped_release waiting;
                why = a.why_not_pinned();
            }
            return or_none(why);
        });

    py::class_<DiskFile>(m, "DiskFile", py::module_local(),
                         "A preallocated file of nbytes of records behind a checked header; see csrc/host/disk.h.")
        .def(py::init(&open), py::arg("path"), py::arg("nbytes"), py::arg("identity"), py::arg("direct") = true)
        .def("read", &read, py::arg("offset"), py::arg("buffer"), "Fills the buffer from `offset`, a multiple of 4096.")
        .def("write", &write, py::arg("offset"), py::arg("buffer"),
             "Writes the buffer at `offset`, a multiple of 4096.")
        .def("sync", &DiskFile::sync, nogil, "Returns once the disk has what was written.")
        .def("close", &DiskFile::close, nogil, "Waits for calls under way; again, it does nothing.")
        .def_property_readonly("path", [](const DiskFile& f) { return text_of(f.path()); })
        .def_property_readonly("identity", &DiskFile::identity)
        .def_property_readonly("nbytes", &DiskFile::nbytes)
        .def_property_readonly("created", &DiskFile::created)
        .def_property_readonly("direct", &DiskFile::direct)
        .def_property_readonly("why_buffered", [](const DiskFile& f) { return or_none(f.why_buffered()); })
        .def_property_readonly("closed", &DiskFile::closed);
}

}  // namespace cgpt
