//! Encodes many texts on all cores. In: texts. Out: one array with the ids of all texts, and the offset of each text.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::encode::Encoder;
use crate::parallel::{Piece, Pieces, Plan, TextSink, parallel_fold};

/// An integer type that stores token ids. It must be wide enough for the vocabulary.
pub trait Id: Copy + Default + Send + Sync {
    fn narrow(id: u32) -> Self;
}

impl Id for u16 {
    fn narrow(id: u32) -> Self {
        id as u16
    }
}

impl Id for u32 {
    fn narrow(id: u32) -> Self {
        id
    }
}

/// The ids of many texts, still in the buffers of the threads that encoded them.
pub struct Encoded<I, T> {
    outputs: Vec<Output<I, T>>,
    /// The ids of text i start at index `offsets[i]` and end before index `offsets[i + 1]`.
    pub offsets: Vec<i64>,
}

/// What one thread has encoded.
struct Output<I, T> {
    ids: Vec<I>,
    /// The pieces that the thread has encoded, each with the index in `ids` where its ids end. The pieces are kept so
    /// that the calling thread can free their texts, because it made them.
    pieces: Vec<(Piece<T>, usize)>,
    /// One entry per text, or per part of a text: the number of the text, and how many ids it has in `ids`.
    counts: Vec<(usize, usize)>,
    error: Option<String>,
}

impl Encoder {
    /// Encodes the texts that `produce` passes to its sink. `produce` runs on the calling thread, while the other
    /// threads of `plan` encode.
    ///
    /// If `produce` fails, its error is returned. If the pattern fails, the sink returns false, and the pattern's error
    /// is returned.
    ///
    /// "aa", "", "b" -> ids [97, 97, 98], offsets [0, 2, 2, 3] (without merges)
    pub fn encode_batch<I: Id, T: AsRef<str> + Send + Sync, E: From<String>>(
        &self,
        plan: Plan,
        produce: impl FnOnce(&mut TextSink<T>) -> Result<(), E>,
    ) -> Result<Encoded<I, T>, E> {
        let mut pieces = Pieces::new(self.splitter(), plan.piece_bytes);
        let failed = AtomicBool::new(false);
        let init = || (vec![], Output { ids: vec![], pieces: vec![], counts: vec![], error: None });
        let step = |(scratch, output): &mut (Vec<u32>, Output<I, T>), piece: Piece<T>| {
            if !failed.load(Relaxed) {
                output.error = self.encode_piece(scratch, output, &piece).err();
                failed.fetch_or(output.error.is_some(), Relaxed);
            }
            output.pieces.push((piece, output.ids.len()));
        };
        let (produced, states): (Result<(), E>, _) = parallel_fold(plan.threads, init, step, |send| {
            produce(&mut |text| {
                pieces.add(text, send);
                !failed.load(Relaxed)
            })?;
            pieces.flush(send);
            Ok(())
        });
        produced?;
        let outputs: Vec<_> = states.into_iter().map(|(_, output)| output).collect();
        if let Some(error) = outputs.iter().find_map(|output| output.error.clone()) {
            return Err(error.into());
        }
        let mut offsets = vec![0; pieces.num_texts + 1];
        for &(number, count) in outputs.iter().flat_map(|output| &output.counts) {
            offsets[number + 1] += count as i64;
        }
        for i in 1..offsets.len() {
            offsets[i] += offsets[i - 1];
        }
        Ok(Encoded { outputs, offsets })
    }

    fn encode_piece<I: Id, T: AsRef<str>>(
        &self,
        scratch: &mut Vec<u32>,
        output: &mut Output<I, T>,
        piece: &Piece<T>,
    ) -> Result<(), String> {
        self.with_cache(|cache| {
            for (number, text) in piece.texts() {
                let room = Self::room_for(text);
                if scratch.len() < room {
                    scratch.resize(room, 0);
                }
                let count = self.encode_with(cache, text, scratch).map_err(|e| format!("text {number}: {e}"))?;
                output.ids.extend(scratch[..count].iter().map(|&id| I::narrow(id)));
                output.counts.push((number, count));
            }
            Ok(())
        })
    }
}

impl<I: Id, T: AsRef<str> + Send + Sync> Encoded<I, T> {
    /// The total number of ids.
    pub fn len(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0) as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies all ids to `out`, in the order of the texts. The length of `out` must be `len()`.
    pub fn write(&self, threads: usize, mut out: &mut [I]) {
        let mut spans = vec![];
        for output in &self.outputs {
            let mut start = 0;
            for (piece, end) in &output.pieces {
                spans.push((piece.position(), &output.ids[start..*end]));
                start = *end;
            }
        }
        spans.sort_unstable_by_key(|(position, _)| *position);
        let copy = |_: &mut (), (from, to): (&[I], &mut [I])| to.copy_from_slice(from);
        parallel_fold(
            threads,
            || (),
            copy,
            |send| {
                for (_, from) in spans {
                    let (to, rest) = std::mem::take(&mut out).split_at_mut(from.len());
                    out = rest;
                    send((from, to));
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::feed_all;
    use crate::split::{GPT4_PATTERN, Splitter};

    fn random_texts(mut state: u64) -> Vec<String> {
        let mut draw = move |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let alphabet: Vec<char> = "aaabbb  's\n\n.é字7 ".chars().collect();
        (0..draw(30)).map(|_| (0..draw(90)).map(|_| alphabet[draw(19) as usize % alphabet.len()]).collect()).collect()
    }

    #[test]
    fn a_batch_on_many_threads_equals_one_text_at_a_time() {
        for pattern in [GPT4_PATTERN, r"\p{L}+|\P{L}"] {
            let merges = [(97, 97), (97, 98), (256, 256), (32, 97), (259, 97), (0xc3, 0xa9), (10, 10)];
            let encoder = Encoder::new(Splitter::new(pattern).unwrap(), &merges);
            for seed in 0..40 {
                let texts = random_texts(seed);
                let each: Vec<Vec<u32>> = texts.iter().map(|text| encoder.encode(text).unwrap()).collect();
                for (threads, piece_bytes) in [(1, 1), (1, 1 << 17), (2, 3), (3, 1), (5, 20), (2, 300), (2, 1 << 17)] {
                    let encoded =
                        encoder.encode_batch::<u16, _, _>(Plan { threads, piece_bytes }, feed_all(&texts)).unwrap();
                    let mut ids = vec![0; encoded.len()];
                    encoded.write(threads, &mut ids);
                    assert_eq!(ids, each.concat().iter().map(|&id| id as u16).collect::<Vec<_>>());
                    let lens: Vec<_> = encoded.offsets.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
                    assert_eq!(lens, each.iter().map(Vec::len).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn an_error_of_the_pattern_or_of_the_producer_ends_the_work() {
        let encoder = Encoder::new(Splitter::new(r"a|\b").unwrap(), &[]);
        let result = encoder.encode_batch::<u16, _, _>(Plan::new(Some(3)), feed_all(["aaa", "b"]));
        assert!(result.err().unwrap().starts_with("text 1: "));
        // The texts never end, so `produce` must stop when the sink returns false.
        let result = encoder.encode_batch::<u16, _, _>(Plan::new(Some(3)), feed_all(std::iter::repeat("b")));
        assert!(result.err().unwrap().starts_with("text "));
        let result = encoder.encode_batch::<u16, &str, String>(Plan::new(Some(3)), |_| Err("stop".to_string()));
        assert_eq!(result.err().unwrap(), "stop");
    }
}
