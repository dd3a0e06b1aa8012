//! BPE training: merges the most frequent pair of neighbouring tokens in the chunks of a corpus, again and again.
//!
//! Ties go to the smallest (left id, right id), so the merges depend neither on the order of chunks nor on threads.
//! A merge costs time for the places where its pair occurs, whatever the length of the chunks they lie in, and nothing
//! is looked up by hash: a place knows its pair, and the pairs a merge makes are told apart by the one token that they
//! join to the new one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::count::ChunkCounts;
use crate::merge::Pair;

const NONE: u32 = u32::MAX;

/// One byte of a distinct chunk. A token's id stands at its first and at its last byte, so that both neighbours of a
/// token are found from its length; what is between is never read.
struct Place {
    /// NONE between chunks, and where a right part of a merge began.
    token: u32,
    chunk: u32,
    /// The pair of the token that begins here and the next one.
    pair: u32,
}

struct PairStat {
    pair: Pair,
    /// How often it occurs in the corpus.
    count: i64,
    /// Where it begins, in order. Places that it has lost since are still there.
    places: Vec<u32>,
}

/// The highest count first, then the smallest pair. With the index of its statistics.
type Candidate = (i64, Reverse<Pair>, u32);

struct Trainer {
    places: Vec<Place>,
    /// By chunk: how often it occurs.
    counts: Vec<i64>,
    /// By token: its bytes.
    lens: Vec<u32>,
    stats: Vec<PairStat>,
    /// Statistics of pairs that are gone, to be used again.
    free: Vec<u32>,
    queue: BinaryHeap<Candidate>,
    /// The pairs with the token being made, by their other token, on its left or right; NONE after each merge.
    born_left: Vec<u32>,
    born_right: Vec<u32>,
}

/// Learns up to `num_merges` merges; fewer when every chunk has become one token. The i-th merge makes id 256 + i.
///
/// `tick(merges so far)` is called after each merge; its error stops the training and is returned.
pub fn learn_merges<E>(
    chunks: ChunkCounts,
    num_merges: usize,
    mut tick: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut trainer = Trainer::new(chunks);
    let mut merges = vec![];
    while merges.len() < num_merges {
        let Some(best) = trainer.most_frequent() else { break };
        merges.push(trainer.stats[best as usize].pair);
        trainer.merge(best);
        tick(merges.len())?;
    }
    Ok(merges)
}

impl Trainer {
    fn new(chunks: ChunkCounts) -> Self {
        let mut trainer = Self {
            places: Vec::with_capacity(chunks.total_len() + chunks.len() + 1),
            counts: Vec::with_capacity(chunks.len()),
            lens: vec![1; 256],
            stats: vec![],
            free: vec![],
            queue: BinaryHeap::new(),
            born_left: vec![NONE; 256],
            born_right: vec![NONE; 256],
        };
        let mut by_bytes = vec![NONE; 1 << 16];
        trainer.places.push(Place { token: NONE, chunk: NONE, pair: NONE });
        chunks.for_each(|bytes, count| {
            let chunk = trainer.counts.len() as u32;
            trainer.counts.push(count);
            for (i, &byte) in bytes.iter().enumerate() {
                let at = trainer.places.len() as u32;
                let mut pair = NONE;
                if let Some(&next) = bytes.get(i + 1) {
                    let known = &mut by_bytes[usize::from(byte) << 8 | usize::from(next)];
                    if *known == NONE {
                        *known = trainer.new_pair((byte.into(), next.into()));
                    }
                    pair = *known;
                    let stat = &mut trainer.stats[pair as usize];
                    stat.count += count;
                    stat.places.push(at);
                }
                trainer.places.push(Place { token: byte.into(), chunk, pair });
            }
            trainer.places.push(Place { token: NONE, chunk: NONE, pair: NONE });
        });
        (0..trainer.stats.len() as u32).for_each(|pair| trainer.enqueue(pair));
        trainer
    }

    fn new_pair(&mut self, pair: Pair) -> u32 {
        let stat = PairStat { pair, count: 0, places: vec![] };
        match self.free.pop() {
            Some(index) => {
                self.stats[index as usize] = stat;
                index
            }
            None => {
                self.stats.push(stat);
                self.stats.len() as u32 - 1
            }
        }
    }

    fn enqueue(&mut self, pair: u32) {
        let stat = &self.stats[pair as usize];
        self.queue.push((stat.count, Reverse(stat.pair), pair));
    }

    /// Takes the pair to merge next out of the queue. After the step in which a pair is born its count only falls, so
    /// a stale candidate is too high, never too low: it is put right, and one on top that is right is the maximum.
    fn most_frequent(&mut self) -> Option<u32> {
        loop {
            let mut top = self.queue.peek_mut()?;
            let count = self.stats[top.2 as usize].count;
            if count == top.0 {
                return Some(PeekMut::pop(top).2);
            }
            if count == 0 {
                let gone = PeekMut::pop(top).2;
                self.stats[gone as usize].places = vec![];
                self.free.push(gone);
            } else {
                top.0 = count;
            }
        }
    }

    /// Makes one new token of a pair wherever it occurs.
    fn merge(&mut self, merged: u32) {
        let id = self.lens.len() as u32;
        let (left, right) = self.stats[merged as usize].pair;
        let mut places = std::mem::take(&mut self.stats[merged as usize].places);
        self.free.push(merged);
        let (left_len, len) = (self.len(left), self.len(left) + self.len(right));
        self.lens.push(len as u32);
        self.born_left.push(NONE);
        self.born_right.push(NONE);

        // Put the new token in place, from left to right, and take the pairs away that it breaks up.
        places.retain(|&at| {
            let (at, middle) = (at as usize, at as usize + left_len);
            // Either part may have been merged with another neighbour, or just now with its like ("aaa").
            if self.places[at].token != left || self.places[middle].token != right {
                return false;
            }
            let count = self.counts[self.places[at].chunk as usize];
            let before = self.places[at - 1].token;
            if before != NONE && before != id {
                self.lose(at - self.len(before), count);
            }
            if self.places[at + len].token != NONE {
                self.lose(middle, count);
            }
            self.places[middle].token = NONE;
            self.places[at].token = id;
            self.places[at + len - 1].token = id;
            true
        });

        // Count the pairs that it makes with its neighbours.
        let mut born = vec![];
        for &at in &places {
            let at = at as usize;
            let before = self.places[at - 1].token;
            if before != NONE && before != id {
                let pair = self.born_left[before as usize];
                self.gain(at - self.len(before), pair, (before, id), &mut born);
            }
            let after = self.places[at + len].token;
            if after != NONE {
                let pair = self.born_right[after as usize];
                self.gain(at, pair, (id, after), &mut born);
            }
        }
        for pair in born {
            let (before, after) = self.stats[pair as usize].pair;
            if before == id {
                self.born_right[after as usize] = NONE;
            } else {
                self.born_left[before as usize] = NONE;
            }
            self.enqueue(pair);
        }
    }

    fn len(&self, token: u32) -> usize {
        self.lens[token as usize] as usize
    }

    /// The pair at this place is no more.
    fn lose(&mut self, at: usize, count: i64) {
        self.stats[self.places[at].pair as usize].count -= count;
    }

    /// There is a pair with the new token at this place; NONE: it is the first of its kind.
    fn gain(&mut self, at: usize, known: u32, pair: Pair, born: &mut Vec<u32>) {
        let mut index = known;
        if known == NONE {
            index = self.new_pair(pair);
            born.push(index);
            let (before, after) = pair;
            if before as usize + 1 == self.lens.len() {
                self.born_right[after as usize] = index;
            } else {
                self.born_left[before as usize] = index;
            }
        }
        let place = &mut self.places[at];
        place.pair = index;
        let stat = &mut self.stats[index as usize];
        stat.count += self.counts[place.chunk as usize];
        stat.places.push(at as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Chunk;
    use crate::parallel::{Plan, all};
    use crate::split::{GPT4_PATTERN, Splitter};
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    fn count(texts: &[String], plan: Plan) -> ChunkCounts {
        ChunkCounts::of_texts(&Splitter::new(GPT4_PATTERN).unwrap(), plan, all(texts)).unwrap()
    }

    fn learn(texts: &[String], num_merges: usize) -> Vec<Pair> {
        learn_merges(count(texts, Plan::new(None)), num_merges, |_| Ok::<_, Infallible>(())).unwrap()
    }

    /// Counts every pair afresh before each merge.
    fn learn_slowly(texts: &[String], num_merges: usize) -> Vec<Pair> {
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

    /// Texts over few letters: many ties, many runs of one letter, chunks on both sides of a key's length.
    fn random_texts(mut state: u64) -> Vec<String> {
        let mut draw = move |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        (0..20).map(|_| (0..draw(80)).map(|_| b"aaaabaab c"[draw(10) as usize] as char).collect()).collect()
    }

    #[test]
    fn equals_counting_afresh_before_each_merge() {
        for seed in 0..200 {
            let texts = random_texts(seed);
            assert_eq!(learn(&texts, 60), learn_slowly(&texts, 60), "{texts:?}");
        }
    }

    #[test]
    fn does_not_depend_on_how_the_work_is_shared() {
        let texts: Vec<String> = (0..9).flat_map(random_texts).collect();
        let expected = learn(&texts, 60);
        let whole = [texts.concat()];
        let expected_whole = learn(&whole, 60);
        for (threads, piece) in [(1, 1 << 17), (2, 10), (5, 1), (3, 500)] {
            let learn = |texts| learn_merges(count(texts, Plan { threads, piece }), 60, |_| Ok::<_, Infallible>(()));
            assert_eq!(learn(&texts), Ok(expected.clone()));
            assert_eq!(learn(&whole), Ok(expected_whole.clone()));
        }
    }

    #[test]
    fn a_long_chunk_is_no_trouble() {
        // Every merge touches it; what a merge costs must not depend on its length.
        let mut state = 1u64;
        let draw = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            char::from(b'a' + ((state >> 33) % 26) as u8)
        };
        let text: String = (0..300_000).map(draw).collect();
        assert_eq!(learn(&[text], 20_000).len(), 20_000);
    }

    #[test]
    fn stops_when_chunks_are_used_up_and_when_told() {
        let texts = ["abcd".to_string()];
        assert_eq!(learn(&texts, 100).len(), 3);
        let chunks = count(&texts, Plan::new(None));
        assert_eq!(learn_merges(chunks, 100, |n| if n == 2 { Err("stop") } else { Ok(()) }), Err("stop"));
    }
}
