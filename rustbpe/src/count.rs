//! Counts how often each distinct chunk occurs in a corpus. Training needs only these counts. In: the texts of the
//! corpus. Out: its distinct chunks with their counts.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustc_hash::FxHashMap;

use crate::chunk::Key;
use crate::parallel::{Piece, Pieces, Plan, TextSink, parallel_fold};
use crate::split::Splitter;

/// Distinct chunks with their counts. Short chunks are stored as keys (see `chunk`), longer ones as bytes.
#[derive(Default)]
pub struct ChunkCounts {
    /// A hash table with open addressing, at most three quarters full. Its size is a power of two. The key 0 marks a
    /// free slot.
    short: Vec<(Key, i64)>,
    num_short: usize,
    long: FxHashMap<Box<[u8]>, i64>,
}

impl ChunkCounts {
    /// Counts the chunks of the texts that `produce` passes to its sink. `produce` runs on the calling thread, while
    /// the other threads of `plan` count.
    ///
    /// If `produce` fails, its error is returned. If the pattern fails, the sink returns false, and the pattern's error
    /// is returned.
    ///
    /// "a cat", "a cat" -> {"a": 2, " cat": 2}
    pub fn of_texts<T: AsRef<str> + Send + Sync, E: From<String>>(
        splitter: &Splitter,
        plan: Plan,
        produce: impl FnOnce(&mut TextSink<T>) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut pieces = Pieces::new(splitter, plan.piece_bytes);
        let failed = AtomicBool::new(false);
        let step = |state: &mut Result<Self, String>, piece: Piece<T>| {
            if let Ok(counts) = state {
                let counted = piece.texts().try_for_each(|(number, text)| {
                    counts.add_text(splitter, text).map_err(|error| format!("text {number}: {error}"))
                });
                if let Err(error) = counted {
                    *state = Err(error);
                    failed.store(true, Relaxed);
                }
            }
        };
        let (produced, states): (Result<(), E>, _) = parallel_fold(
            plan.threads,
            || Ok(Self::default()),
            step,
            |send| {
                produce(&mut |text| {
                    pieces.add(text, send);
                    !failed.load(Relaxed)
                })?;
                pieces.flush(send);
                Ok(())
            },
        );
        produced?;
        let mut total = Self::default();
        for counts in states {
            total = total.plus(counts?);
        }
        let num_positions = total.total_len() + total.len();
        if num_positions >= u32::MAX as usize {
            let limit = "more than the 4 GB that training can index: train on fewer texts";
            return Err(format!("the distinct chunks of the corpus take {num_positions} bytes, {limit}").into());
        }
        Ok(total)
    }

    fn add_text(&mut self, splitter: &Splitter, text: &str) -> Result<(), String> {
        let bytes = text.as_bytes();
        for chunk in splitter.chunks(text) {
            let chunk = chunk?;
            if chunk.key.is_short() {
                self.add_short(chunk.key, 1);
            } else {
                self.add_long(&bytes[chunk.range()], 1);
            }
        }
        Ok(())
    }

    fn add_long(&mut self, chunk: &[u8], count: i64) {
        match self.long.get_mut(chunk) {
            Some(total) => *total += count,
            None => {
                self.long.insert(chunk.into(), count);
            }
        }
    }

    #[inline]
    fn add_short(&mut self, key: Key, count: i64) {
        if 4 * self.num_short >= 3 * self.short.len() {
            self.grow();
        }
        let mask = self.short.len() - 1;
        let mut at = key.hash() & mask;
        loop {
            let slot = &mut self.short[at];
            if slot.0 == key {
                slot.1 += count;
                return;
            }
            if slot.0 == Key::default() {
                *slot = (key, count);
                self.num_short += 1;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let slots = (2 * self.short.len()).max(1 << 10);
        let old = std::mem::replace(&mut self.short, vec![(Key::default(), 0); slots]);
        self.num_short = 0;
        for (key, count) in old.into_iter().filter(|&(key, _)| key != Key::default()) {
            self.add_short(key, count);
        }
    }

    /// Returns the sum of two tables. Adds the smaller table to the larger one, because that is less work.
    fn plus(self, other: Self) -> Self {
        let (mut large, small) = if self.len() >= other.len() { (self, other) } else { (other, self) };
        for (key, count) in small.short.into_iter().filter(|&(key, _)| key != Key::default()) {
            large.add_short(key, count);
        }
        for (chunk, count) in small.long {
            *large.long.entry(chunk).or_default() += count;
        }
        large
    }

    /// The number of distinct chunks.
    pub fn len(&self) -> usize {
        self.num_short + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The total number of bytes in the distinct chunks.
    pub fn total_len(&self) -> usize {
        let short: usize = self.short.iter().map(|slot| slot.0.chunk_len()).sum();
        short + self.long.keys().map(|chunk| chunk.len()).sum::<usize>()
    }

    /// Calls `visit` with each chunk and its count, in no particular order.
    pub fn for_each(self, mut visit: impl FnMut(&[u8], i64)) {
        for (key, count) in self.short.into_iter().filter(|&(key, _)| key != Key::default()) {
            visit(&key.bytes()[..key.chunk_len()], count);
        }
        for (chunk, count) in self.long {
            visit(&chunk, count);
        }
    }
}
