//! BPE training: repeatedly merges the most frequent pair of neighbouring tokens in the chunks of a corpus.
//!
//! In: the distinct chunks of the corpus with their counts. Out: the merges in the order of learning. If several pairs
//! are equally frequent, the smallest (left id, right id) is merged first. So the merges do not depend on the order of
//! the chunks or the number of threads.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::count::ChunkCounts;
use crate::merge::Pair;

const NONE: u32 = u32::MAX;

/// One byte of a distinct chunk. The first and the last byte of each token store its id, so that it can be read from
/// both sides. The bytes between are not used.
struct Position {
    /// NONE between chunks, and also where the right token of a merged pair began.
    token: u32,
    chunk: u32,
    /// The index in `stats` of the pair that begins here: the token here and the next token.
    pair_index: u32,
}

struct PairStats {
    pair: Pair,
    /// How often the pair occurs in the corpus.
    count: i64,
    /// The positions where the pair begins, in order. A position where the pair no longer exists stays in the list
    /// until the pair is merged.
    positions: Vec<u32>,
}

/// The count of a pair, the pair, and its index in `stats`. In the heap, the highest count comes first. If counts are
/// equal, the smallest pair comes first.
type Candidate = (i64, Reverse<Pair>, u32);

struct Trainer {
    /// All distinct chunks, one after another. A position with the token NONE precedes and follows each chunk.
    positions: Vec<Position>,
    /// How often each chunk occurs.
    chunk_counts: Vec<i64>,
    /// The length in bytes of each token.
    token_lens: Vec<u32>,
    stats: Vec<PairStats>,
    /// Indices in `stats` that can be reused, because their pairs no longer occur.
    free_stats: Vec<u32>,
    queue: BinaryHeap<Candidate>,
    /// During a merge, maps each token to the index of the pair (token, new token). This is an array, because hashing
    /// would be slower. All entries are NONE between merges.
    new_by_left: Vec<u32>,
    /// The same for the pair (new token, token).
    new_by_right: Vec<u32>,
}

/// Learns `num_merges` merges, or fewer if every chunk becomes a single token. The i-th merge makes id 256 + i.
///
/// `after_merge(number of merges so far)` is called after each merge. If it fails, training stops and returns its
/// error.
///
/// {"abab": 1}, 5 -> [(97, 98), (256, 256)]
pub fn learn_merges<E>(
    chunks: ChunkCounts,
    num_merges: usize,
    mut after_merge: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut trainer = Trainer::new(chunks);
    let mut merges = vec![];
    while merges.len() < num_merges {
        let Some(best) = trainer.most_frequent() else { break };
        merges.push(trainer.stats[best as usize].pair);
        trainer.merge(best);
        after_merge(merges.len())?;
    }
    Ok(merges)
}

impl Trainer {
    fn new(chunks: ChunkCounts) -> Self {
        let mut trainer = Self {
            positions: Vec::with_capacity(chunks.total_len() + chunks.len() + 1),
            chunk_counts: Vec::with_capacity(chunks.len()),
            token_lens: vec![1; 256],
            stats: vec![],
            free_stats: vec![],
            queue: BinaryHeap::new(),
            new_by_left: vec![NONE; 256],
            new_by_right: vec![NONE; 256],
        };
        let mut index_by_bytes = vec![NONE; 1 << 16];
        trainer.positions.push(Position { token: NONE, chunk: NONE, pair_index: NONE });
        chunks.for_each(|bytes, count| {
            let chunk = trainer.chunk_counts.len() as u32;
            trainer.chunk_counts.push(count);
            for (i, &byte) in bytes.iter().enumerate() {
                let at = trainer.positions.len() as u32;
                let mut pair_index = NONE;
                if let Some(&next) = bytes.get(i + 1) {
                    let known = &mut index_by_bytes[usize::from(byte) << 8 | usize::from(next)];
                    if *known == NONE {
                        *known = trainer.new_stats((byte.into(), next.into()));
                    }
                    pair_index = *known;
                    let stats = &mut trainer.stats[pair_index as usize];
                    stats.count += count;
                    stats.positions.push(at);
                }
                trainer.positions.push(Position { token: byte.into(), chunk, pair_index });
            }
            trainer.positions.push(Position { token: NONE, chunk: NONE, pair_index: NONE });
        });
        (0..trainer.stats.len() as u32).for_each(|pair_index| trainer.enqueue(pair_index));
        trainer
    }

    /// Adds empty statistics for a pair and returns their index.
    fn new_stats(&mut self, pair: Pair) -> u32 {
        let stats = PairStats { pair, count: 0, positions: vec![] };
        match self.free_stats.pop() {
            Some(index) => {
                self.stats[index as usize] = stats;
                index
            }
            None => {
                self.stats.push(stats);
                self.stats.len() as u32 - 1
            }
        }
    }

    fn enqueue(&mut self, pair_index: u32) {
        let stats = &self.stats[pair_index as usize];
        self.queue.push((stats.count, Reverse(stats.pair), pair_index));
    }

    /// Removes the most frequent pair from the queue and returns its index. Once the merge that creates a pair is
    /// complete, the count of the pair can only fall. So an outdated count in the queue is always too high. When the
    /// count at the top is up to date, it is the maximum.
    fn most_frequent(&mut self) -> Option<u32> {
        loop {
            let mut top = self.queue.peek_mut()?;
            let count = self.stats[top.2 as usize].count;
            if count == top.0 {
                return Some(PeekMut::pop(top).2);
            }
            if count == 0 {
                let unused = PeekMut::pop(top).2;
                self.stats[unused as usize].positions = vec![];
                self.free_stats.push(unused);
            } else {
                top.0 = count;
            }
        }
    }

    /// Replaces a pair with one new token wherever it occurs.
    fn merge(&mut self, pair_index: u32) {
        let id = self.token_lens.len() as u32;
        let (left, right) = self.stats[pair_index as usize].pair;
        let mut positions = std::mem::take(&mut self.stats[pair_index as usize].positions);
        self.free_stats.push(pair_index);
        let (left_len, len) = (self.token_len(left), self.token_len(left) + self.token_len(right));
        self.token_lens.push(len as u32);
        self.new_by_left.push(NONE);
        self.new_by_right.push(NONE);

        // Write the new token from left to right, and subtract the pairs that this breaks up.
        positions.retain(|&at| {
            let (at, middle) = (at as usize, at as usize + left_len);
            // The pair may no longer be here, because one of its tokens has been merged with another neighbour. In
            // "aaa", this loop itself has done that.
            if self.positions[at].token != left || self.positions[middle].token != right {
                return false;
            }
            let count = self.chunk_counts[self.positions[at].chunk as usize];
            let before = self.positions[at - 1].token;
            if before != NONE && before != id {
                self.remove_pair(at - self.token_len(before), count);
            }
            if self.positions[at + len].token != NONE {
                self.remove_pair(middle, count);
            }
            self.positions[middle].token = NONE;
            self.positions[at].token = id;
            self.positions[at + len - 1].token = id;
            true
        });

        // Add the pairs that the new token forms with its neighbours.
        let mut new_pairs = vec![];
        for &at in &positions {
            let at = at as usize;
            let before = self.positions[at - 1].token;
            if before != NONE && before != id {
                let known = self.new_by_left[before as usize];
                self.add_pair(at - self.token_len(before), known, (before, id), &mut new_pairs);
            }
            let after = self.positions[at + len].token;
            if after != NONE {
                let known = self.new_by_right[after as usize];
                self.add_pair(at, known, (id, after), &mut new_pairs);
            }
        }
        for pair_index in new_pairs {
            let (before, after) = self.stats[pair_index as usize].pair;
            if before == id {
                self.new_by_right[after as usize] = NONE;
            } else {
                self.new_by_left[before as usize] = NONE;
            }
            self.enqueue(pair_index);
        }
    }

    /// The length of a token in bytes.
    fn token_len(&self, token: u32) -> usize {
        self.token_lens[token as usize] as usize
    }

    /// Subtracts the pair that begins at `at`. Its chunk occurs `count` times in the corpus.
    fn remove_pair(&mut self, at: usize, count: i64) {
        self.stats[self.positions[at].pair_index as usize].count -= count;
    }

    /// Records that `pair`, which contains the new token, begins at `at`. `known` is the pair's index in `stats`, or
    /// NONE if this merge has not added the pair yet. In that case, the pair gets an index, which is added to
    /// `new_pairs`.
    fn add_pair(&mut self, at: usize, known: u32, pair: Pair, new_pairs: &mut Vec<u32>) {
        let mut pair_index = known;
        if known == NONE {
            pair_index = self.new_stats(pair);
            new_pairs.push(pair_index);
            let (before, after) = pair;
            if before as usize + 1 == self.token_lens.len() {
                self.new_by_right[after as usize] = pair_index;
            } else {
                self.new_by_left[before as usize] = pair_index;
            }
        }
        let position = &mut self.positions[at];
        position.pair_index = pair_index;
        let stats = &mut self.stats[pair_index as usize];
        stats.count += self.chunk_counts[position.chunk as usize];
        stats.positions.push(at as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Chunk;
    use crate::parallel::{Plan, feed_all};
    use crate::split::{GPT4_PATTERN, Splitter};
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    fn count(texts: &[String], plan: Plan) -> ChunkCounts {
        ChunkCounts::of_texts(&Splitter::new(GPT4_PATTERN).unwrap(), plan, feed_all(texts)).unwrap()
    }

    fn learn(texts: &[String], num_merges: usize) -> Vec<Pair> {
        learn_merges(count(texts, Plan::new(None)), num_merges, |_| Ok::<_, Infallible>(())).unwrap()
    }

    /// Follows the definition of BPE: counts every pair again before each merge.
    fn learn_naively(texts: &[String], num_merges: usize) -> Vec<Pair> {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut words: Vec<Vec<u32>> = vec![];
        for text in texts {
            let bytes = |chunk: Chunk| &text.as_bytes()[chunk.range()];
            words.extend(splitter.chunks(text).map(|c| bytes(c.unwrap()).iter().map(|&b| b.into()).collect()));
        }
        let mut merges = vec![];
        while merges.len() < num_merges {
            let mut counts: BTreeMap<Pair, i64> = BTreeMap::new();
            words.iter().flat_map(|w| w.windows(2)).for_each(|p| *counts.entry((p[0], p[1])).or_default() += 1);
            let Some((&pair, _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
            for word in &mut words {
                let mut out = vec![];
                let mut i = 0;
                while i < word.len() {
                    let hit = word[i] == pair.0 && word.get(i + 1) == Some(&pair.1);
                    out.push(if hit { 256 + merges.len() as u32 } else { word[i] });
                    i += 1 + usize::from(hit);
                }
                *word = out;
            }
            merges.push(pair);
        }
        merges
    }

    /// Texts with only a few different letters. They have many ties and many runs of one letter. Some chunks are too
    /// long for a key.
    fn random_texts(mut state: u64) -> Vec<String> {
        let mut draw = move |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        (0..20).map(|_| (0..draw(80)).map(|_| b"aaaabaab c"[draw(10) as usize] as char).collect()).collect()
    }

    #[test]
    fn equals_counting_again_before_each_merge() {
        for seed in 0..200 {
            let texts = random_texts(seed);
            assert_eq!(learn(&texts, 60), learn_naively(&texts, 60), "{texts:?}");
        }
    }

    #[test]
    fn does_not_depend_on_how_the_work_is_divided() {
        let texts: Vec<String> = (0..9).flat_map(random_texts).collect();
        let expected = learn(&texts, 60);
        let whole = [texts.concat()];
        let expected_whole = learn(&whole, 60);
        for (threads, piece_bytes) in [(1, 1 << 17), (2, 10), (5, 1), (3, 500)] {
            let learn =
                |texts| learn_merges(count(texts, Plan { threads, piece_bytes }), 60, |_| Ok::<_, Infallible>(()));
            assert_eq!(learn(&texts), Ok(expected.clone()));
            assert_eq!(learn(&whole), Ok(expected_whole.clone()));
        }
    }

    #[test]
    fn a_merge_costs_the_same_in_a_long_chunk() {
        // The text is a single chunk, and every merge changes it. If the cost of a merge grew with the length of the
        // chunk, this test would take far too long.
        let mut state = 1u64;
        let draw = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            char::from(b'a' + ((state >> 33) % 26) as u8)
        };
        let text: String = (0..300_000).map(draw).collect();
        assert_eq!(learn(&[text], 20_000).len(), 20_000);
    }

    #[test]
    fn stops_when_every_chunk_is_one_token_and_on_an_error() {
        let texts = ["abcd".to_string()];
        assert_eq!(learn(&texts, 100).len(), 3);
        let chunks = count(&texts, Plan::new(None));
        assert_eq!(learn_merges(chunks, 100, |n| if n == 2 { Err("stop") } else { Ok(()) }), Err("stop"));
    }
}
