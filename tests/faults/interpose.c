/* Faults at the door of the kernel: preloaded into the program under test (LD_PRELOAD), which knows nothing of it.
 *
 * Every call of libc that changes something below one folder is counted, whoever makes it: Python, safetensors (Rust),
 * Arrow (C++), Pillow (C). At the n-th the process is killed, or gets a signal, or the call fails. A write can be cut in
 * half first. A power cut keeps of every file what was synced: the rest is cut off before the process is killed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FDS = 8192, NAMES = PATH_MAX };
enum { OFF, RECORD, SIGNAL, CUT, FAIL };

static char root[NAMES];
static int mode = OFF, number, half, error, forever, logged = -1;
static long at, count;
static char *paths[FDS]; /* of descriptors that are open for writing below the root */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct dirty { dev_t device; ino_t inode; int descriptor; off_t synced; struct dirty *next; };
static struct dirty *unsynced;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void forget_in_child(void) { mode = OFF; }
__attribute__((constructor)) static void start(void) { pthread_atfork(NULL, NULL, forget_in_child); }

/* what: OFF..FAIL; n: counted from 1; value: of the signal or the error. */
void faults_arm(const char *folder, int what, long n, int value, int halved, int lasting, const char *log) {
    strncpy(root, folder, sizeof root - 1);
    at = n, count = 0, number = error = value, half = halved, forever = lasting;
    if (log && *log) {
        logged = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    }
    mode = what;
}
long faults_seen(void) { return count; }

static int below(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || path[length] == 0);
}

/* The absolute path of one that is relative to an open folder, or NULL for one elsewhere. */
static const char *absolute(int folder, const char *path, char *room) {
    if (path[0] != '/') {
        char link[64], base[NAMES];
        if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return NULL;
        base[length] = 0;
        if (snprintf(room, NAMES, "%s/%s", base, path) >= NAMES) return NULL;
        path = room;
    }
    return below(path) ? path : NULL;
}

static void cut_the_power(void) {
    for (struct dirty *file = unsynced; file; file = file->next)
        if (ftruncate(file->descriptor, file->synced)) {}
}

/* Count a call; returns 1 where it must fail with errno set. *halve: the caller is to do half of it and call die(). */
static int counted(const char *call, const char *path, int *halve) {
    if (mode == OFF) return 0;
    pthread_mutex_lock(&lock);
    long n = ++count;
    int now = n == at, armed = mode;
    pthread_mutex_unlock(&lock);
    if (logged >= 0) dprintf(logged, "%ld\t%s\t%s\n", n, call, path + strlen(root));
    if (armed == FAIL && (now || (forever && n > at))) {
        errno = error;
        return 1;
    }
    if (!now) return 0;
    if (armed == SIGNAL && halve && half) {
        *halve = 1;
    } else if (armed == SIGNAL) {
        kill(getpid(), number);
    } else if (armed == CUT) {
        cut_the_power();
        kill(getpid(), SIGKILL);
    }
    return 0;
}

static struct dirty *find(int descriptor, struct stat *about) {
    if (fstat(descriptor, about)) return NULL;
    for (struct dirty *file = unsynced; file; file = file->next)
        if (file->inode == about->st_ino && file->device == about->st_dev) return file;
    return NULL;
}

static void soiled(int descriptor) {
    struct stat about;
    if (mode != CUT || find(descriptor, &about)) return;
    struct dirty *file = malloc(sizeof *file);
    *file = (struct dirty){about.st_dev, about.st_ino, fcntl(descriptor, F_DUPFD_CLOEXEC, 2000), about.st_size, unsynced};
    unsynced = file;
}

static void cleaned(int descriptor) {
    struct stat about;
    if (mode != CUT || !find(descriptor, &about)) return;
    for (struct dirty **file = &unsynced; *file; file = &(*file)->next)
        if ((*file)->inode == about.st_ino && (*file)->device == about.st_dev) {
            struct dirty *gone = *file;
            *file = gone->next;
            close(gone->descriptor);
            free(gone);
            return;
        }
}

static int opened(const char *call, int folder, const char *path, int flags, mode_t rights,
                  int (*real)(int, const char *, int, ...)) {
    char room[NAMES];
    const char *where = NULL;
    if (mode != OFF && (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) where = absolute(folder, path, room);
    if (where && counted(call, where, NULL)) return -1;
    int descriptor = real(folder, path, flags, rights);
    if (where && descriptor >= 0 && descriptor < FDS) {
        free(paths[descriptor]);
        paths[descriptor] = strdup(where);
        if (flags & O_TRUNC) soiled(descriptor);
    }
    return descriptor;
}

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t rights = va_arg(rest, mode_t); va_end(rest); \
        REAL(name); \
        return opened("open", folder, path, flags, rights, real); \
    }
OPENAT(openat)
OPENAT(openat64)
#define OPEN(name, at_name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t rights = va_arg(rest, mode_t); va_end(rest); \
        static int (*real)(int, const char *, int, ...); \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #at_name); \
        return opened("open", AT_FDCWD, path, flags, rights, real); \
    }
OPEN(open, openat)
OPEN(open64, openat64)

int close(int descriptor) {
    REAL(close);
    if (descriptor >= 0 && descriptor < FDS && paths[descriptor]) {
        free(paths[descriptor]);
        paths[descriptor] = NULL;
    }
    return real(descriptor);
}

static const char *path_of(int descriptor) {
    return mode != OFF && descriptor >= 0 && descriptor < FDS ? paths[descriptor] : NULL;
}
static void die(void) { kill(getpid(), number); }

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    const char *where = path_of(descriptor);
    int halve = 0;
    if (where && counted("write", where, &halve)) return -1;
    if (where) soiled(descriptor);
    ssize_t done = real(descriptor, bytes, halve ? size / 2 : size);
    if (halve) die();
    return done;
}
ssize_t writev(int descriptor, const struct iovec *parts, int parts_count) {
    REAL(writev);
    const char *where = path_of(descriptor);
    if (where && counted("write", where, NULL)) return -1;
    if (where) soiled(descriptor);
    return real(descriptor, parts, parts_count);
}
#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *bytes, size_t size, offset_type offset) { \
        REAL(name); \
        const char *where = path_of(descriptor); \
        int halve = 0; \
        if (where && counted("write", where, &halve)) return -1; \
        if (where) soiled(descriptor); \
        ssize_t done = real(descriptor, bytes, halve ? size / 2 : size, offset); \
        if (halve) die(); \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
#define SENDFILE(name, offset_type) \
    ssize_t name(int out, int in, offset_type *offset, size_t size) { \
        static ssize_t (*real)(int, int, offset_type *, size_t); \
        if (!real) real = (ssize_t (*)(int, int, offset_type *, size_t))dlsym(RTLD_NEXT, #name); \
        const char *where = path_of(out); \
        int halve = 0; \
        if (where && counted("write", where, &halve)) return -1; \
        if (where) soiled(out); \
        ssize_t done = real(out, in, offset, halve ? 100 : size); \
        if (halve) die(); \
        return done; \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
#define FTRUNCATE(name, size_type) \
    int name(int descriptor, size_type size) { \
        REAL(name); \
        const char *where = path_of(descriptor); \
        if (where && counted("truncate", where, NULL)) return -1; \
        if (where) soiled(descriptor); \
        return real(descriptor, size); \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

int fsync(int descriptor) {
    REAL(fsync);
    const char *where = path_of(descriptor);
    if (where && counted("fsync", where, NULL)) return -1;
    int done = real(descriptor);
    if (!done) cleaned(descriptor);
    return done;
}

static int changes(const char *call, int folder, const char *path) {
    char room[NAMES];
    const char *where = mode == OFF ? NULL : absolute(folder, path, room);
    return where && counted(call, where, NULL);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return changes("rename", AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    return changes("rename", to_folder, to) ? -1 : real(from_folder, from, to_folder, to);
}
int symlink(const char *target, const char *path) {
    REAL(symlink);
    return changes("symlink", AT_FDCWD, path) ? -1 : real(target, path);
}
int symlinkat(const char *target, int folder, const char *path) {
    REAL(symlinkat);
    return changes("symlink", folder, path) ? -1 : real(target, folder, path);
}
int mkdir(const char *path, mode_t rights) {
    REAL(mkdir);
    return changes("mkdir", AT_FDCWD, path) ? -1 : real(path, rights);
}
int mkdirat(int folder, const char *path, mode_t rights) {
    REAL(mkdirat);
    return changes("mkdir", folder, path) ? -1 : real(folder, path, rights);
}
/* A full disk lets go of files; a read-only one does not. */
static int removes(int folder, const char *path) {
    return !(mode == FAIL && error == ENOSPC) && changes("remove", folder, path);
}
int unlink(const char *path) {
    REAL(unlink);
    return removes(AT_FDCWD, path) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return removes(folder, path) ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    return removes(AT_FDCWD, path) ? -1 : real(path);
}
