//! Byte-level BPE. `split` cuts text into chunks, `train` learns merges from the counts of the chunks, and `encode`
//! applies the merges. `python` makes the Python module. This is an optional feature, so the crate's tests run without
//! Python.
//!
//! What makes each file fast:
//!
//! - `scan`: about nine in ten chunks are measured 16 bytes at a time, with masks and table look-ups. This avoids
//!   branches that the processor would mispredict. All other chunks are read one character at a time, with a table that
//!   maps each code point to its class.
//! - `chunk`: the key of a chunk of up to 15 bytes is a 128-bit integer that contains the chunk. Keys are cheap to
//!   compare, and hashing a key takes one multiplication.
//! - `cache`: words recur in text, and looking up the ids of a chunk is much cheaper than merging it again. A hit costs
//!   one hash, one cache line and two comparisons.
//! - `encode`: 32 chunks are split before the first is looked up, so that their cache lines arrive from memory in time.
//! - `merge`: a linear search finds the best pair of a short chunk, and a heap finds the best pair of a long chunk.
//! - `count`: each thread counts in its own hash table. The tables are added at the end.
//! - `train`: the cost of a merge depends on how often its pair occurs, but not on the length of the chunks. Nothing is
//!   hashed, because each position stores the index of its pair.
//! - `parallel`: texts go to the threads in pieces that fit into a core's cache. Large texts are cut so that all cores
//!   have work. The calling thread prepares the next pieces, and works on some of them itself if the other threads fall
//!   behind.
//! - `batch`: each thread writes to its own buffer. The buffers are then copied in parallel into one array.
//! - `python`: texts are borrowed from Python, not copied. Long computations release the GIL.

pub mod batch;
pub mod cache;
pub mod chunk;
pub mod count;
pub mod encode;
pub mod merge;
pub mod parallel;
#[cfg(feature = "python")]
mod python;
pub mod scan;
pub mod split;
pub mod train;
