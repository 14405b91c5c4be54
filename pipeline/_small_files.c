/* Many small files in one call: each is opened, read or written, and closed, without Python in between.

   Nothing here decides what is wrong. A file with which all goes as it mostly does is done; any other one is left to
   Python, as if nobody had touched it, and Python's answer counts.

   No part of Python is needed to compile this. Whoever changes what the functions take changes their names: a library
   from before may still lie beside newer code.
*/

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LEFT_TO_PYTHON = -1, LONGEST_PATH = 4096 };

/* O_NONBLOCK: a pipe would block for ever. */
static int opened(const char *path) {
    return open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
}

/* Whether an open file lies in a folder, whose path ends with a slash, once all links are followed. */
static int lies_in(int descriptor, const char *folder) {
    char name[32], path[LONGEST_PATH];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, sizeof path), needed = (ssize_t)strlen(folder);
    return length >= needed && length < (ssize_t)sizeof path && !memcmp(path, folder, (size_t)needed);
}

/* Reads whole files one behind the other into `room`.

   paths: `count` strings, one behind the other.
   sizes: of each file, or LEFT_TO_PYTHON; those read follow each other in `room` without gaps.
*/
void ruiji_read_whole_files(int64_t count, const char *paths, const char *folder, char *room, int64_t bytes,
                            int64_t *sizes) {
    for (int64_t i = 0; i < count; i++, paths += strlen(paths) + 1) {
        struct stat status;
        sizes[i] = LEFT_TO_PYTHON;
        int descriptor = opened(paths);
        if (descriptor < 0) continue;
        if (!fstat(descriptor, &status) && S_ISREG(status.st_mode) && status.st_size < bytes &&
            lies_in(descriptor, folder)) {
            /* One byte more than it should have: it may have grown. */
            ssize_t size = read(descriptor, room, (size_t)status.st_size + 1);
            if (size == status.st_size) {
                sizes[i] = size;
                room += size;
                bytes -= size;
            }
        }
        close(descriptor);
    }
}

/* Reads the beginnings of files, each into its rows of three arrays.

   sizes: how many bytes were read, up to those of a row of all three; or LEFT_TO_PYTHON.
*/
void ruiji_read_file_rows(int64_t count, const char *paths, char *heads, int64_t head_bytes, char *rows,
                          int64_t row_bytes, char *tails, int64_t tail_bytes, int64_t *sizes) {
    for (int64_t i = 0; i < count; i++, paths += strlen(paths) + 1) {
        sizes[i] = LEFT_TO_PYTHON;
        int descriptor = opened(paths);
        if (descriptor < 0) continue;
        struct iovec parts[3] = {{heads + i * head_bytes, (size_t)head_bytes},
                                 {rows + i * row_bytes, (size_t)row_bytes},
                                 {tails + i * tail_bytes, (size_t)tail_bytes}};
        sizes[i] = readv(descriptor, parts, 3);
        close(descriptor);
    }
}

/* Opens a new file to write it. Mostly its folder is missing, and nothing else. */
static int created(const char *path) {
    static const int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
    int descriptor = open(path, flags, 0666);
    const char *slash = strrchr(path, '/');
    char folder[LONGEST_PATH];
    if (descriptor >= 0 || errno != ENOENT || !slash || slash - path >= LONGEST_PATH) return descriptor;
    memcpy(folder, path, (size_t)(slash - path));
    folder[slash - path] = 0;
    mkdir(folder, 0777);
    return open(path, flags, 0666);
}

/* Writes files that appear whole under their names, or not at all.

   temporaries, paths: `count` strings each, one behind the other: where a file is written, and its name.
   contents: `bytes` of each file.
   written: 1 for each that is there now, else 0, and nothing is left of it.
*/
void ruiji_write_whole_files(int64_t count, const char *temporaries, const char *paths, const char *contents,
                             int64_t bytes, uint8_t *written) {
    for (int64_t i = 0; i < count; i++, contents += bytes) {
        written[i] = 0;
        int descriptor = created(temporaries);
        if (descriptor >= 0) {
            int whole = write(descriptor, contents, (size_t)bytes) == bytes;
            whole = !close(descriptor) && whole;
            written[i] = whole && !rename(temporaries, paths);
            if (!written[i]) unlink(temporaries);
        }
        temporaries += strlen(temporaries) + 1;
        paths += strlen(paths) + 1;
    }
}

/* Deletes files.

   gone: 1 for each that is not there now, else 0.
*/
void ruiji_remove_files(int64_t count, const char *paths, uint8_t *gone) {
    for (int64_t i = 0; i < count; i++, paths += strlen(paths) + 1) gone[i] = !unlink(paths) || errno == ENOENT;
}
