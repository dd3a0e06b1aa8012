//! Byte-level BPE: `split` cuts text into chunks, `train` learns merges from counted chunks, `encode` applies them.
//! `python` binds them; without that feature the crate knows no Python, so that its tests need none.

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
