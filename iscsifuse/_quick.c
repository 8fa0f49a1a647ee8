/* Short cuts through what a small READ does most often. What they are for: iscsifuse/quick.py.
 *
 * Rules of this file:
 *
 * - Look first, then act. While a function looks it changes nothing, and where anything is unusual (a type, a number, a
 *   state) it says so, and the Python goes on. Only a lack of memory can interrupt the acting, and that is raised.
 * - Nothing is kept but where the slots of some Python classes are. A slot is only touched in an object of exactly the
 *   class that it was found in; an empty one counts as unusual.
 * - Buffers are borrowed for the length of a copy. Lengths are compared before, in types that can't overflow.
 * - No Python code runs while something is half done: what is decref'd in slots are numbers and None, and the only
 *   thing that is called is a task's waiter, last.
 *
 * Sources: RFC 7143 §4.2.2, §11.3, §11.7; SBC-3 §5.11.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stdint.h>
#include <string.h>

#if defined(Py_GIL_DISABLED) || defined(PYPY_VERSION)
#error "made for CPython with its lock; iscsifuse works without this module"
#endif

#define BHS_LENGTH 48
#define HALF 0x80000000u
#define RESERVED_TAG 0xFFFFFFFFu
#define MOST_BLOCKS_10 0xFFFFll
#define END_10 0x100000000ll
#define SCSI_COMMAND 0x01
#define DATA_IN 0x25
#define FINAL_READ_SIMPLE (0x80 | 0x40 | 0x01)
#define FINAL_STATUS (0x80 | 0x01)
#define READ_10 0x28
#define READ_10_LENGTH 10

/* -- slots of Python classes -------------------------------------------------------------------------------------- */

enum {
    T_CDB, T_LUN, T_BUFFER_IN, T_BUFFER_OUT, T_EXACT, T_EXPECTED, T_ITT, T_CMD_SN, T_NEXT_DATA_SN, T_NEXT_R2T_SN,
    T_RECEIVED, T_SOLICITED, T_AHEAD, T_ASKED, T_STATUS, T_SENSE, T_RESIDUAL, T_UNDERFLOW, T_OVERFLOW, T_ERROR, T_DONE,
    T_STARTED, T_WAITER, T_SLOTS
};
enum { W_CMD_SN, W_EXP_CMD_SN, W_MAX_CMD_SN, W_SLOTS };
enum { N_EXP_STAT_SN, N_NEXT_ITT, N_SLOTS };
enum { R_CALLS, R_BYTES, R_TOTAL, R_MINIMUM, R_MAXIMUM, R_SLOTS };
enum { C_START, C_END, C_CONTINUED, C_SLOTS };
enum { S_BEHIND, S_SLOTS };
enum { O_CANDIDATES, O_STARTS, O_COUNT, O_IS_FAR, O_SLOTS };
#define MOST_SLOTS 32

typedef struct {
    const char *name;
    const char *slots[MOST_SLOTS]; /* all that the class has, where objects of it are made here */
    PyTypeObject *type;            /* NULL: not bound yet */
    Py_ssize_t at[MOST_SLOTS];     /* offsets */
} Known;

static Known tasks_class = {
    .name = "Task",
    .slots = {"cdb", "lun", "buffer_in", "buffer_out", "exact", "expected", "itt", "cmd_sn", "next_data_sn",
              "next_r2t_sn", "received", "solicited", "_ahead", "_asked", "status", "sense", "residual", "underflow",
              "overflow", "error", "done", "started", "waiter"},
};
static Known windows_class = {.name = "CommandWindow", .slots = {"cmd_sn", "exp_cmd_sn", "max_cmd_sn"}};
static Known numbers_class = {.name = "Numbers", .slots = {"exp_stat_sn", "next_itt"}};
static Known rows_class = {.name = "CommandRow", .slots = {"calls", "bytes", "total", "minimum", "maximum"}};
static Known candidates_class = {.name = "Candidate", .slots = {"start", "end", "continued"}};
static Known streams_class = {.name = "Stream", .slots = {"behind"}};
static Known others_class = {.name = "RandomReads", .slots = {"candidates", "starts", "count", "is_far"}};
static Known *const all_known[] = {
    &tasks_class, &windows_class, &numbers_class, &rows_class, &candidates_class, &streams_class, &others_class,
};

static PyObject *zero, *one, *minus_one, *no_bytes, *read_10;

static inline int is_a(PyObject *object, const Known *known)
{
    return known->type != NULL && Py_IS_TYPE(object, known->type);
}

static inline PyObject **slot(PyObject *object, const Known *known, int index)
{
    return (PyObject **)((char *)object + known->at[index]);
}

/* Borrowed; NULL where the slot is empty. */
static inline PyObject *get(PyObject *object, const Known *known, int index)
{
    return *slot(object, known, index);
}

static inline void set(PyObject *object, const Known *known, int index, PyObject *value)
{
    PyObject **place = slot(object, known, index), *old = *place;
    *place = Py_NewRef(value);
    Py_XDECREF(old);
}

static inline int is_int(PyObject *value) { return value != NULL && PyLong_CheckExact(value); }
static inline int is_float(PyObject *value) { return value != NULL && PyFloat_CheckExact(value); }

/* Whether a slot has a number of 32 bits, and which. */
static int get_32(PyObject *object, const Known *known, int index, uint32_t *result)
{
    PyObject *value = get(object, known, index);
    if (!is_int(value))
        return 0;
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    *result = (uint32_t)number;
    return !overflow && number >= 0 && number <= 0xFFFFFFFFll;
}

/* Whether an object is an int that isn't negative, and which. */
static int to_size(PyObject *value, long long *result)
{
    int overflow = 0;
    *result = is_int(value) ? PyLong_AsLongLongAndOverflow(value, &overflow) : -1;
    return !overflow && *result >= 0;
}

static inline uint32_t load_32(const unsigned char *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline void store_32(unsigned char *p, uint32_t number)
{
    p[0] = (unsigned char)(number >> 24);
    p[1] = (unsigned char)(number >> 16);
    p[2] = (unsigned char)(number >> 8);
    p[3] = (unsigned char)number;
}

static PyObject *wrong_arguments(const char *function)
{
    return PyErr_Format(PyExc_TypeError, "%s was called with other arguments than it knows", function);
}

/* The four parts of a connection's state, in this order. */
typedef struct {
    PyObject *window, *numbers, *tasks, *requests;
} State;

static int to_state(PyObject *tuple, State *state)
{
    if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 4)
        return 0;
    state->window = PyTuple_GET_ITEM(tuple, 0);
    state->numbers = PyTuple_GET_ITEM(tuple, 1);
    state->tasks = PyTuple_GET_ITEM(tuple, 2);
    state->requests = PyTuple_GET_ITEM(tuple, 3);
    return is_a(state->window, &windows_class) && is_a(state->numbers, &numbers_class) &&
           PyDict_CheckExact(state->tasks) && PyDict_CheckExact(state->requests) && tasks_class.type != NULL;
}

/* -- start_read --------------------------------------------------------------------------------------------------- */

/* Bytes of a buffer; -1 (and no exception) where it is none, or not contiguous. */
static Py_ssize_t length_of(PyObject *buffer)
{
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) < 0) {
        PyErr_Clear();
        return -1;
    }
    Py_ssize_t length = view.len;
    PyBuffer_Release(&view);
    return length;
}

/* A task as `Task.__init__` and `Connection._send_command` leave it. */
static PyObject *make_task(PyObject *cdb, PyObject *lun, PyObject *buffer, PyObject *expected, PyObject *itt,
                           PyObject *cmd_sn, PyObject *started)
{
    PyObject *ahead = PyList_New(0);
    PyObject *task = ahead == NULL ? NULL : tasks_class.type->tp_alloc(tasks_class.type, 0);
    if (task != NULL) {
        PyObject *const values[T_SLOTS] = {
            [T_CDB] = cdb, [T_LUN] = lun, [T_BUFFER_IN] = buffer, [T_BUFFER_OUT] = Py_None, [T_EXACT] = Py_True,
            [T_EXPECTED] = expected, [T_ITT] = itt, [T_CMD_SN] = cmd_sn, [T_NEXT_DATA_SN] = zero,
            [T_NEXT_R2T_SN] = zero, [T_RECEIVED] = zero, [T_SOLICITED] = zero, [T_AHEAD] = ahead, [T_ASKED] = zero,
            [T_STATUS] = minus_one, [T_SENSE] = no_bytes, [T_RESIDUAL] = zero, [T_UNDERFLOW] = Py_False,
            [T_OVERFLOW] = Py_False, [T_ERROR] = Py_None, [T_DONE] = Py_False, [T_STARTED] = started,
            [T_WAITER] = Py_None,
        };
        for (int i = 0; i < T_SLOTS; i++)
            set(task, &tasks_class, i, values[i]);
    }
    Py_XDECREF(ahead);
    return task;
}

/* start_read(state, lun, lba, blocks, buffer, started): (task, header), or None where something is unusual. */
static PyObject *start_read(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    State state;
    if (count != 6 || !to_state(args[0], &state) || !PyBytes_CheckExact(args[1]) || !PyFloat_CheckExact(args[5]))
        return wrong_arguments("start_read");
    PyObject *lun = args[1], *buffer = args[4];
    long long lba, blocks;
    uint32_t cmd_sn, max_cmd_sn, itt, stat_sn;
    if (PyBytes_GET_SIZE(lun) != 8 || !to_size(args[2], &lba) || !to_size(args[3], &blocks) || blocks == 0 ||
        blocks > MOST_BLOCKS_10 || lba > END_10 - blocks || !PyMemoryView_Check(buffer) ||
        !get_32(state.window, &windows_class, W_CMD_SN, &cmd_sn) ||
        !get_32(state.window, &windows_class, W_MAX_CMD_SN, &max_cmd_sn) ||
        !get_32(state.numbers, &numbers_class, N_NEXT_ITT, &itt) ||
        !get_32(state.numbers, &numbers_class, N_EXP_STAT_SN, &stat_sn) || max_cmd_sn - cmd_sn >= HALF ||
        itt == RESERVED_TAG)
        Py_RETURN_NONE;
    Py_ssize_t expected = length_of(buffer);
    if (expected <= 0 || (unsigned long long)expected > 0xFFFFFFFFull)
        Py_RETURN_NONE;

    unsigned char header[BHS_LENGTH] = {SCSI_COMMAND, FINAL_READ_SIMPLE};
    memcpy(header + 8, PyBytes_AS_STRING(lun), 8);
    store_32(header + 16, itt);
    store_32(header + 20, (uint32_t)expected);
    store_32(header + 24, cmd_sn);
    store_32(header + 28, stat_sn);
    unsigned char *const cdb = header + 32;
    cdb[0] = READ_10;
    store_32(cdb + 2, (uint32_t)lba);
    cdb[7] = (unsigned char)(blocks >> 8);
    cdb[8] = (unsigned char)blocks;

    PyObject *result = NULL, *task = NULL;
    PyObject *py_itt = PyLong_FromUnsignedLong(itt), *next_itt = PyLong_FromUnsignedLong((uint32_t)(itt + 1));
    PyObject *py_sn = PyLong_FromUnsignedLong(cmd_sn), *next_sn = PyLong_FromUnsignedLong((uint32_t)(cmd_sn + 1));
    PyObject *py_expected = PyLong_FromSsize_t(expected);
    PyObject *py_header = PyBytes_FromStringAndSize((char *)header, BHS_LENGTH);
    PyObject *py_cdb = PyBytes_FromStringAndSize((char *)cdb, READ_10_LENGTH);
    if (py_itt == NULL || next_itt == NULL || py_sn == NULL || next_sn == NULL || py_expected == NULL ||
        py_header == NULL || py_cdb == NULL)
        goto end;
    int used = PyDict_Contains(state.tasks, py_itt);
    if (used == 0)
        used = PyDict_Contains(state.requests, py_itt);
    if (used != 0) { /* the tags have come round, and this one is still in use: `new_itt` finds another */
        result = used > 0 ? Py_NewRef(Py_None) : NULL;
        goto end;
    }
    task = make_task(py_cdb, lun, buffer, py_expected, py_itt, py_sn, args[5]);
    if (task == NULL)
        goto end;
    result = PyTuple_Pack(2, task, py_header);
    if (result == NULL || PyDict_SetItem(state.tasks, py_itt, task) < 0) {
        Py_CLEAR(result);
        goto end;
    }
    set(state.window, &windows_class, W_CMD_SN, next_sn);
    set(state.numbers, &numbers_class, N_NEXT_ITT, next_itt);
end:
    Py_XDECREF(task);
    Py_XDECREF(py_itt);
    Py_XDECREF(next_itt);
    Py_XDECREF(py_sn);
    Py_XDECREF(next_sn);
    Py_XDECREF(py_expected);
    Py_XDECREF(py_header);
    Py_XDECREF(py_cdb);
    return result;
}

/* -- take_reads --------------------------------------------------------------------------------------------------- */

/* `CommandWindow.update`: 0, or -1 with an exception. */
static int update_window(PyObject *window, uint32_t exp_cmd_sn, uint32_t max_cmd_sn)
{
    uint32_t cmd_sn, exp, max;
    if (!get_32(window, &windows_class, W_CMD_SN, &cmd_sn) || !get_32(window, &windows_class, W_EXP_CMD_SN, &exp) ||
        !get_32(window, &windows_class, W_MAX_CMD_SN, &max)) {
        PyErr_SetString(PyExc_TypeError, "a command window without numbers");
        return -1;
    }
    uint32_t behind = exp_cmd_sn - 1 - max_cmd_sn, ahead = exp_cmd_sn - exp, more = max_cmd_sn - max;
    if (behind > 0 && behind < HALF)
        return 0;
    if (ahead > 0 && ahead < HALF && cmd_sn - exp_cmd_sn < HALF) {
        PyObject *value = PyLong_FromUnsignedLong(exp_cmd_sn);
        if (value == NULL)
            return -1;
        set(window, &windows_class, W_EXP_CMD_SN, value);
        Py_DECREF(value);
    }
    if (more > 0 && more < HALF) {
        PyObject *value = PyLong_FromUnsignedLong(max_cmd_sn);
        if (value == NULL)
            return -1;
        set(window, &windows_class, W_MAX_CMD_SN, value);
        Py_DECREF(value);
    }
    return 0;
}

/* Whether a task is a read that has just been sent, and expects so many bytes. */
static int expects(PyObject *task, uint32_t size)
{
    uint32_t expected;
    return is_a(task, &tasks_class) && get(task, &tasks_class, T_NEXT_DATA_SN) == zero &&
           get(task, &tasks_class, T_RECEIVED) == zero && get(task, &tasks_class, T_BUFFER_OUT) == Py_None &&
           get(task, &tasks_class, T_ERROR) == Py_None && get(task, &tasks_class, T_DONE) == Py_False &&
           get_32(task, &tasks_class, T_EXPECTED, &expected) && expected == size;
}

/* Whether the bytes could be put into a task's memory, which is exactly as long. */
static int fill(PyObject *task, const unsigned char *bytes, uint32_t size)
{
    PyObject *buffer = get(task, &tasks_class, T_BUFFER_IN);
    Py_buffer view;
    if (buffer == NULL || PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) < 0) {
        PyErr_Clear();
        return 0;
    }
    int fits = view.len == (Py_ssize_t)size;
    if (fits)
        memcpy(view.buf, bytes, size);
    PyBuffer_Release(&view);
    return fits;
}

/* Take in the first frame, if it is all there, brings all bytes of a read, and says that it ended well: its length. 0
 * where it doesn't; -1 with an exception. */
static Py_ssize_t take_read(const unsigned char *frame, Py_ssize_t there, long long most, const State *state,
                            PyObject *events)
{
    uint32_t stat_sn;
    if (there < BHS_LENGTH || frame[0] != DATA_IN || frame[1] != FINAL_STATUS || frame[3] != 0 || frame[4] != 0)
        return 0; /* nor where there is a residual, or another status, or additional headers */
    const uint32_t size = load_32(frame + 4); /* its highest byte is 0 */
    const Py_ssize_t length = BHS_LENGTH + (Py_ssize_t)((size + 3) & ~(uint32_t)3);
    if (size == 0 || size > most || there < length || load_32(frame + 36) != 0 || load_32(frame + 40) != 0)
        return 0; /* DataSN and Buffer Offset */
    if (!get_32(state->numbers, &numbers_class, N_EXP_STAT_SN, &stat_sn) || stat_sn != load_32(frame + 24))
        return 0;
    Py_ssize_t result = -1;
    PyObject *itt = PyLong_FromUnsignedLong(load_32(frame + 16)), *received = PyLong_FromUnsignedLong(size);
    PyObject *next = PyLong_FromUnsignedLong((uint32_t)(stat_sn + 1));
    PyObject *task = NULL;
    if (itt == NULL || received == NULL || next == NULL)
        goto end;
    task = PyDict_GetItemWithError(state->tasks, itt);
    if (task == NULL) {
        result = PyErr_Occurred() ? -1 : 0;
        goto end;
    }
    Py_INCREF(task);
    if (!expects(task, size) || !fill(task, frame + BHS_LENGTH, size)) {
        result = 0;
        goto end;
    }
    if (update_window(state->window, load_32(frame + 28), load_32(frame + 32)) < 0 ||
        PyDict_DelItem(state->tasks, itt) < 0 || PyList_Append(events, task) < 0)
        goto end;
    set(state->numbers, &numbers_class, N_EXP_STAT_SN, next);
    set(task, &tasks_class, T_NEXT_DATA_SN, one);
    set(task, &tasks_class, T_RECEIVED, received);
    set(task, &tasks_class, T_STATUS, zero);
    set(task, &tasks_class, T_DONE, Py_True);
    result = length;
end:
    Py_XDECREF(task);
    Py_XDECREF(itt);
    Py_XDECREF(received);
    Py_XDECREF(next);
    return result;
}

/* take_reads(state, staging, start, end, events, max_data): where the first frame begins that wasn't taken. */
static PyObject *take_reads(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    State state;
    long long start, end, most;
    if (count != 6 || !to_state(args[0], &state) || !to_size(args[2], &start) || !to_size(args[3], &end) ||
        !PyList_CheckExact(args[4]) || !to_size(args[5], &most))
        return wrong_arguments("take_reads");
    Py_buffer staging;
    if (PyObject_GetBuffer(args[1], &staging, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_ssize_t taken = -1;
    if (start > end || end > staging.len)
        PyErr_SetString(PyExc_ValueError, "take_reads was told to look beyond its buffer");
    else
        do {
            taken = take_read((const unsigned char *)staging.buf + start, (Py_ssize_t)(end - start), most, &state,
                              args[4]);
            if (taken > 0)
                start += taken;
        } while (taken > 0);
    PyBuffer_Release(&staging);
    return taken < 0 ? NULL : PyLong_FromLongLong(start);
}

/* -- end_reads ---------------------------------------------------------------------------------------------------- */

static int counts(PyObject *row)
{
    return row != NULL && is_a(row, &rows_class) && is_int(get(row, &rows_class, R_CALLS)) &&
           is_int(get(row, &rows_class, R_BYTES)) && is_float(get(row, &rows_class, R_TOTAL)) &&
           is_float(get(row, &rows_class, R_MINIMUM)) && is_float(get(row, &rows_class, R_MAXIMUM));
}

static int is_good_read(PyObject *task)
{
    if (!is_a(task, &tasks_class) || get(task, &tasks_class, T_STATUS) != zero ||
        get(task, &tasks_class, T_ERROR) != Py_None || !is_float(get(task, &tasks_class, T_STARTED)) ||
        !is_int(get(task, &tasks_class, T_RECEIVED)) || get(task, &tasks_class, T_BUFFER_OUT) != Py_None ||
        get(task, &tasks_class, T_WAITER) == NULL)
        return 0;
    PyObject *cdb = get(task, &tasks_class, T_CDB);
    return cdb != NULL && PyBytes_CheckExact(cdb) && PyBytes_GET_SIZE(cdb) == READ_10_LENGTH &&
           (unsigned char)PyBytes_AS_STRING(cdb)[0] == READ_10;
}

/* `CommandStatistics.count` for one that ended well: 0, or -1 with an exception. */
static int count_read(PyObject *row, PyObject *received, double seconds)
{
    const double total = PyFloat_AS_DOUBLE(get(row, &rows_class, R_TOTAL)) + seconds;
    const double minimum = PyFloat_AS_DOUBLE(get(row, &rows_class, R_MINIMUM));
    const double maximum = PyFloat_AS_DOUBLE(get(row, &rows_class, R_MAXIMUM));
    PyObject *values[] = {
        [R_CALLS] = PyNumber_Add(get(row, &rows_class, R_CALLS), one),
        [R_BYTES] = PyNumber_Add(get(row, &rows_class, R_BYTES), received),
        [R_TOTAL] = PyFloat_FromDouble(total),
        [R_MINIMUM] = PyFloat_FromDouble(seconds < minimum ? seconds : minimum),
        [R_MAXIMUM] = PyFloat_FromDouble(seconds > maximum ? seconds : maximum),
    };
    int complete = 1;
    for (int i = 0; i < R_SLOTS; i++)
        complete &= values[i] != NULL;
    for (int i = 0; i < R_SLOTS; i++) {
        if (complete)
            set(row, &rows_class, i, values[i]);
        Py_XDECREF(values[i]);
    }
    return complete ? 0 : -1;
}

/* Count a task, and call who waits for it: 0, or -1 with an exception. */
static int end_read(PyObject *task, PyObject *row, double seconds)
{
    if (count_read(row, get(task, &tasks_class, T_RECEIVED), seconds) < 0)
        return -1;
    PyObject *waiter = Py_NewRef(get(task, &tasks_class, T_WAITER));
    PyObject *nothing = Py_None;
    if (waiter != Py_None) {
        set(task, &tasks_class, T_WAITER, Py_None);
        nothing = PyObject_CallNoArgs(waiter);
        Py_XDECREF(nothing);
    }
    Py_DECREF(waiter);
    return nothing == NULL ? -1 : 0;
}

/* end_reads(events, rows, now): how many reads have ended well, the seconds of the quickest, and the other events. */
static PyObject *end_reads(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || !PyList_CheckExact(args[0]) || !PyDict_CheckExact(args[1]) || !PyFloat_CheckExact(args[2]))
        return wrong_arguments("end_reads");
    PyObject *const events = args[0];
    const double now = PyFloat_AS_DOUBLE(args[2]);
    double quickest = Py_HUGE_VAL;
    long ended = 0;
    PyObject *row = PyDict_GetItemWithError(args[1], read_10);
    if (row == NULL && PyErr_Occurred())
        return NULL;
    Py_XINCREF(row);
    PyObject *others = PyList_New(0);
    int failed = others == NULL;
    for (Py_ssize_t i = 0; !failed && i < PyList_GET_SIZE(events); i++) {
        PyObject *event = Py_NewRef(PyList_GET_ITEM(events, i));
        if (counts(row) && is_good_read(event)) {
            const double seconds = now - PyFloat_AS_DOUBLE(get(event, &tasks_class, T_STARTED));
            ended++;
            if (seconds < quickest)
                quickest = seconds;
            failed = end_read(event, row, seconds) < 0;
        } else
            failed = PyList_Append(others, event) < 0;
        Py_DECREF(event);
    }
    Py_XDECREF(row);
    if (failed) {
        Py_XDECREF(others);
        return NULL;
    }
    return Py_BuildValue("ldN", ended, quickest, others);
}

/* -- take_stray --------------------------------------------------------------------------------------------------- */

/* What a small read has to be compared with, and the limits: `BlockCache._tables_for_strays`, in this order. */
typedef struct {
    PyObject *others, *streams, *extents, *visited;
    long long slots, look_every, most, near, longest, extent_length, block_length;
    PyObject *candidates, *starts;
    long long count;
} Tables;

static int to_tables(PyObject *tuple, Tables *tables)
{
    if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 11)
        return 0;
    PyObject **const given = &PyTuple_GET_ITEM(tuple, 0);
    tables->others = given[0];
    tables->streams = given[1];
    tables->extents = given[2];
    tables->visited = given[3];
    return is_a(tables->others, &others_class) && PyDict_CheckExact(tables->streams) &&
           PyDict_CheckExact(tables->extents) && PyDict_CheckExact(tables->visited) &&
           to_size(given[4], &tables->slots) && to_size(given[5], &tables->look_every) &&
           to_size(given[6], &tables->most) && to_size(given[7], &tables->near) &&
           to_size(given[8], &tables->longest) && to_size(given[9], &tables->extent_length) &&
           to_size(given[10], &tables->block_length) && tables->look_every > 0 && tables->extent_length > 0 &&
           tables->block_length > 0 && candidates_class.type != NULL;
}

/* Whether nothing has to be looked at but the tables: the target isn't far, nor is it time to look whether it is. */
static int is_usual(Tables *tables)
{
    tables->candidates = get(tables->others, &others_class, O_CANDIDATES);
    tables->starts = get(tables->others, &others_class, O_STARTS);
    return tables->candidates != NULL && PyDict_CheckExact(tables->candidates) && tables->starts != NULL &&
           PyDict_CheckExact(tables->starts) &&
           to_size(get(tables->others, &others_class, O_COUNT), &tables->count) &&
           get(tables->others, &others_class, O_IS_FAR) == Py_False && tables->count % tables->look_every != 0;
}

/* Whether a request that begins at an offset may be one of a stream's. */
static int is_near(PyObject *streams, long long offset, long long near)
{
    PyObject *key, *stream;
    Py_ssize_t position = 0;
    while (PyDict_Next(streams, &position, &key, &stream)) {
        long long end, behind;
        if (!is_a(stream, &streams_class) || !to_size(key, &end) ||
            !to_size(get(stream, &streams_class, S_BEHIND), &behind))
            return 1;
        if (offset >= end ? offset - end <= near : end - offset <= behind)
            return 1;
    }
    return 0;
}

/* Whether one of two offsets is in a table; -1 with an exception. */
static int has_either(PyObject *table, PyObject *first, PyObject *second)
{
    int found = PyDict_Contains(table, first);
    return found ? found : PyDict_Contains(table, second);
}

/* Whether a read is of a place that somebody knows of; -1 with an exception. */
static int is_known(const Tables *tables, PyObject *index, PyObject *offset, PyObject *end)
{
    int found = PyDict_Contains(tables->extents, index);
    if (!found)
        found = PyDict_Contains(tables->visited, index);
    if (!found)
        found = has_either(tables->candidates, offset, end);
    return found ? found : has_either(tables->starts, offset, end);
}

/* `ReadAhead._make_room`: 0, or -1 with an exception. */
static int forget_oldest(PyObject *candidates, PyObject *starts)
{
    PyObject *key, *candidate;
    Py_ssize_t position = 0;
    if (!PyDict_Next(candidates, &position, &key, &candidate))
        return 0;
    if (!is_a(candidate, &candidates_class) || !is_int(get(candidate, &candidates_class, C_START))) {
        PyErr_SetString(PyExc_TypeError, "a candidate that is none");
        return -1;
    }
    Py_INCREF(key);
    Py_INCREF(candidate);
    PyObject *start = Py_NewRef(get(candidate, &candidates_class, C_START));
    int failed = PyDict_DelItem(candidates, key) < 0;
    if (!failed && PyDict_GetItemWithError(starts, start) == candidate)
        failed = PyDict_DelItem(starts, start) < 0;
    Py_DECREF(start);
    Py_DECREF(candidate);
    Py_DECREF(key);
    return failed || PyErr_Occurred() ? -1 : 0;
}

/* A candidate for a stream as `ReadAhead` makes one: 0, or -1 with an exception. */
static int remember(const Tables *tables, PyObject *offset, PyObject *end)
{
    if (PyDict_GET_SIZE(tables->candidates) >= tables->most && forget_oldest(tables->candidates, tables->starts) < 0)
        return -1;
    PyObject *count = PyLong_FromLongLong(tables->count + 1);
    PyObject *candidate = count == NULL ? NULL : candidates_class.type->tp_alloc(candidates_class.type, 0);
    int failed = candidate == NULL;
    if (!failed) {
        set(candidate, &candidates_class, C_START, offset);
        set(candidate, &candidates_class, C_END, end);
        set(candidate, &candidates_class, C_CONTINUED, zero);
        set(tables->others, &others_class, O_COUNT, count);
        failed = PyDict_SetItem(tables->candidates, end, candidate) < 0 ||
                 PyDict_SetItem(tables->starts, offset, candidate) < 0;
    }
    Py_XDECREF(candidate);
    Py_XDECREF(count);
    return failed ? -1 : 0;
}

/* `AsideReader.is_stray`: 0, or -1 with an exception. */
static int visit(const Tables *tables, PyObject *index)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;
    if (PyDict_GET_SIZE(tables->visited) >= tables->slots && PyDict_Next(tables->visited, &position, &key, &value)) {
        Py_INCREF(key);
        int failed = PyDict_DelItem(tables->visited, key) < 0;
        Py_DECREF(key);
        if (failed)
            return -1;
    }
    return PyDict_SetItem(tables->visited, index, Py_None);
}

/* So many zeros, which the result alone holds; NULL with an exception. */
static PyObject *new_memory(Py_ssize_t length)
{
    PyObject *bytes = PyByteArray_FromStringAndSize(NULL, length);
    if (bytes == NULL)
        return NULL;
    memset(PyByteArray_AS_STRING(bytes), 0, (size_t)length);
    PyObject *memory = PyMemoryView_FromObject(bytes);
    Py_DECREF(bytes);
    return memory;
}

/* take_stray(tables, offset, length, size): memory for a read that is near to nothing, which is remembered now; None
 * where it is any other one, and nothing has happened. */
static PyObject *take_stray(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Tables tables;
    long long offset, length, size;
    if (count != 4 || !to_tables(args[0], &tables) || !to_size(args[1], &offset) || !to_size(args[2], &length) ||
        !to_size(args[3], &size))
        return wrong_arguments("take_stray");
    if (length == 0 || length > tables.longest || length > size || offset > size - length ||
        offset % tables.block_length != 0 || length % tables.block_length != 0 ||
        length > tables.extent_length - offset % tables.extent_length || !is_usual(&tables) ||
        is_near(tables.streams, offset, tables.near))
        Py_RETURN_NONE;
    PyObject *result = NULL, *memory = NULL;
    PyObject *index = PyLong_FromLongLong(offset / tables.extent_length), *end = PyLong_FromLongLong(offset + length);
    if (index == NULL || end == NULL)
        goto end;
    const int known = is_known(&tables, index, args[1], end);
    if (known) {
        result = known < 0 ? NULL : Py_NewRef(Py_None);
        goto end;
    }
    memory = new_memory((Py_ssize_t)length);
    if (memory != NULL && remember(&tables, args[1], end) == 0 && visit(&tables, index) == 0)
        result = Py_NewRef(memory);
end:
    Py_XDECREF(memory);
    Py_XDECREF(index);
    Py_XDECREF(end);
    return result;
}

/* -- the module --------------------------------------------------------------------------------------------------- */

static int find_slots(PyTypeObject *type, Known *known)
{
    for (int i = 0; i < MOST_SLOTS && known->slots[i] != NULL; i++) {
        PyObject *descriptor = PyObject_GetAttrString((PyObject *)type, known->slots[i]);
        if (descriptor == NULL)
            return -1;
        int is_slot = Py_IS_TYPE(descriptor, &PyMemberDescr_Type) && PyDescr_TYPE(descriptor) == type &&
                      ((PyMemberDescrObject *)descriptor)->d_member->type == T_OBJECT_EX;
        if (is_slot)
            known->at[i] = ((PyMemberDescrObject *)descriptor)->d_member->offset;
        Py_DECREF(descriptor);
        if (!is_slot) {
            PyErr_Format(PyExc_TypeError, "%s.%s is no slot", known->name, known->slots[i]);
            return -1;
        }
    }
    return 0;
}

/* bind(cls): learn where the slots of a class are, which is known by its name. */
static PyObject *bind(PyObject *Py_UNUSED(module), PyObject *cls)
{
    if (!PyType_Check(cls))
        return wrong_arguments("bind");
    PyTypeObject *type = (PyTypeObject *)cls;
    for (size_t i = 0; i < sizeof all_known / sizeof *all_known; i++) {
        Known *known = all_known[i];
        if (strcmp(type->tp_name, known->name) != 0)
            continue;
        Py_CLEAR(known->type);
        if (find_slots(type, known) < 0)
            return NULL;
        known->type = (PyTypeObject *)Py_NewRef(cls);
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "no short cut knows %R", cls);
}

#define FAST(function) {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    {"bind", bind, METH_O, NULL},
    FAST(start_read),
    FAST(take_reads),
    FAST(end_reads),
    FAST(take_stray),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "iscsifuse._quick",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__quick(void)
{
    zero = PyLong_FromLong(0);
    one = PyLong_FromLong(1);
    minus_one = PyLong_FromLong(-1);
    read_10 = PyLong_FromLong(READ_10);
    no_bytes = PyBytes_FromStringAndSize(NULL, 0);
    if (zero == NULL || one == NULL || minus_one == NULL || read_10 == NULL || no_bytes == NULL)
        return NULL;
    return PyModule_Create(&definition);
}
