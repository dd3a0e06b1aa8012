//! Byte-level BPE: `split` cuts text into chunks, `train` learns merges from counted chunks, and `encode` applies them.
//! `python` makes the Python module. Without that feature the crate does not use Python, so its tests run without it.
//!
//! What makes it fast, file by file:
//!
//! - `scan`: about nine chunks in ten are measured 16 bytes at a time, with table look-ups and masks instead of
//!   branches that the processor would mispredict. The rest is read by character, with a flat table of classes.
//! - `chunk`: a chunk of up to 15 bytes is its own key, a 128-bit integer: cheap to compare, and hashed by one
//!   multiplication.
//! - `cache`: words recur in text, and looking up the ids of a chunk is much cheaper than merging it again. A hit
//!   costs one hash, one cache line and two comparisons.
//! - `encode`: chunks are split 32 ahead, so that their cache lines arrive from memory before they are looked up.
//! - `merge`: the best pair of a chunk is found by looking at all its pairs, or with a heap if the chunk is long.
//! - `count`: each thread counts into a hash table of its own; the tables are added at the end.
//! - `train`: a merge costs time only for the occurrences of its pair, however long the chunks are. Nothing is hashed:
//!   each position stores the index of its pair.
//! - `parallel`: texts go to the threads in pieces that fit a core's cache, and large texts are cut, so no core idles.
//!   The calling thread prepares the next pieces meanwhile, and takes work when the others fall behind.
//! - `batch`: each thread writes into a buffer of its own, and the buffers are copied in parallel into one array.
//! - `python`: texts are borrowed from Python, not copied, and long work releases the GIL.

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
