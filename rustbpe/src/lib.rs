//! Byte-level BPE: `split` cuts text into chunks, `train` learns merges from chunks, `encode` applies them.
//! `python` binds them; without that feature the crate knows no Python, so that its tests need none.

pub mod encode;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod train;
