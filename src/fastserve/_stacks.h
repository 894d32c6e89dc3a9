/* Keep the blocks in which Python thread states have their frames.
 *
 * From Python 3.11 on a thread state maps 16 KiB for its frames when it runs its first function, and unmaps them at its
 * end. For threads that get a new state for every request this, with the page faults, is more than a tenth of the
 * CPU time of a short connection. The blocks come from the arena allocator, which nothing else asks for this size: the
 * arenas of the object allocator are many times as large. What is said here in front of it is the documented way,
 * PyObject_SetArenaAllocator().
 */
#ifndef FASTSERVE_STACKS_H
#define FASTSERVE_STACKS_H

#include <Python.h>

enum { FS_STACK_SIZE = 16 * 1024, FS_STACKS_KEPT = 64 };

static PyObjectArenaAllocator fs_arenas;
static void *fs_stacks[FS_STACKS_KEPT];
static int fs_stack_count = 0;
/* Not a lock to wait for: whoever finds it taken, by another interpreter or in a forked child for good, does without. */
static char fs_stacks_taken = 0;

static void *fs_stack_alloc(void *context, size_t size)
{
    void *found = NULL;
    (void)context;
    if (size == FS_STACK_SIZE && !__atomic_test_and_set(&fs_stacks_taken, __ATOMIC_ACQUIRE)) {
        if (fs_stack_count > 0)
            found = fs_stacks[--fs_stack_count];
        __atomic_clear(&fs_stacks_taken, __ATOMIC_RELEASE);
    }
    return found != NULL ? found : fs_arenas.alloc(fs_arenas.ctx, size);
}

static void fs_stack_free(void *context, void *block, size_t size)
{
    int kept = 0;
    (void)context;
    if (size == FS_STACK_SIZE && !__atomic_test_and_set(&fs_stacks_taken, __ATOMIC_ACQUIRE)) {
        if (fs_stack_count < FS_STACKS_KEPT) {
            fs_stacks[fs_stack_count++] = block;
            kept = 1;
        }
        __atomic_clear(&fs_stacks_taken, __ATOMIC_RELEASE);
    }
    if (!kept)
        fs_arenas.free(fs_arenas.ctx, block, size);
}

/* To be called once. */
static inline void fs_keep_stacks(void)
{
    PyObjectArenaAllocator keeping = {NULL, fs_stack_alloc, fs_stack_free};
    PyObject_GetArenaAllocator(&fs_arenas);
    PyObject_SetArenaAllocator(&keeping);
}

#endif
