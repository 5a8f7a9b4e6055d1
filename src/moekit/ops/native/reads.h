// Reading records of files in the background, in pieces, their checksums computed as pieces come.
//
// Records that are urgent are read before the others, in the order in which they were asked for, a
// few pieces at a time: the first is there while the next are read, and one that turns up later
// waits for no more than the pieces in flight. While some threads wait for the disk, another sums.
#pragma once
#include "native.h"

#pragma GCC visibility push(default)
extern "C" {

struct Reads;

// Bytes start, ..., stop - 1 of a record belong to checksum number `sum`.
struct ReadRange {
    int64_t start, stop;
    int32_t sum, pad;
};

// Bytes [size] of a file from `offset` on go to `to`, which is aligned as the file needs it, and
// `sums`, zeros before, get the CRC-32 of their ranges, taken in order.
struct ReadJob {
    int64_t id;  // any number that no other record in line has
    int32_t file, urgent;
    int64_t offset, size;
    void* to;
    const ReadRange* ranges;
    int32_t range_count, pad;
    uint32_t* sums;
};

enum ReadStatus { READ_WHOLE = 0, READ_CUT_SHORT = -1 };

struct ReadDone {
    int64_t id;
    int32_t status, pad;  // READ_WHOLE, READ_CUT_SHORT, or the number of the system's error
};

// At most `in_flight` pieces of about `piece` bytes (a multiple of the page) are read at once.
Reads* reads_new(int32_t in_flight, int64_t piece);
// Only after reads_close, and when no thread is in reads_wait.
void reads_free(Reads*);

// The memory of `to`, `ranges` and `sums` must stay until the record is done, or taken back.
void reads_submit(Reads*, const ReadJob* job);
// Takes a record back; 0 where some of it is being read already, or was.
int32_t reads_cancel(Reads*, int64_t id);
// A record becomes urgent, behind those that are.
void reads_hurry(Reads*, int64_t id);
// Waits for a record to be done, `seconds` at most; 0 where none was, or reads_close was called.
int32_t reads_wait(Reads*, double seconds, ReadDone* done);
// Waits for the pieces that are being read, drops everything else and ends the threads.
void reads_close(Reads*);
}
#pragma GCC visibility pop
